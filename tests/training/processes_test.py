"""Real processes on this machine train one model, and end together."""

import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax.training import distributed, jobs, loop, preemption
from tests.helpers.small import lines_of, small_config, without_clocks

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4
SILENT = 8
CHANGES = dict(
  checkpoint_every=2,
  eval_every=2,
  mesh__data=2,
  mesh__expert=2,
  model__N=1,
  optimizer__schedule='constant',  # a shorter run begins like a longer one
)
# Says on stdout which rows of each batch it has read.
RUN = """
import time
from moe_jax import main
from moe_jax.training import distributed, jobs
distributed.COME, distributed.SILENT = {come}, {silent}
put = jobs.Job.put

def slow_put(self, batch):
  print('rows', batch['row_B'].tolist(), flush=True)
  time.sleep({pause})
  return put(self, batch)

jobs.Job.put = slow_put
main.console()
"""
CONFIG = """
from tests.helpers.small import small_config
def get_config():
  return small_config({corpus!r}, **{changes!r})
"""
TRANSLATION = """
from moe_jax import config
def get_config():
  c = config.default()
  c.data = config.source(
    'pairs', path={corpus!r}, vocab_size=290, bleu_lines=10, beam=2
  )
  sizes = dict(N=1, encoder_N=1, D=16, H=2, F=16, E=4, expert_F=16)
  c.model = config.model('translator', **sizes)
  c.steps, c.batch_size, c.seq_len = 2, 8, 16
  c.mesh.data, c.mesh.expert = 2, 2
  return c
"""


class Together:
  """moe-train in `count` processes that have four devices between them."""

  def __init__(
    self,
    corpus,
    workdir,
    count,
    each=(),
    come=60,
    silent=30,
    pause=0,
    text=CONFIG,
  ):
    config = workdir.parent / f'{workdir.name}_config.py'
    config.write_text(text.format(corpus=str(corpus), changes=CHANGES))
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    run = RUN.format(come=come, silent=silent, pause=pause)
    arguments = [f'--config={config}', f'--workdir={workdir}']
    if count > 1:
      where = f'--coordinator=localhost:{port}'
      arguments += [where, f'--processes={count}', '--process={}']
    flags = (
      f'--xla_force_host_platform_device_count={DEVICES // count}'
      ' --xla_backend_optimization_level=0'
    )
    env = {
      **os.environ,
      'XLA_FLAGS': flags,
      'PYTHONPATH': str(ROOT),
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.running = [
      subprocess.Popen(
        [sys.executable, '-c', run, *(a.format(i) for a in arguments), *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
      )
      for i, extra in enumerate(each or [()] * count)
      if extra is not None
    ]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.running:
      process.kill()
      process.communicate()

  def end(self):
    """[(exit status, stdout, stderr)]"""
    told = [process.communicate(timeout=120) for process in self.running]
    codes = [process.returncode for process in self.running]
    return [(code, *text) for code, text in zip(codes, told, strict=True)]


def alone(corpus, workdir):
  loop.run(jobs.prepare(small_config(corpus, **CHANGES), str(workdir)))


def strike(run, victim, wait_for, blow=signal.SIGKILL):
  """How both of two end when one is killed, or frozen, as `Together.end`."""
  other = run.running[1 - victim]
  while not wait_for.exists():
    assert other.poll() is None, run.end()
    time.sleep(0.1)
  run.running[victim].send_signal(blow)
  began = time.monotonic()
  other.wait(timeout=120)
  assert time.monotonic() - began < SILENT + distributed.BEAT + 10
  run.running[victim].kill()
  ends = run.end()
  code, _, err = ends[1 - victim]
  assert code not in (0, None)
  line = (
    rf'^moe-train: process {1 - victim} of 2 ends.*(is gone|no sign of life)'
  )
  if victim == 0:  # jax has words of its own where it is the first to notice
    line += '|another task died'
  assert re.search(line, err, re.MULTILINE), err
  return ends


def assert_same_curve(workdir, expected):
  """Not bit for bit: sums over processes are in another order."""
  lines, expected = lines_of(workdir), lines_of(expected)
  assert len(lines) == len(expected)
  for line, other in zip(lines, expected, strict=True):
    assert line.keys() == other.keys()
    for key in line.keys() - {'tokens_per_second'}:
      np.testing.assert_allclose(line[key], other[key], rtol=1e-6, err_msg=key)


def rows_of(ends):
  """The rows of the first batch that each process has read."""
  return [
    json.loads(re.search(r'^rows (.*)$', t, re.MULTILINE)[1])
    for _, t, _ in ends
  ]


def whole(ends, count):
  """That all ended well, each having read its part of the rows."""
  assert [code for code, *_ in ends] == [0] * count, ends
  assert not any(err for _, _, err in ends[1:]), ends
  assert_shared(ends, count)


def assert_shared(ends, count):
  rows = rows_of(ends)
  assert [len(part) for part in rows] == [8 // count] * count
  assert sorted(itertools.chain(*rows)) == list(range(8))


def test_two_until_one_is_killed_then_one_make_the_curve_of_one(
  corpus, tmp_path
):
  expected, workdir = tmp_path / 'one', tmp_path / 'some'
  alone(corpus, expected)
  with Together(corpus, workdir, 2, silent=SILENT, pause=1) as run:
    ends = strike(run, 1, workdir / 'checkpoints' / '2')
  assert_shared(ends, 2)
  assert not (workdir / 'summary.json').exists()
  alone(corpus, workdir)
  assert_same_curve(workdir, expected)
  assert (workdir / 'report.html').exists()


@pytest.mark.slow
def test_one_until_it_is_stopped_then_four_make_the_curve_of_one(
  corpus, tmp_path, monkeypatch
):
  expected, workdir = tmp_path / 'one', tmp_path / 'some'
  alone(corpus, expected)
  save = loop.checkpoint.Checkpoints.save

  def save_and_stop(self, step, *values):
    save(self, step, *values)
    if step == 4:
      self.close()
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop.checkpoint.Checkpoints, 'save', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
      alone(corpus, workdir)
  assert lines_of(workdir)[-1]['step'] == 4
  with Together(corpus, workdir, 4) as run:
    whole(run.end(), 4)
  assert_same_curve(workdir, expected)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert len(summary['devices']) == DEVICES
  assert (workdir / 'report.html').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  'victim, blow',
  [(0, signal.SIGKILL), (1, signal.SIGSTOP)],
  ids=['first', 'frozen'],
)
def test_when_one_is_gone_the_other_ends(corpus, tmp_path, victim, blow):
  workdir = tmp_path / 'run'
  with Together(corpus, workdir, 2, silent=SILENT, pause=1) as run:
    strike(run, victim, workdir / 'metrics.jsonl', blow)


@pytest.mark.slow
def test_sigterm_to_one_makes_both_save_and_leave(corpus, tmp_path):
  """And the same command ends with the bits of a run without it."""
  whole, workdir = tmp_path / 'whole', tmp_path / 'left'
  with Together(corpus, whole, 2) as run:
    assert [code for code, *_ in run.end()] == [0, 0]
  with Together(corpus, workdir, 2, pause=1) as run:
    # A save has been made by then, in which signals wait.
    while not (workdir / 'checkpoints' / '2').is_dir():
      assert run.running[0].poll() is None, run.end()
      time.sleep(0.1)
    run.running[1].terminate()
    ends = run.end()
  assert [code for code, *_ in ends] == [preemption.EXIT] * 2, ends
  done = lines_of(workdir)[-1]['step']
  assert f'SIGTERM: left after step {done}, all is saved' in ends[0][2]
  assert (workdir / 'checkpoints' / str(done)).is_dir()
  with Together(corpus, workdir, 2) as run:
    assert [code for code, *_ in run.end()] == [0, 0]
  assert without_clocks(lines_of(workdir)) == without_clocks(lines_of(whole))


@pytest.mark.slow
def test_two_translate_as_one_does(tmp_path):
  draw = np.random.default_rng(0)
  words = 'one two three four five six seven eight nine ten'.split()
  rows = [draw.choice(words, draw.integers(2, 5)).tolist() for _ in range(300)]
  lines = [f'{" ".join(row)}\t{" ".join(row[::-1])}\n' for row in rows]
  path = tmp_path / 'pairs.tsv'
  path.write_text(''.join(lines))
  found = []
  for count in 1, 2:
    workdir = tmp_path / str(count)
    with Together(path, workdir, count, text=TRANSLATION) as run:
      ends = run.end()
    assert [code for code, *_ in ends] == [0] * count, ends
    found.append(json.loads((workdir / 'summary.json').read_text()))
  for key in 'eval_bleu', 'eval_chrf', 'copy_bleu', 'eval_loss':
    assert found[1][key] == pytest.approx(found[0][key], rel=1e-6)
  assert found[0]['eval_chrf'] > 0


@pytest.mark.slow
def test_when_one_fails_the_other_ends(corpus, tmp_path):
  """An error that is nobody's mistake in the config, after the start."""
  workdir = tmp_path / 'run'
  # Where the report goes there is a folder: process 0 fails at the very end.
  (workdir / 'report.html' / 'full').mkdir(parents=True)
  with Together(corpus, workdir, 2, silent=SILENT) as run:
    ends = run.end()
  assert all(code not in (0, None) for code, *_ in ends)
  assert 'report.html' in ends[0][2]
  assert 'moe-train: process 0 of 2 ends' in ends[0][2]


def test_a_mistake_of_one_stops_all(corpus, tmp_path):
  each = [(), ('--config.batch_size=6',)]
  with Together(corpus, tmp_path / 'run', 2, each) as run:
    (code, _, first), (other, _, second) = run.end()
  assert code == other == 2
  message = 'batch_size=6 is not a multiple of 4'
  assert first.startswith(f'moe-train: process 1: {message}')
  assert second.startswith(f'moe-train: {message}')
  assert first.count('\n') == second.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_one_that_never_comes_is_not_waited_for(corpus, tmp_path):
  with Together(corpus, tmp_path / 'run', 2, [(), None], come=2) as run:
    ((code, _, err),) = run.end()
  assert code == 1
  assert re.fullmatch(
    r'moe-train: process 0 has waited 2 s at localhost:\d+ for all to come\n',
    err,
  )


@pytest.mark.parametrize(
  'said, here, told',
  [
    ([['', 'a'], ['', 'a']], '', ''),
    ([['', 'a'], ['', 'b']], '', 'process 1 has another config.*process 0'),
    ([['', ''], ['x=1', '']], '', 'process 1: x=1'),
    ([['', 'a'], ['x=1', '']], '', 'process 1: x=1'),
    ([['x=2', ''], ['x=1', '']], 'x=2', 'x=2'),
  ],
)
def test_they_agree(monkeypatch, said, here, told):
  texts = [json.dumps(one) for one in said]
  monkeypatch.setattr(distributed, 'gather', lambda text: texts)
  assert re.fullmatch(told, distributed.agree(here, 'a'))


def test_processes_have_an_identity_but_not_of_their_caches(corpus, tmp_path):
  def identity(**changes):
    c = small_config(corpus, **changes)
    return jobs.prepare(c, str(tmp_path)).identity

  assert identity() == identity(data__cache_dir=str(tmp_path))
  assert identity() != identity(eval_every=2)
