"""The benches run, say what is wrong in a line, and write what they print."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pallas_kernels import bench


def run(module, *args):
  return subprocess.run(
    [sys.executable, '-m', module, *args],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_small_bench(tmp_path):
  path = tmp_path / 'rows.jsonl'
  done = run(
    'pallas_kernels.bench',
    '--shape=even,8x4x2x3',
    '--groups=zipf',
    '--rounds=1',
    f'--json={path}',
  )
  assert done.returncode == 0, done.stderr
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
  assert len(done.stdout.splitlines()) == 3 + 2 * 3 + 1  # head, rows, a note


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


@pytest.mark.parametrize(
  'flag,said',
  [
    ('--shape=Z', "shape 'Z' is not MxAxBxE"),
    ('--groups=some', '--groups=some; there are even, zipf'),
    ('--impl=cuda', 'pallas_kernels has no cuda.gmm'),
    ('--impl=tpu', '--impl=tpu --shape=A'),
    ('--rounds=0', 'rounds'),
    ('--rivals=torch', 'in bfloat16 on Hopper GPUs, not in float32 on cpu'),
  ],
)
def test_bad_flags_get_one_line(flag, said):
  done = run('pallas_kernels.bench', flag)
  assert done.returncode == 2
  assert said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(
  importlib.util.find_spec('torch') is not None,
  reason='says what to do where torch is missing: it is installed',
)
def test_speed_names_the_extra_that_it_needs():
  done = run('experiments.speed')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "pip install -e '.[torch]'" in done.stderr
