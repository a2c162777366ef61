"""What is the TPU kernel's own: its tiles, and its use of a TPU's memories."""

import functools
import importlib

import gmm_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiling, tpu
from pallas_kernels.shapes import CASES


def tiles_of(name, rows, step, run=None):
  """Tiles of a few rows, whole matrices, and at most `run` columns at once."""
  _, A, B, _ = CASES[name]
  limit = 1 << 25
  return tiling.Tiles(
    fwd=tiling.Tile(rows, A, B, run or B, step, limit),
    dlhs=tiling.Tile(rows, B, A, run or A, step, limit),
    drhs=tiling.Tile(rows, A, B, run or A, step, limit),
  )


def check(name, tiles, interpret=True, dtype='float32'):
  x, w, dy, group = gmm_test.draw(name, dtype)
  gmm = functools.partial(tpu.gmm, tiles=tiles, interpret=interpret)
  got = jax.jit(functools.partial(gmm_test.vjp, gmm=gmm))(x, w, dy, group)
  want = gmm_test.oracle(x, w, dy, group)
  tolerance = gmm_test.TOLERANCE[dtype]
  y, dx, dw = jax.block_until_ready(got)
  gmm_test.check(gmm_test.by_expert(y, group), want[0], tolerance)
  gmm_test.check(gmm_test.by_expert(dx, group), want[1], tolerance)
  gmm_test.check(dw, want[2], tolerance)


# (name, rows of a tile, rows of its smallest window)
ROWS = [(name, 48, 48) for name in CASES]
ROWS += [('skewed', 16, 16), ('odd_rows', 128, 32)]
ROWS += [('large_tiles', 512, 64), ('large_tiles', 1024, 64)]


@pytest.mark.parametrize('name,rows,step', ROWS)
def test_tiles_that_experts_share(name, rows, step):
  check(name, tiles_of(name, rows, step))


@pytest.mark.parametrize('name', ['skewed', 'sum_below_M'])
def test_runs_that_are_part_of_a_block(name):
  check(name, tiles_of(name, 64, 16, run=8))


def test_blocks_that_reach_past_the_matrices():
  _, A, B, _ = CASES['odd_rows']
  assert A % 16 and B % 16
  tile = functools.partial(
    tiling.Tile, rows=64, run=16, step=16, vmem_bytes=1 << 25
  )
  tiles = tiling.Tiles(
    fwd=tile(depth=A, cols=16),
    dlhs=tile(depth=B, cols=16),
    drhs=tile(depth=16, cols=16),
  )
  check('odd_rows', tiles)


# The interpreter that simulates a TPU's memories takes seconds a case.
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['skewed', 'empty_experts', 'sum_below_M'])
def test_no_race_and_no_uninitialised_memory(name, dtype):
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )
  check(name, tiles_of(name, 64, 16), interpret, dtype=dtype)
  assert not _races()


# Of the contracted axis: as many words as a memory tile has rows, and fewer.
@pytest.mark.parametrize('A', [512, 2048])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('transpose', [False, True])
def test_gathered_rows_are_copied_ones(transpose, dtype, A):
  """Tiles that experts share, experts without rows, ids that name no token."""
  rng = np.random.default_rng(0)
  T, B, M, group = 50, 40, 130, (10, 0, 37, 60, 0)
  token_M = rng.integers(0, T, M).astype(np.int32)
  token_M[sum(group) :] = T
  x_TxA = jnp.asarray(rng.normal(size=(T, A)), dtype)
  w_ExAxB = jnp.asarray(rng.normal(size=(len(group), A, B)), dtype)
  group_E = jnp.asarray(group, jnp.int32)
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )

  @jax.jit
  def run(x_TxA, token_M, w_ExAxB, group_E):
    w = w_ExAxB.swapaxes(1, 2) if transpose else w_ExAxB
    return tpu.gathered(
      *(x_TxA, token_M, w, group_E, tiling.Tile(32, A, B, B, 16, 1 << 25)),
      transpose=transpose,
      interpret=interpret,
    )

  y_MxB = jax.block_until_ready(run(x_TxA, token_M, w_ExAxB, group_E))
  x_MxA = np.asarray(x_TxA)[np.minimum(token_M, T - 1)]
  want, _, _ = gmm_test.oracle(x_MxA, w_ExAxB, np.zeros((M, B)), group)
  got = gmm_test.by_expert(y_MxB, group_E)
  gmm_test.check(got, want, gmm_test.TOLERANCE[dtype])
  assert not _races()


def _races():
  """What the last kernel under race detection found."""
  module = importlib.import_module(
    'jax._src.pallas.mosaic.interpret.interpret_pallas_call'
  )
  return module.races.races_found


def test_visits_follow_the_rows():
  # Tiles of 16: expert 0 has tile 0, 2 has the rest of it and tiles 1 and 2.
  group_E = jnp.array([10, 0, 30], jnp.int32)
  got = tpu._visits(group_E, R=16, M=48, empty=1)
  assert got.count == 5 and len(got.expert_V) == 3 + 3
  assert got.expert_V[:5].tolist() == [0, 1, 2, 2, 2]
  assert got.tile_V[:5].tolist() == [0, 0, 0, 1, 2]
  assert got.edge_E.tolist() == [0, 10, 10, 40]
  assert tpu._visits(group_E, R=16, M=48, empty=0).count == 4


@pytest.mark.parametrize('seed', range(20))
def test_visits_agree_with_the_model_of_them(seed):
  rng = np.random.default_rng(seed)
  E, rows = rng.integers(1, 20), 16 * rng.integers(1, 9)
  group_E = rng.integers(0, 100, E) * rng.integers(0, 2, E)
  M = int(group_E.sum() + rng.integers(1, 50))
  expert_V, tile_V, _ = tiling.visit(
    group_E, tiling.Tile(rows, 1, 1, 1, rows, 0)
  )
  got = tpu._visits(jnp.asarray(group_E, jnp.int32), rows, M, empty=0)
  n = int(got.count)
  assert n == len(expert_V) <= len(got.expert_V)
  assert got.expert_V[:n].tolist() == expert_V.tolist()
  assert got.tile_V[:n].tolist() == tile_V.tolist()
