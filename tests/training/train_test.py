"""Whole runs of a very small model, in this process."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from moe_jax.training import checkpoint, jobs, lock, loop, train_step
from tests.helpers.small import lines_of, small_config, without_clocks

pytestmark = pytest.mark.usefixtures('traced_once')


def go(c, workdir):
  return loop.run(jobs.prepare(c, str(workdir)))


def files_of(workdir):
  return {
    p: (p.read_bytes(), p.stat().st_mtime_ns)
    for p in sorted(workdir.rglob('*'))
    if p.is_file()
  }


@pytest.fixture(scope='session')
def whole(corpus, tmp_path_factory):
  """An uninterrupted run with every period on, and its summary."""
  workdir = tmp_path_factory.mktemp('whole')
  periods = {'checkpoint_every': 2, 'eval_every': 3}
  c = small_config(corpus, steps=8, optimizer__name='muon', **periods)
  return c, workdir, go(c, workdir)


def test_it_learns_and_says_so(whole):
  c, workdir, summary = whole
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert summary['eval_loss'] < summary['initial_loss'] - 0.3
  assert abs(summary['initial_loss'] - np.log(257)) < 0.3
  assert summary['steps'] == 8
  assert summary['tokens'] == 8 * c.batch_size * c.seq_len
  assert summary['implementation'] == {'gmm': 'cpu', 'strategy': 'local'}
  # Bytes are tokens here, but for the separators that stand for no byte.
  bits = summary['eval_loss'] / np.log(2)
  assert bits <= summary['eval_bits_per_byte'] < 1.02 * bits
  for key in ('tokens_per_second', 'wall_seconds', 'flops_per_token'):
    assert summary[key] > 0
  assert (workdir / 'report.html').stat().st_size > 10_000


def test_metrics_have_each_step_once_and_evaluations(whole):
  _, workdir, summary = whole
  lines = lines_of(workdir)
  training = [line for line in lines if 'loss' in line]
  assert [line['step'] for line in training] == list(range(1, 9))
  evaluations = [line for line in lines if 'eval_loss' in line]
  assert [line['step'] for line in evaluations] == [3, 6, 8]
  assert evaluations[-1]['eval_loss'] == pytest.approx(summary['eval_loss'])
  load = np.array(training[0]['load'])
  assert load.shape == (2, 4)
  np.testing.assert_allclose(load.sum(axis=1), 1, atol=1e-4)
  assert training[0]['dropped'] == [0.0, 0.0]
  assert all(1 <= b < 3 for b in training[0]['balance'])


def test_the_environment_does_not_change_the_precision(whole, tmp_path):
  """A run under JAX_ENABLE_X64 is the same, and is read without it."""
  c, workdir, _ = whole
  with jax.enable_x64(True):
    go(c, tmp_path)
  assert without_clocks(lines_of(tmp_path)) == without_clocks(lines_of(workdir))
  dtypes = lambda place: {
    name: np.dtype(a.dtype) for name, a in checkpoint.shapes(place, 8).items()
  }
  assert dtypes(tmp_path) == dtypes(workdir)


def test_seeds_share_their_programs(corpus, tmp_path, monkeypatch):
  """So that a study of many seeds compiles an arm once."""
  texts, draws = set(), set()
  jit = jax.jit

  def jit_and_keep(f, **options):
    jitted = jit(f, **options)

    def call(*args):
      texts.add(jitted.lower(*args).as_text())
      return jitted(*args)

    return call

  for seed in 0, 1:
    c = small_config(corpus, seed=seed, model__dropout=0.1)
    job = jobs.prepare(c, str(tmp_path))
    state = train_step.abstract_state(job)
    batch = next(job.train_batches())
    step, evaluate = train_step.make_step(job), train_step.make_eval(job)
    texts.add(step.lower(state, batch).as_text())
    texts.add(evaluate.lower(state, batch, np.int32(0)).as_text())
    with monkeypatch.context() as patch:
      patch.setattr(jax, 'jit', jit_and_keep)
      first = train_step.initial_state(job)
    _, found = step(first, job.put(batch))
    draws.add(float(found['loss']))
  assert len(texts) == 3 and len(draws) == 2


def test_a_finished_run_changes_no_file(whole):
  c, workdir, _ = whole
  before = files_of(workdir)
  assert jobs.prepare(c, str(workdir)) is None
  assert files_of(workdir) == before


# In batches: in step 2, before there is a checkpoint; in the first evaluation,
# after step 3; in step 6, after a checkpoint and an evaluation.
@pytest.mark.parametrize('dies_at', [2, 7, 24])
def test_a_killed_run_continues_bit_for_bit(
  whole, tmp_path, monkeypatch, dies_at
):
  c, workdir, summary = whole
  put, count = jobs.Job.put, []

  def put_then_die(job, batch):
    count.append(1)
    if len(count) == dies_at:
      raise KeyboardInterrupt
    return put(job, batch)

  monkeypatch.setattr(jobs.Job, 'put', put_then_die)
  with pytest.raises(KeyboardInterrupt):
    go(c, tmp_path)
  monkeypatch.undo()
  assert not (tmp_path / 'summary.json').exists()
  died_after = {2: 1, 7: 3, 24: 5}[dies_at]
  assert lines_of(tmp_path)[-1]['step'] == died_after
  again = go(c, tmp_path)
  assert without_clocks(lines_of(tmp_path)) == without_clocks(lines_of(workdir))
  for key in ('initial_loss', 'eval_loss', 'eval_bits_per_byte'):
    assert again[key] == summary[key]


def test_an_interrupted_run_first_ends_its_save(whole, tmp_path, monkeypatch):
  """Else a second run in this process would meet the threads of the first."""
  c, workdir, _ = whole
  write = checkpoint.Checkpoints._write_digests

  def interrupted(*_):
    raise KeyboardInterrupt

  def write_late(saved):
    time.sleep(1)
    write(saved)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checkpoint.Checkpoints, '_write_digests', write_late)
    patch.setattr(train_step, 'evaluate', interrupted)  # step 3; step 2 saves
    go(c, tmp_path)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']
  go(c, tmp_path)
  assert without_clocks(lines_of(tmp_path)) == without_clocks(lines_of(workdir))


# As above: in step 2, in the first evaluation, in the last one.
@pytest.mark.parametrize('comes_at', [2, 7, 50])
def test_sigterm_saves_and_leaves(whole, tmp_path, monkeypatch, comes_at):
  c, workdir, summary = whole
  put, count = jobs.Job.put, []

  def put_and_hear(job, batch):
    count.append(1)
    if len(count) == comes_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return put(job, batch)

  with monkeypatch.context() as patch:
    patch.setattr(jobs.Job, 'put', put_and_hear)
    with pytest.raises(SystemExit) as left:
      go(c, tmp_path)
  assert left.value.code == 143 and not (tmp_path / 'summary.json').exists()
  done = lines_of(tmp_path)[-1]['step']
  assert done == {2: 2, 7: 3, 50: 8}[comes_at]
  assert (tmp_path / 'checkpoints' / str(done)).is_dir()
  again = go(c, tmp_path)
  assert without_clocks(lines_of(tmp_path)) == without_clocks(lines_of(workdir))
  for key in ('initial_loss', 'eval_loss', 'eval_bits_per_byte'):
    assert again[key] == summary[key]


def test_an_evaluation_that_was_owed_stands_once(whole, tmp_path, monkeypatch):
  """SIGTERM in it; the next run makes it, and is killed before it saves."""
  c, workdir, _ = whole
  evaluate = train_step.evaluate

  def given_up(*args):
    evaluate(*args)
    os.kill(os.getpid(), signal.SIGTERM)

  def dies(run):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(train_step, 'evaluate', given_up)
    go(c, tmp_path)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop._Run, '_train', dies)
    go(c, tmp_path)
  assert 'eval_loss' in lines_of(tmp_path)[-1]
  go(c, tmp_path)
  assert without_clocks(lines_of(tmp_path)) == without_clocks(lines_of(workdir))


def test_a_second_run_is_refused_at_once(whole, tmp_path, monkeypatch):
  """While one is prepared, and where one came after that."""
  monkeypatch.setattr(lock, 'PATIENCE', 0.0)
  c, _, _ = whole
  job = jobs.prepare(c, str(tmp_path))
  with lock.held(tmp_path):
    before = files_of(tmp_path)
    told = f'^{tmp_path}: another run is at work there'
    with pytest.raises(OSError, match=told) as error:
      jobs.prepare(c, str(tmp_path))
    assert '\n' not in str(error.value)
    with pytest.raises(loop.Stopped, match=told):
      loop.run(job)
    assert files_of(tmp_path) == before
  assert jobs.prepare(c, str(tmp_path)) is not None


def test_another_run_that_came_meanwhile_is_not_continued(whole, tmp_path):
  c, _, _ = whole
  job = jobs.prepare(c, str(tmp_path))
  other = json.dumps({**job.config, 'seed': 7})
  (tmp_path / 'config.json').write_text(other)
  with pytest.raises(loop.Stopped, match=r'another.*seed: 7 -> 0'):
    loop.run(job)
  assert (tmp_path / 'config.json').read_text() == other


def test_another_run_in_the_way_is_named_and_kept(whole, corpus):
  _, workdir, _ = whole
  before = files_of(workdir)
  other = small_config(corpus, steps=8, model__D=32, checkpoint_every=1)
  with pytest.raises(ValueError, match=r'model\.D: 16 -> 32') as error:
    jobs.prepare(other, str(workdir))
  assert 'checkpoint_every' not in str(error.value)
  assert files_of(workdir) == before


def test_another_corpus_is_named(whole, tmp_path):
  c, workdir, _ = whole
  path = tmp_path / 'other.txt'
  path.write_text('other text\n' * 1000)
  changed = c.copy_and_resolve_references()
  changed.steps = 9  # else it is finished, whatever the data
  changed.data.path = str(path)
  with pytest.raises(ValueError, match=r'data\.path'):
    jobs.prepare(changed, str(workdir))


def test_more_steps_continue_a_finished_run(corpus, tmp_path):
  go(small_config(corpus, steps=3), tmp_path)
  summary = go(small_config(corpus, steps=6), tmp_path)
  assert summary['steps'] == 6
  steps = [line['step'] for line in lines_of(tmp_path) if 'loss' in line]
  assert steps == [1, 2, 3, 4, 5, 6]


def test_a_rate_that_more_steps_make_jump_is_told(corpus, tmp_path):
  go(small_config(corpus, steps=6), tmp_path)
  c = small_config(corpus, steps=12)
  (steps, rate) = jobs.prepare(c, str(tmp_path)).changed
  assert steps == 'steps: 6 -> 12'
  # Of 12 steps the seventh is past the middle of a cosine from 3e-3 to 3e-4.
  assert rate == (
    'learning rate of step 7: 0.0003 -> 0.00146, as the schedule is now of 12'
    ' steps'
  )


def test_one_step_and_nothing_logged(corpus, tmp_path):
  summary = go(small_config(corpus, steps=1, log_every=0), tmp_path)
  assert [set(line) for line in lines_of(tmp_path)] == [
    {'step', 'eval_loss', 'eval_bits_per_byte'}
  ]
  assert np.isfinite(summary['initial_loss'])
  assert (tmp_path / 'report.html').exists()


@pytest.mark.parametrize(
  'changes',
  [
    {'model__pattern': 'd'},
    {'model__dtype': 'bfloat16', 'model__remat': True},
    {
      'model__dtype': 'float64',
      'model__router__bias_rate': 0.01,
      'optimizer__schedule': 'wsd',
    },
  ],
  ids=['dense', 'bfloat16', 'float64 and bias'],
)
def test_it_trains(corpus, tmp_path, changes):
  summary = go(small_config(corpus, **changes), tmp_path)
  assert summary['eval_loss'] < summary['initial_loss'] - 0.15


def test_groups_that_no_device_has_whole_are_refused(corpus, tmp_path):
  router = {'name': 'expert_choice', 'k': 2, 'group': 64}
  c = small_config(corpus, model__router=router, mesh__data=8, batch_size=8)
  job = jobs.prepare(c, str(tmp_path))
  with pytest.raises(ValueError, match='8 devices do not divide the 2 tokens'):
    train_step.check(job)
  train_step.check(
    jobs.prepare(
      small_config(corpus, mesh__data=8, batch_size=8), str(tmp_path)
    )
  )


def test_rows_without_a_place_are_counted_and_told(corpus, tmp_path, capsys):
  c = small_config(
    corpus,
    mesh__expert=2,
    parallel={'strategy': 'all_to_all', 'buffer_factor': 0.25},
    steps=3,
    log_every=1,
  )
  loop.run(jobs.prepare(c, str(tmp_path)))
  lines = [line for line in lines_of(tmp_path) if 'overflow' in line]
  assert all(sum(line['overflow']) > 0 for line in lines) and len(lines) == 3
  assert capsys.readouterr().err.count('rows found no place') == 1


def test_a_mesh_uses_the_first_devices(corpus, tmp_path):
  job = jobs.prepare(small_config(corpus, mesh__data=2), str(tmp_path))
  assert list(job.mesh.devices.flat) == jax.devices()[:2]


def test_the_interpreted_tpu_kernel_trains_as_the_cpu_one(corpus, tmp_path):
  losses = {}
  for gmm in 'cpu', 'interpret':
    c = small_config(corpus, steps=3, model__gmm=gmm)
    summary = go(c, tmp_path / gmm)
    assert summary['implementation']['gmm'] == gmm
    lines = [m for m in lines_of(tmp_path / gmm) if 'loss' in m]
    losses[gmm] = [m['loss'] for m in lines] + [summary['eval_loss']]
  assert len(losses['cpu']) >= 4
  np.testing.assert_allclose(losses['interpret'], losses['cpu'], rtol=1e-5)
