"""The benches run, say what is wrong in a line, and write what they print."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pallas_kernels.tools import bench

ROOT = pathlib.Path(__file__).parents[2]

# As `python -m MODULE ARGS` for each list of arguments, but that what MODULE
# imports is imported once: each command is a fork of this process, and what
# Python does at its end, which takes most of a short command, is left out.
FORKS = """
import importlib, json, os, runpy, sys
module, imports, commands = json.loads(sys.argv[1])
for name in imports:
  importlib.import_module(name)
for i, args in enumerate(commands):
  child = os.fork()
  if not child:
    for fd, name in (1, 'stdout'), (2, 'stderr'):
      os.dup2(os.open(f'{i}.{name}', os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = [module, *args]
    status = 0
    try:
      runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as error:
      status = error.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  _, status = os.waitpid(child, 0)
  print(os.waitstatus_to_exitcode(status))
"""


def commands(folder, module, imports, *commands):
  """[(exit status, stdout, stderr)] of commands of a module, one by one."""
  folder.mkdir()
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  done = subprocess.run(
    [sys.executable, '-c', FORKS, json.dumps([module, imports, commands])],
    env=os.environ | {'PYTHONPATH': str(ROOT)} | cache,
    cwd=folder,
    capture_output=True,
    text=True,
    check=True,
  )
  text = lambda i, name: (folder / f'{i}.{name}').read_text()
  return [
    (int(line), text(i, 'stdout'), text(i, 'stderr'))
    for i, line in enumerate(done.stdout.splitlines())
  ]


def refuses(found, said):
  """Whether each command said what it should, in a line, and no more."""
  for (status, _, error), expected in zip(found, said, strict=True):
    assert status == 2, error
    assert expected in error and len(error.splitlines()) == 1


BAD = {
  '--shape=Z': "shape 'Z' is not MxAxBxE",
  '--groups=some': '--groups=some; there are even, zipf',
  '--impl=cuda': 'pallas_kernels has no cuda.gmm',
  '--impl=tpu': '--impl=tpu --shape=A',
  '--rounds=0': 'rounds',
  '--rivals=torch': 'in bfloat16 on Hopper GPUs, not in float32 on cpu',
}


def test_a_small_bench_and_bad_flags_get_one_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  small = '--shape=even,8x4x2x3', '--groups=zipf', '--rounds=1'
  (status, output, error), *refused = commands(
    *(tmp_path / 'here', 'pallas_kernels.tools.bench'),
    [
      'pallas_kernels.tools.hopper',
      'pallas_kernels.tools.command',
      'absl.logging',
    ],
    *([*small, f'--json={path}'], *([flag] for flag in BAD)),
  )
  refuses(refused, BAD.values())
  assert status == 0, error
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  found = {(r['shape'], r['groups'], r['pass'], r['candidate']) for r in rows}
  for pass_ in 'fwd', 'dlhs', 'drhs':
    for candidate in 'dense', 'cpu', 'cpu/one_group', 'ragged_dot', 'batched':
      assert ('even', 'own', pass_, candidate) in found
    # 8 rows are no even groups of 3.
    assert ('8x4x2x3', 'zipf', pass_, 'cpu') in found
    assert ('8x4x2x3', 'zipf', pass_, 'batched') not in found
  assert all(r['ratio'] == 1 for r in rows if r['candidate'] == 'dense')
  assert all(r['seconds'] > 0 and r['platform'] == 'cpu' for r in rows)
  assert len(output.splitlines()) == 3 + 2 * 3 + 1  # head, rows, a note


def test_ratios_are_of_the_same_round():
  found = bench.summary([2.0, 30.0, 2.0], [1.0, 10.0, 1.0])
  assert found['ratio'] == 2 and found['rounds'] == 3
  assert found['ratio_of_minima'] == 2
  assert bench.summary([6.0], [1.0, 3.0, 2.0])['ratio'] == 3


def test_impostors_compute_the_same():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(6, 4)), rng.normal(size=(3, 4, 5))
  y = np.concatenate([x[2 * e : 2 * e + 2] @ w[e] for e in range(3)])
  np.testing.assert_allclose(bench.batched(x, w, None), y, rtol=1e-5)


def test_a_rival_that_answers_otherwise_is_no_rival():
  same = lambda: np.ones((3, 2))
  other = lambda: np.full((3, 2), 1.02)
  calls = {'gpu': same, 'torch': same, 'mgpu': other}
  bench._agree(calls, ['gpu', 'torch'])
  with pytest.raises(ValueError, match=r'mgpu differs from gpu by 0\.02'):
    bench._agree(calls, ['gpu', 'mgpu'])


@pytest.mark.skipif(
  importlib.util.find_spec('torch') is not None,
  reason='says what to do where torch is missing: it is installed',
)
def test_speed_names_the_extra_that_it_needs():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.benches.speed'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "pip install -e '.[torch]'" in done.stderr
