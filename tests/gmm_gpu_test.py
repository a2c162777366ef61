"""The kernels for Hopper under jax's GPU interpreter, and what they refuse.

The interpreter simulates a GPU's memories, barriers and asynchronous copies,
tells of races and fills what is not initialised with NaN; it came with jax
0.12. On a Hopper they run on that instead, where nothing looks for races:
`JAX_PLATFORMS=cuda pytest -n 0 tests/gmm_gpu_test.py`. What the compiler says
of the kernels is in aot_gpu_test.py.
"""

import functools
import importlib

import gmm_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import ops
from pallas_kernels import gpu

HERE = ops._hopper()
run = pytest.mark.skipif(
  not HERE and not hasattr(plgpu, 'InterpretGPUParams'),
  reason='the GPU interpreter came with jax 0.12',
)
interpreted = pytest.mark.skipif(
  HERE or not hasattr(plgpu, 'InterpretGPUParams'),
  reason='the GPU interpreter came with jax 0.12, for where no GPU is',
)

# name: (M, A, B, group_E). A tile is 128 rows by up to 256 columns, a step 64
# deep; rows are loaded from multiples of 8.
CASES = {
  'ends_within_blocks': (400, 128, 320, (100, 131, 9, 150)),
  'odd_rows': (331, 64, 128, (100, 131, 100)),
  'empty_experts': (200, 128, 64, (0, 90, 0, 0, 110, 0)),
  'many_of_less_than_eight': (64, 64, 64, tuple(e % 4 for e in range(20))),
  'sum_below_M': (304, 64, 256, (50, 0, 99, 40)),
  'no_rows_used': (24, 64, 64, (0, 0)),
  'one_row': (1, 128, 64, (0, 1, 0)),
  'more_steps_than_stages': (520, 384, 64, (3, 450, 60)),
}


def draw(name):
  return gmm_test.draw(name, 'bfloat16', CASES)


def kernel(sms=2, races=True):
  if HERE:
    return gpu.gmm
  params = plgpu.InterpretGPUParams(
    detect_races=races, uninitialized_memory='nan'
  )
  return functools.partial(gpu.gmm, sms=sms, interpret=params)


def check(got, operands):
  y, dx, dw = jax.block_until_ready(got)
  x, w, dy, group = operands
  for one, like in (y, dy), (dx, x), (dw, w):
    assert one.shape == like.shape and one.dtype == like.dtype
  want = gmm_test.oracle(x, w, dy, group)
  gmm_test.check(gmm_test.by_expert(y, group), want[0], 1e-2)
  gmm_test.check(gmm_test.by_expert(dx, group), want[1], 1e-2)
  gmm_test.check(dw, want[2], 1e-2)


@run
@pytest.mark.parametrize('name', CASES)
def test_values_gradients_and_no_race(name):
  """NaN past the groups, and in all memory that is not initialised."""
  operands = draw(name)
  step = jax.jit(functools.partial(gmm_test.vjp, gmm=kernel()))
  check(step(*operands), operands)


@run
def test_bands_of_narrow_blocks_and_few_stages():
  tile = gpu.Tile(rows=128, cols=64, depth=64, stages=2, band=2)
  operands = draw('ends_within_blocks')
  gmm = functools.partial(kernel(3), tiles=gpu.Tiles(tile, tile, tile))
  check(jax.jit(functools.partial(gmm_test.vjp, gmm=gmm))(*operands), operands)


@run
def test_group_sizes_are_dynamic():
  x, w, dy, group = draw('odd_rows')
  step = jax.jit(functools.partial(gmm_test.vjp, gmm=kernel(races=False)))
  for sizes in (group, group[::-1], group // 2, jnp.zeros_like(group)):
    check(step(x, w, dy, sizes), (x, w, dy, sizes))
  assert step._cache_size() == 1


@interpreted
def test_a_load_that_does_not_wait_is_a_race(monkeypatch):
  """Which the interpreter tells. To it a product is done at once."""
  fill = gpu._Ring.fill

  def eager(ring, seq, *copies):
    fill(ring, jax.lax.rem(seq, ring.stages), *copies)
    return seq + 1

  monkeypatch.setattr(gpu._Ring, 'fill', eager)
  x, w, _, group = draw('more_steps_than_stages')
  with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
    jax.block_until_ready(jax.jit(kernel(1))(x, w, group))
  module = 'jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call'
  importlib.import_module(module).reset_gpu_interpret_mode_state()


@run
def test_vmap_runs_one_after_the_other():
  x, w, dy, group = draw('odd_rows')
  two = [jnp.stack([a, a[::-1]]) for a in (x, dy, group)]
  gmm = kernel(races=False)
  one = lambda x, dy, group: gmm_test.vjp(x, w, dy, group, gmm=gmm)
  got = jax.jit(jax.vmap(one))(*two)
  for i in range(2):
    check([a[i] for a in got], (two[0][i], w, two[1][i], two[2][i]))


@pytest.mark.parametrize('seed', range(20))
def test_visits_hold_every_row_once(seed):
  rng = np.random.default_rng(seed)
  E, rows = rng.integers(1, 20), 128
  group_E = rng.integers(0, 300, E) * rng.integers(0, 2, E)
  M = int(group_E.sum() + rng.integers(1, 50))
  visits = gpu.visits(jnp.asarray(group_E, jnp.int32), rows, M)
  n = int(visits.count[0])
  assert n <= len(visits.expert_V)
  owner_M = np.full(M, -1)
  for e, start, low, high in np.stack(visits[1:], 1)[:n]:
    assert start % 8 == 0 and 0 <= low < high <= rows
    own = slice(start + low, start + high)
    assert (owner_M[own] == -1).all()
    owner_M[own] = e
  end = group_E.sum()
  assert owner_M[:end].tolist() == np.repeat(np.arange(E), group_E).tolist()
  assert (owner_M[end:] == -1).all()


@pytest.mark.parametrize('blocks,band', [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_bands_cover_every_block_once(blocks, band):
  length = 11
  positions = jnp.arange(blocks * length, dtype=jnp.int32)
  place = functools.partial(
    gpu.in_bands, length=length, blocks=blocks, band=band
  )
  j, v = jax.vmap(place)(positions)
  assert len(set(zip(j.tolist(), v.tolist(), strict=True))) == len(positions)
  assert int(j.max()) < blocks and int(v.max()) < length
  # A band is left only when all of its places are done.
  assert (np.diff(np.asarray(j) // band) >= 0).all()


def test_lowers_without_a_gpu():
  """Also where jax has no interpreter for it."""
  args = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((400, 128), jnp.bfloat16),
      ((3, 128, 320), jnp.bfloat16),
      ((400, 320), jnp.bfloat16),
      ((3,), jnp.int32),
    )
  ]
  traced = jax.jit(functools.partial(gmm_test.vjp, gmm=gpu.gmm)).trace(*args)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('mosaic_gpu') >= 3


def test_refuses_what_it_does_not_support():
  x, w, _, group = draw('odd_rows')
  with pytest.raises(ValueError, match='gmm wants'):
    gpu.gmm(x[:, 1:], w, group)
  wide = [a.astype(jnp.float32) for a in (x, w)]
  with pytest.raises(NotImplementedError, match=r"'bfloat16'.*not float32"):
    gpu.gmm(*wide, group)
  with pytest.raises(NotImplementedError, match='of 64, not 48 x 128'):
    gpu.gmm(x[:, :48], w[:, :48], group)


def test_the_doorway_refuses_it_off_hopper(monkeypatch):
  if not HERE:
    with pytest.raises(ValueError, match=r"on cpu, .*'tokamax' and 'xla'"):
      ops.choose_gmm('gpu')

  class Device:
    device_kind = 'NVIDIA A100'
    compute_capability = '8.0'

  monkeypatch.setattr(ops.jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(ops.jax, 'devices', lambda: [Device])
  with pytest.raises(ValueError, match=r"on NVIDIA A100, .*'tokamax' and"):
    ops.choose_gmm('gpu')
  assert ops.choose_gmm(None) == 'xla'
  Device.compute_capability = '9.0'
  assert ops.choose_gmm('gpu') == 'gpu'
  assert ops.choose_gmm(None, 'bfloat16', 128, 64) == 'gpu'
  # What it cannot multiply goes to another, and the run says what that costs.
  assert ops.choose_gmm(None, 'float32', 128, 64) == 'xla'
  assert ops.choose_gmm(None, 'bfloat16', 128, 96) == 'xla'
  assert 'every expert' in ops.told('xla') and ops.told('gpu') == 'gpu'


def test_what_it_cannot_multiply_is_told_before_compiling():
  ops.check('gpu', 'bfloat16', 128, 64)
  ops.check('xla', 'float32', 7)
  with pytest.raises(ValueError, match=r"not float32 of 128 x 64; .*'tokamax'"):
    ops.check('gpu', 'float32', 128, 64)
  with pytest.raises(ValueError, match='not bfloat16 of 128 x 96'):
    ops.check('gpu', 'bfloat16', 128, 96)
