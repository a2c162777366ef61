"""What is the TPU kernel's own: its tiles, and its use of a TPU's memories."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiling, tpu
from pallas_kernels.shapes import CASES
from tests.kernels import gmm_test


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
  """Values and gradients of all groups that gmm_test has, by one program."""
  gmm = functools.partial(tpu.gmm, tiles=tiles, interpret=interpret)
  step = jax.jit(functools.partial(gmm_test.vjp, gmm=gmm))
  for group_sizes_E in gmm_test.groups(name):
    operands = gmm_test.draw(name, dtype, group_sizes_E=group_sizes_E)
    gmm_test.check_all(step(*operands), operands, gmm_test.TOLERANCE[dtype])


# (name, rows of a tile, rows of its smallest window); gmm_test has all shapes
# with the tiles that are chosen for them.
@pytest.mark.parametrize(
  'name,rows,step',
  [
    ('skewed', 48, 48),
    ('skewed', 16, 16),
    ('odd_rows', 128, 32),
    ('large_tiles', 1024, 64),
  ],
)
def test_tiles_that_experts_share(name, rows, step):
  check(name, tiles_of(name, rows, step))


def test_runs_that_are_part_of_a_block():
  check('skewed', tiles_of('skewed', 64, 16, run=8))


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


# Of six experts three have no rows, and some rows are nobody's. The interpreter
# that simulates a TPU's memories takes seconds a case.
FEW = (0, 57, 0, 40, 3, 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_race_and_no_uninitialised_memory(dtype, monkeypatch):
  monkeypatch.setitem(CASES, 'few', (130, 16, 24, FEW))
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )
  gmm = functools.partial(
    tpu.gmm, tiles=tiles_of('few', 64, 16), interpret=interpret
  )
  operands = gmm_test.draw('few', dtype)
  found = jax.jit(functools.partial(gmm_test.vjp, gmm=gmm))(*operands)
  gmm_test.check_all(found, operands, gmm_test.TOLERANCE[dtype])
  assert not _races()


# Of the contracted axis: as many words as a memory tile has rows, and fewer.
@pytest.mark.parametrize(
  'transpose, dtype, A',
  [
    (False, 'float32', 512),
    (True, 'float32', 2048),
    (True, 'bfloat16', 512),
    (False, 'bfloat16', 2048),
  ],
)
def test_gathered_rows_are_copied_ones(transpose, dtype, A):
  """Tiles that experts share, experts without rows, ids that name no token."""
  rng = np.random.default_rng(0)
  T, B, M, group = 50, 40, 130, (10, 0, 37, 60, 0)
  token_M = rng.integers(0, T, M).astype(np.int32)
  token_M[sum(group) :] = T
  x_TxA = rng.normal(size=(T, A)).astype(jnp.dtype(dtype))
  w_ExAxB = rng.normal(size=(len(group), A, B)).astype(jnp.dtype(dtype))
  group_sizes_E = np.int32(group)
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )

  @jax.jit
  def run(x_TxA, token_M, w_ExAxB, group_sizes_E):
    w = w_ExAxB.swapaxes(1, 2) if transpose else w_ExAxB
    return tpu.gathered(
      *(
        x_TxA,
        token_M,
        w,
        group_sizes_E,
        tiling.Tile(32, A, B, B, 16, 1 << 25),
      ),
      transpose=transpose,
      interpret=interpret,
    )

  y_MxB = jax.block_until_ready(run(x_TxA, token_M, w_ExAxB, group_sizes_E))
  x_MxA = x_TxA[np.minimum(token_M, T - 1)]
  want, _, _ = gmm_test.oracle(x_MxA, w_ExAxB, np.zeros((M, B)), group)
  got = gmm_test.by_expert(y_MxB, group_sizes_E)
  gmm_test.check(got, want, gmm_test.TOLERANCE[dtype])
  assert not _races()


# --- a layer's kernels --------------------------------------------------------


def _hidden(gate, up=1.0):
  return jax.nn.silu(gate) * up


def _hidden_and_slopes(gate, up=None):
  """The same in NumPy, and its derivatives."""
  sigmoid = 1 / (1 + np.exp(-gate))
  d_silu = sigmoid * (1 + gate * (1 - sigmoid))
  if up is None:
    return gate * sigmoid, [d_silu]
  return gate * sigmoid * up, [d_silu * up, gate * sigmoid]


def _layer(name, dtype, gated, bias, group_sizes_E):
  """(x, dy, ws, down, biases, gate_M, group_sizes_E); NaN past the groups."""
  M, A, B, group = CASES[name]
  x, up, _, group_sizes_E = gmm_test.draw(
    name, 'float32', group_sizes_E=group_sizes_E
  )
  rng = np.random.default_rng(len(name))
  # Pre-activations of order one, where the activation is no line, or zero.
  ws = [up / np.max(abs(up), axis=(1, 2), keepdims=True)]
  ws += [rng.normal(size=up.shape)] * gated
  x = np.where(np.isnan(x), x, rng.normal(size=x.shape)) / A**0.5
  biases = [rng.normal(size=(len(group), B)) for _ in ws] if bias else []
  down_ExBxA = rng.normal(size=(len(group), B, A)) * 10.0 ** rng.integers(
    -3, 4, size=(len(group), 1, 1)
  )
  dy_MxA = np.where(np.isnan(x), np.nan, rng.normal(size=(M, A)))
  gate_M = rng.normal(size=M).astype(np.float32)
  gate_M[::5] = 0.0
  gate_M[sum(group_sizes_E) :] = np.nan
  arrays = jax.tree.map(
    lambda a: a.astype(jnp.dtype(dtype)), (x, dy_MxA, ws, down_ExBxA, biases)
  )
  return *arrays, gate_M, group_sizes_E


def _check_layer(name, dtype, gated, bias, rows, step, run, interpret, groups):
  """Every result by expert, against float64 that is dense and dumb."""
  _, A, B, _ = CASES[name]
  into = tiling.Tile(rows, A, run or B, run or B, step, 1 << 25)
  dlhs = tiling.Tile(rows, B, A, A, step, 1 << 25)

  @jax.jit
  def run_all(x, dy, ws, down, biases, gate_M, group):
    hidden, pre = tpu.into(
      _hidden, x, ws, group, biases, tile=into, interpret=interpret
    )
    arrays = dy, down, pre, gate_M, group
    d_pre, gated_MxB, d_gate_M = tpu.slope(
      _hidden, *arrays, tile=into, interpret=interpret
    )
    dx = tpu.dlhs(d_pre, ws, group, tile=dlhs, interpret=interpret)
    return hidden, pre, d_pre, gated_MxB, d_gate_M[:, None], dx

  for group_sizes_E in groups:
    args = _layer(name, dtype, gated, bias, group_sizes_E)
    found = jax.block_until_ready(run_all(*args))
    expected = _expected_layer(
      *jax.tree.map(np.float64, args[:-1]), group_sizes_E
    )
    for i, array in enumerate(jax.tree.leaves(found)):
      want = [one[i] for one in expected]
      by_expert = gmm_test.by_expert(array, group_sizes_E)
      gmm_test.check(by_expert, want, gmm_test.TOLERANCE[dtype])


def _expected_layer(x, dy, ws, down, biases, gate_M, group_sizes_E):
  """For each expert the list of what `run_all` of _check_layer returns."""
  found = []
  split = functools.partial(gmm_test.by_expert, group_sizes_E=group_sizes_E)
  for e, rows_e in enumerate(zip(*map(split, (x, dy, gate_M)), strict=True)):
    x_e, dy_e, weight = rows_e[0], rows_e[1], rows_e[2][:, None]
    pre = [x_e @ w[e] for w in ws]
    if biases:
      pre = [a + b[e] for a, b in zip(pre, biases, strict=True)]
    hidden, slopes = _hidden_and_slopes(*pre)
    dh = dy_e @ down[e].T
    d_pre = [dh * weight * d for d in slopes]
    d_weight = np.sum(dh * hidden, axis=1, keepdims=True)
    dx = sum(d @ w[e].T for d, w in zip(d_pre, ws, strict=True))
    found.append([hidden, *pre, *d_pre, weight * hidden, d_weight, dx])
  return found


@pytest.mark.parametrize(
  'name, rows, step, run, gated',
  [
    ('skewed', 48, 48, None, True),
    ('skewed', 64, 16, 8, False),
    ('odd_rows', 64, 16, 16, True),  # blocks that reach past the matrices
    ('one_row', 16, 16, None, True),
    ('no_rows', 16, 16, None, False),
    ('narrow', 48, 48, None, False),
  ],
)
def test_a_layer_with_its_activation_inside(name, rows, step, run, gated):
  """With a gate and biases, or with neither."""
  _check_layer(
    *(name, 'float32', gated, gated, rows, step, run),
    interpret=True,
    groups=gmm_test.groups(name),
  )


def test_sums_over_columns_are_of_those_that_exist(monkeypatch):
  """Lane by lane, of whole lanes and with a block past the end."""
  group = 30, 0, 33
  monkeypatch.setitem(CASES, 'wide', (70, 16, 384, group))
  _check_layer(
    *('wide', 'float32', True, False, 32, 16, 256),
    interpret=True,
    groups=[np.int32(group)],
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_layer_has_no_race_and_reads_nothing_unwritten(dtype, monkeypatch):
  monkeypatch.setitem(CASES, 'few', (130, 16, 24, FEW))
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan'
  )
  _check_layer(
    *('few', dtype, True, True, 64, 16, None, interpret),
    groups=[np.int32(FEW)],
  )
  assert not _races()


def _races():
  """What the last kernel under race detection found."""
  module = importlib.import_module(
    'jax._src.pallas.mosaic.interpret.interpret_pallas_call'
  )
  return module.races.races_found


visits = jax.jit(tpu._visits, static_argnames=('R', 'M', 'empty'))


def test_visits_follow_the_rows():
  # Tiles of 16: expert 0 has tile 0, 2 has the rest of it and tiles 1 and 2.
  group_sizes_E = np.array([10, 0, 30], np.int32)
  got = visits(group_sizes_E, R=16, M=48, empty=1)
  assert got.count == 5 and len(got.expert_V) == 3 + 3
  assert got.expert_V[:5].tolist() == [0, 1, 2, 2, 2]
  assert got.tile_V[:5].tolist() == [0, 0, 0, 1, 2]
  assert got.edge_E.tolist() == [0, 10, 10, 40]
  assert visits(group_sizes_E, R=16, M=48, empty=0).count == 4


@pytest.mark.parametrize('E, rows', [(1, 48), (6, 16), (19, 128)])
def test_visits_agree_with_the_model_of_them(E, rows):
  rng = np.random.default_rng(E)
  M = 60 * E
  for spare in 0, 1, *rng.integers(0, 50, 8):
    share_E = rng.dirichlet(np.ones(E)) * rng.integers(0, 2, E)
    group_sizes_E = np.int32(share_E / max(share_E.sum(), 1e-9) * (M - spare))
    expert_V, tile_V, _ = tiling.visit(
      group_sizes_E, tiling.Tile(rows, 1, 1, 1, rows, 0)
    )
    got = jax.device_get(visits(group_sizes_E, R=rows, M=M, empty=0))
    n = int(got.count)
    assert n == len(expert_V) <= len(got.expert_V)
    assert got.expert_V[:n].tolist() == expert_V.tolist()
    assert got.tile_V[:n].tolist() == tile_V.tolist()
