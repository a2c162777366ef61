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


# --- a layer's kernels --------------------------------------------------------


def _hidden(gate, up=1.0):
  return jax.nn.silu(gate) * up


def _layer(name, dtype, gated, bias):
  """(x, dy, ws, down, biases, weight_M, group_E); NaN past the groups."""
  M, A, B, group = CASES[name]
  x, up, _, group_E = gmm_test.draw(name, 'float32')
  rng = np.random.default_rng(len(name))
  # Pre-activations of order one, where the activation is no line, or zero.
  ws = [up / jnp.max(abs(up), axis=(1, 2), keepdims=True)]
  ws += [jnp.asarray(rng.normal(size=up.shape), 'float32')] * gated
  x = jnp.where(jnp.isnan(x), x, rng.normal(size=x.shape)) / A**0.5
  biases = [rng.normal(size=(len(group), B)) for _ in ws] if bias else []
  down_ExBxA = rng.normal(size=(len(group), B, A)) * 10.0 ** rng.integers(
    -3, 4, size=(len(group), 1, 1)
  )
  dy_MxA = np.where(np.isnan(x), np.nan, rng.normal(size=(M, A)))
  weight_M = rng.normal(size=M)
  weight_M[::5] = 0.0
  weight_M[sum(group) :] = np.nan
  cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
  arrays = cast((x, dy_MxA, ws, down_ExBxA, biases))
  return *arrays, jnp.asarray(weight_M, jnp.float32), group_E


def _check_layer(name, dtype, gated, bias, rows, step, run, interpret):
  """Every result by expert, against float64 that is dense and dumb."""
  x, dy, ws, down, biases, weight_M, group = _layer(name, dtype, gated, bias)
  _, A, B, _ = CASES[name]
  into = tiling.Tile(rows, A, run or B, run or B, step, 1 << 25)
  dlhs = tiling.Tile(rows, B, A, A, step, 1 << 25)

  @jax.jit
  def run_all(x, dy, ws, down, biases, weight_M, group):
    hidden, pre = tpu.into(
      _hidden, x, ws, group, biases, tile=into, interpret=interpret
    )
    arrays = dy, down, pre, weight_M, group
    d_pre, gated_MxB, d_weight_M = tpu.slope(
      _hidden, *arrays, tile=into, interpret=interpret
    )
    dx = tpu.dlhs(d_pre, ws, group, tile=dlhs, interpret=interpret)
    return hidden, pre, d_pre, gated_MxB, d_weight_M[:, None], dx

  found = jax.block_until_ready(
    run_all(x, dy, ws, down, biases, weight_M, group)
  )
  wide = lambda tree: jax.tree.map(lambda a: np.float64(a), tree)
  x, dy, ws, down, biases, weight_M = wide((x, dy, ws, down, biases, weight_M))
  split = functools.partial(gmm_test.by_expert, group_E=group)
  expected = []
  with jax.enable_x64(True):
    for e, rows_e in enumerate(
      zip(*map(split, (x, dy, weight_M)), strict=True)
    ):
      x_e, dy_e, weight = rows_e[0], rows_e[1], rows_e[2][:, None]
      pre = [x_e @ w[e] for w in ws]
      if biases:
        pre = [a + b[e] for a, b in zip(pre, biases, strict=True)]
      hidden, pull = jax.vjp(_hidden, *map(jnp.asarray, pre))
      dh = dy_e @ down[e].T
      d_pre = pull(jnp.asarray(dh * weight))
      d_weight = np.sum(dh * hidden, axis=1, keepdims=True)
      dx = sum(d @ w[e].T for d, w in zip(d_pre, ws, strict=True))
      one = hidden, pre, d_pre, weight * hidden, d_weight, dx
      expected.append(jax.tree.leaves(jax.tree.map(np.asarray, one)))
  tolerance = gmm_test.TOLERANCE[dtype]
  for i, array in enumerate(jax.tree.leaves(found)):
    want = [one[i] for one in expected]
    gmm_test.check(split(array), want, tolerance)


@pytest.mark.parametrize(
  'name, rows, step, run',
  [
    ('skewed', 48, 48, None),
    ('empty_experts', 64, 16, None),
    ('sum_below_M', 64, 16, 8),
    ('odd_rows', 64, 16, 16),  # blocks that reach past the matrices
    ('one_row', 16, 16, None),
    ('no_rows_used', 16, 16, None),
    ('no_rows', 16, 16, None),
    ('one_hot', 48, 48, None),
    ('narrow', 48, 48, None),
  ],
)
@pytest.mark.parametrize('gated, bias', [(True, True), (False, False)])
def test_a_layer_with_its_activation_inside(name, rows, step, run, gated, bias):
  _check_layer(name, 'float32', gated, bias, rows, step, run, interpret=True)


# Sums over columns lane by lane, of whole lanes and with a block past the end.
@pytest.mark.parametrize('B', [256, 384])
def test_sums_over_columns_are_of_those_that_exist(B, monkeypatch):
  monkeypatch.setitem(CASES, 'wide', (70, 16, B, (30, 0, 33)))
  _check_layer('wide', 'float32', True, False, 32, 16, 256, interpret=True)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['empty_experts', 'sum_below_M'])
def test_a_layer_has_no_race_and_reads_nothing_unwritten(name, dtype):
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )
  _check_layer(name, dtype, True, True, 64, 16, None, interpret)
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
