"""The kernels for Hopper under jax's GPU interpreter, and what they refuse.

The interpreter simulates a GPU's memories, barriers and asynchronous copies,
tells of races and fills what is not initialised with NaN; it came with jax
0.12. On a Hopper they run on that instead, where nothing looks for races:
`JAX_PLATFORMS=cuda pytest -n 0 tests/kernels/gmm_gpu_test.py`. What the
compiler says of the kernels is in aot_gpu_test.py.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import ops
from pallas_kernels import gpu
from tests.kernels import gmm_test

HERE = ops._hopper()
run = pytest.mark.skipif(
  not HERE and not hasattr(plgpu, 'InterpretGPUParams'),
  reason='the GPU interpreter came with jax 0.12',
)
interpreted = pytest.mark.skipif(
  HERE or not hasattr(plgpu, 'InterpretGPUParams'),
  reason='the GPU interpreter came with jax 0.12, for where no GPU is',
)

# name: ((M, A, B), groups). A tile is 128 rows by up to 256 columns, a step 64
# deep; rows are loaded from multiples of 8. One program multiplies all groups.
CASES = {
  # Rows that are padded, and blocks that reach past the columns.
  'wide': (
    (267, 64, 320),
    [
      (100, 0, 131, 9, 0, 27),  # ends within blocks
      (0, 3, 1, 2, 7, 5),  # many of less than eight
      (50, 0, 199, 0, 11, 0),  # the sum is below M
    ],
  ),
  # More steps than stages, and experts of which half a block is left.
  'deep': ((392, 448, 64), [(3, 349, 40)]),
  # Fewer rows than a tile has.
  'one_row': ((1, 128, 64), [(0, 1, 0), (0, 0, 0)]),
}


def draw(shape, group):
  cases = {'this': (*shape, group)}
  return gmm_test.draw('this', 'bfloat16', cases)


def kernel(sms=2):
  if HERE:
    return gpu.gmm
  # The interpreter imports it, and then jax would trace all programs again.
  importlib.import_module('jax.experimental.pallas.tpu')
  params = plgpu.InterpretGPUParams(
    detect_races=True, uninitialized_memory='nan'
  )
  return functools.partial(gpu.gmm, sms=sms, interpret=params)


def check(got, operands):
  gmm_test.check_all(got, operands, 1e-2)


@run
@pytest.mark.parametrize('name', CASES)
def test_values_gradients_and_no_race(name):
  """NaN past the groups, and in all memory that is not initialised."""
  shape, groups = CASES[name]
  step = jax.jit(functools.partial(gmm_test.vjp, gmm=kernel()))
  for group in groups:
    operands = draw(shape, group)
    check(step(*operands), operands)
  assert step._cache_size() == 1


@interpreted
def test_a_load_that_does_not_wait_is_a_race(monkeypatch):
  """Which the interpreter tells. To it a product is done at once."""
  fill = gpu._Ring.fill

  def eager(ring, seq, *copies):
    fill(ring, jax.lax.rem(seq, ring.stages), *copies)
    return seq + 1

  monkeypatch.setattr(gpu._Ring, 'fill', eager)
  x, w, _, group = draw((104, 384, 64), (3, 90))
  with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
    jax.block_until_ready(jax.jit(kernel(1))(x, w, group))
  module = 'jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call'
  importlib.import_module(module).reset_gpu_interpret_mode_state()


@run
def test_vmap_of_narrow_blocks_in_bands_and_few_stages():
  tile = gpu.Tile(rows=128, cols=64, depth=64, stages=2, band=2)
  x, w, dy, group = draw((139, 128, 192), (49, 0, 90))
  two = [np.stack([a, a[::-1]]) for a in (x, dy, group)]
  gmm = functools.partial(kernel(3), tiles=gpu.Tiles(tile, tile, tile))
  one = lambda x, dy, group: gmm_test.vjp(x, w, dy, group, gmm=gmm)
  got = jax.jit(jax.vmap(one))(*two)
  for i in range(2):
    check([a[i] for a in got], (two[0][i], w, two[1][i], two[2][i]))


@pytest.mark.parametrize('E', [1, 6, 19])
def test_visits_hold_every_row_once(E):
  rng = np.random.default_rng(E)
  rows, M = 128, 150 * E
  of = jax.jit(functools.partial(gpu.visits, rows=rows, M=M))
  for spare in 0, 1, *rng.integers(0, 50, 8):
    share_E = rng.dirichlet(np.ones(E)) * rng.integers(0, 2, E)
    group_sizes_E = np.int32(share_E / max(share_E.sum(), 1e-9) * (M - spare))
    visits = jax.device_get(of(group_sizes_E))
    n = int(visits.count[0])
    assert n <= len(visits.expert_V)
    owner_M = np.full(M, -1)
    for e, start, low, high in np.stack(visits[1:], 1)[:n]:
      assert start % 8 == 0 and 0 <= low < high <= rows
      own = slice(start + low, start + high)
      assert (owner_M[own] == -1).all()
      owner_M[own] = e
    end = group_sizes_E.sum()
    assert (
      owner_M[:end].tolist() == np.repeat(np.arange(E), group_sizes_E).tolist()
    )
    assert (owner_M[end:] == -1).all()


@jax.jit
def _in_bands(positions, length, blocks, band):
  place = lambda position: gpu.in_bands(position, length, blocks, band)
  return jax.vmap(place)(positions)


@pytest.mark.parametrize('blocks,band', [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_bands_cover_every_block_once(blocks, band):
  length, positions = 11, np.arange(77, dtype=np.int32)
  found = _in_bands(positions, *map(np.int32, (length, blocks, band)))
  j, v = (a[: blocks * length] for a in jax.device_get(found))
  assert len(set(zip(j.tolist(), v.tolist(), strict=True))) == len(j)
  assert int(j.max()) < blocks and int(v.max()) < length
  # A band is left only when all of its places are done.
  assert (np.diff(j // band) >= 0).all()


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
  x, w, _, group = draw((96, 64, 128), (30, 0, 40))
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
