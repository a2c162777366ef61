"""Grouped matrix multiplication on TPU, a Mosaic kernel.

The rows are cut into tiles of a fixed height. A visit is one tile for one
expert: a tile that two experts share is visited by one after the other, the
block staying in VMEM. The visits come from the group sizes as arrays of static
length, prefetched to scalar memory; only the bound of the grid is dynamic. A
visit computes the rows that it owns, rounded up to a part of the tile, so
that small experts cost little. Every block spans the whole contracted axis:
there is no accumulator, no zeroing pass and nothing is fetched twice.

Axes: M rows, E experts, A contracted, B output, R rows of one tile, V visits.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import operands, tiling

_DTYPES = ('float32', 'bfloat16')


def gmm(x_MxA, w_ExAxB, group_E, *, tiles=None, interpret=False):
  """Multiplies consecutive groups of rows by one matrix each.

  The first group_E[0] rows of x meet w[0], the next group_E[1] rows w[1], and
  so on. Rows from sum(group_E) on are undefined in y and in the gradient of x;
  whatever stands there in x or in dy, NaN included, reaches nothing else. The
  gradient of w is exactly zero for an empty expert. Products of float32 are
  exact to float32. Under vmap the instances run one after the other. Reverse
  mode only.

  Args:
    x_MxA: rows sorted by expert; float32 or bfloat16.
    w_ExAxB: one matrix per expert, of the dtype of x.
    group_E: int32 rows per expert, none negative, their sum at most M.
    tiles: `tiling.Tiles` of the forward, dlhs and drhs; None lets the model in
      `tiling` choose for the chip that this is lowered for.
    interpret: runs the kernel under Pallas' interpreter, on any platform: True,
      or `pltpu.InterpretParams` for the one that simulates a TPU's memories.

  Returns:
    y_MxB in the dtype of x, accumulated in float32.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: a dtype is not one of the above, no tile of this shape
      fits the chip's memory, or Mosaic has not the shape.
  """
  operands.check(x_MxA, w_ExAxB, group_E, _DTYPES, 'tpu')
  (M, A), (E, _, B) = x_MxA.shape, w_ExAxB.shape
  if 1 in (A, B) and x_MxA.dtype == jnp.bfloat16 and not interpret:
    raise NotImplementedError(
      f'gmm on tpu has no bfloat16 matrices of width 1: {w_ExAxB.shape}'
    )
  if not M:
    return jnp.zeros((M, B), x_MxA.dtype)
  if tiles is None:
    chip = tiling.this_chip(interpret=bool(interpret))
    # An interpreter compiles each window of a tile: small tiles have few.
    rows = min(M, 64) if interpret else M
    tiles = tiling.choose(rows, A, B, E, x_MxA.dtype.itemsize, chip)
  return _gmm(*operands.same_axes(x_MxA, w_ExAxB, group_E), tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(x_MxA, w_ExAxB, group_E, tiles, interpret):
  return product(x_MxA, w_ExAxB, group_E, tiles.fwd, interpret=interpret)


def _gmm_fwd(x_MxA, w_ExAxB, group_E, tiles, interpret):
  y_MxB = _gmm(x_MxA, w_ExAxB, group_E, tiles, interpret)
  return y_MxB, (x_MxA, w_ExAxB, group_E)


def _gmm_bwd(tiles, interpret, saved, dy_MxB):
  x_MxA, w_ExAxB, group_E = saved
  dx_MxA = product(
    dy_MxB, w_ExAxB, group_E, tiles.dlhs, transpose=True, interpret=interpret
  )
  dw_ExAxB = drhs(x_MxA, dy_MxB, group_E, tiles.drhs, interpret=interpret)
  return dx_MxA, dw_ExAxB, None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


def gathered(
  x_TxA, token_M, w_ExAxB, group_E, tile, *, transpose=False, interpret=False
):
  """`product` of the rows x[token_M], which are never copied as a whole.

  A tile's rows come by a DMA each, while the tile before is multiplied. Memory
  is tiled, so that a row of a matrix is no contiguous piece of it, and two rows
  of bfloat16 share words; so each row is first made a tile of words of its own:
  word c holds columns c and c + A / 2 of bfloat16.

  Args:
    x_TxA: A is a multiple of 128, in bfloat16 of 256.
    token_M: int32; past the groups any.
    w_ExAxB, group_E, tile, transpose, interpret: as for `product`.
  """
  R, cols = tile.rows, tile.cols
  (T, A), (M,) = x_TxA.shape, token_M.shape
  B = w_ExAxB.shape[1 if transpose else 2]
  w_block = (1, cols, A) if transpose else (1, A, cols)
  tiles = pl.cdiv(M, R)
  words_TxSx128 = _words(x_TxA)
  S = words_TxSx128.shape[1]

  def first_map(j, v, edge_E, expert_V, tile_V):
    del j, v, edge_E, expert_V, tile_V
    return 0, 0, 0

  def next_map(j, v, edge_E, expert_V, tile_V):
    del j, edge_E, expert_V
    return jnp.minimum(tile_V[v] + 1, tiles - 1), 0, 0

  def w_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, tile_V
    return (expert_V[v], j, 0) if transpose else (expert_V[v], 0, j)

  def y_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, expert_V
    return tile_V[v], j

  @jax.custom_batching.sequential_vmap
  def run(words_TxSx128, token_M, w_ExAxB, group_E):
    visits = _visits(group_E, R, M, empty=0)
    token_M = jnp.pad(jnp.clip(token_M, 0, T - 1), (0, tiles * R - M))
    token_Nx1xR = token_M.reshape(tiles, 1, R)
    tokens = functools.partial(pl.BlockSpec, (1, 1, R), memory_space=pltpu.SMEM)
    return pl.pallas_call(
      functools.partial(_gathered_kernel, tile=tile, transpose=transpose),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(B, cols), visits.count),
        in_specs=[
          tokens(first_map),
          tokens(next_map),
          pl.BlockSpec(memory_space=pltpu.HBM),
          pl.BlockSpec(w_block, w_map),
        ],
        out_specs=pl.BlockSpec((R, cols), y_map),
        scratch_shapes=[
          pltpu.VMEM((R * S, 128), words_TxSx128.dtype),
          pltpu.VMEM((R, A), w_ExAxB.dtype),
          pltpu.SemaphoreType.DMA,
        ],
      ),
      out_shape=operands.like(w_ExAxB, (M, B)),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=tile.vmem_bytes,
        # Most bundles of a fetch would be theirs; token_M is clipped above.
        disable_bounds_checks=True,
      ),
      interpret=interpret,
      name='gathered_dlhs' if transpose else 'gathered_gmm',
    )(
      *(visits.edge_E, visits.expert_V, visits.tile_V),
      *(token_Nx1xR, token_Nx1xR, words_TxSx128, w_ExAxB),
    )

  return run(words_TxSx128, token_M, w_ExAxB, group_E)


def _gathered_kernel(
  edge_E, expert_V, tile_V, first_1x1xR, next_1x1xR, words_TxSx128, w_1xAxB,
  y_RxB, words_Px128, x_RxA, arrived, *, tile, transpose,
):  # fmt: skip
  v, R, S = pl.program_id(1), tile.rows, words_TxSx128.shape[1]

  def fetch(token_1x1xR):
    @pl.loop(0, R, unroll=math.gcd(R, 32))
    def _(r):
      from_ = words_TxSx128.at[token_1x1xR[0, 0, r]]
      to = words_Px128.at[pl.ds(pl.multiple_of(r * S, S), S)]
      pltpu.make_async_copy(from_, to, arrived).start()

  @pl.when(v == 0)
  def _():
    fetch(first_1x1xR)

  # Visits go from each tile to the same or the next.
  @pl.when((v == 0) | (tile_V[v] != tile_V[jnp.maximum(v - 1, 0)]))
  def _():
    # One wait for the bytes of all rows.
    pltpu.make_async_copy(words_Px128, words_Px128, arrived).wait()
    _unpack(words_Px128, x_RxA)

    @pl.when((tile_V[v] + 1) * R < edge_E[edge_E.shape[0] - 1])
    def _():
      fetch(next_1x1xR)

  _product_kernel(
    *(edge_E, expert_V, tile_V, x_RxA, w_1xAxB, y_RxB),
    tile=tile,
    transpose=transpose,
  )


def _words(x_TxA):
  """[T, S, 128]: each row as 32-bit words, see `gathered`."""
  T, A = x_TxA.shape
  if x_TxA.dtype == jnp.float32:
    return x_TxA.reshape(T, A // 128, 128)
  low, high = (
    lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)
    for half in (x_TxA[:, : A // 2], x_TxA[:, A // 2 :])
  )
  return (low | (high << jnp.uint32(16))).reshape(T, A // 256, 128)


def _unpack(words_Px128, x_RxA):
  """The rows as a matrix, of their words, S after S."""
  R, A = x_RxA.shape
  S, step = words_Px128.shape[0] // R, math.gcd(R, 64)

  @pl.loop(0, R, step=step)
  def _(r):
    rows = pl.ds(pl.multiple_of(r, step), step)
    for s in range(S):
      if x_RxA.dtype == jnp.float32:
        x = words_Px128[pl.ds(r * S + s, step, stride=S), :]
        x_RxA[rows, pl.ds(s * 128, 128)] = x
        continue
      # A sublane of bfloat16 holds two rows: the even one has the low half.
      even, odd = (
        words_Px128[pl.ds((r + i) * S + s, step // 2, stride=2 * S), :]
        for i in (0, 1)
      )
      half = jnp.uint32(16)
      low = (even & jnp.uint32(0xFFFF)) | (odd << half)
      high = (even >> half) | (odd & jnp.uint32(0xFFFF0000))
      for at, word in (s * 128, low), (A // 2 + s * 128, high):
        x_RxA[rows, pl.ds(at, 128)] = pltpu.bitcast(word, x_RxA.dtype)


def product(x_MxA, w_ExAxB, group_E, tile, *, transpose=False, interpret=False):
  """Rows times their expert's matrix, or its transpose (dlhs).

  Args:
    x_MxA, w_ExAxB, group_E: as for `gmm`; with transpose, x is [M, B].
    tile: `tiling.Tile`: rows R of one visit, columns of one block of y.
    transpose: contracts the last axis of w instead of the middle one.
    interpret: as for `gmm`.
  """
  R, cols = tile.rows, tile.cols
  M, A = x_MxA.shape
  B = w_ExAxB.shape[1 if transpose else 2]
  w_block = (1, cols, A) if transpose else (1, A, cols)

  def x_map(j, v, edge_E, expert_V, tile_V):
    del j, edge_E, expert_V
    return tile_V[v], 0

  def w_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, tile_V
    return (expert_V[v], j, 0) if transpose else (expert_V[v], 0, j)

  def y_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, expert_V
    return tile_V[v], j

  @jax.custom_batching.sequential_vmap
  def run(x_MxA, w_ExAxB, group_E):
    visits = _visits(group_E, R, M, empty=0)
    return pl.pallas_call(
      functools.partial(_product_kernel, tile=tile, transpose=transpose),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(B, cols), visits.count),
        in_specs=[pl.BlockSpec((R, A), x_map), pl.BlockSpec(w_block, w_map)],
        out_specs=pl.BlockSpec((R, cols), y_map),
      ),
      out_shape=operands.like(x_MxA, (M, B)),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=tile.vmem_bytes,
      ),
      interpret=interpret,
      name='dlhs' if transpose else 'gmm',
    )(visits.edge_E, visits.expert_V, visits.tile_V, x_MxA, w_ExAxB)

  return run(x_MxA, w_ExAxB, group_E)


def _product_kernel(
  edge_E, expert_V, tile_V, x_RxA, w_1xAxB, y_RxB, *, tile, transpose
):
  own = _own_rows(edge_E, expert_V, tile_V, pl.program_id(1), tile.rows)

  def compute(window, start):
    # The first window starts this much before the own rows, at most.
    head = min(tile.step + tiling.ALIGN, window.size)
    # One strip of results after the other leaves the matrix units while the
    # next one's products run.
    for cols in _strips(start, tile):
      y = lax.dot_general(
        x_RxA[window, :],
        w_1xAxB[0, cols, :] if transpose else w_1xAxB[0, :, cols],
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=_precision(x_RxA.dtype),
        preferred_element_type=jnp.float32,
      ).astype(y_RxB.dtype)
      # Rows below the own ones belong to the experts before; those above are
      # written by the experts after.
      top = y[:head]
      keep = _mask(own, window.start, top.shape)
      top = jnp.where(keep, top, y_RxB[pl.ds(window.start, head), cols])
      y_RxB[pl.ds(window.start, head), cols] = top
      if head < window.size:
        rest = pl.ds(window.start + head, window.size - head)
        y_RxB[rest, cols] = y[head:]

  _cover(own, tile, tile.cols, compute)


def drhs(x_MxA, dy_MxB, group_E, tile, *, interpret=False):
  """[E, A, B]: each expert's x^T dy, zero where it has no rows.

  Args:
    x_MxA, dy_MxB, group_E: as for `gmm`.
    tile: `tiling.Tile`: rows R of one visit, and the part of A x B that one
      block of the result holds.
    interpret: as for `gmm`.
  """
  R, depth, cols = tile.rows, tile.depth, tile.cols
  (M, A), B, E = x_MxA.shape, dy_MxB.shape[1], group_E.shape[0]

  def x_map(i, j, v, edge_E, expert_V, tile_V):
    del j, edge_E, expert_V
    return tile_V[v], i

  def dy_map(i, j, v, edge_E, expert_V, tile_V):
    del i, edge_E, expert_V
    return tile_V[v], j

  def dw_map(i, j, v, edge_E, expert_V, tile_V):
    del edge_E, tile_V
    return expert_V[v], i, j

  @jax.custom_batching.sequential_vmap
  def run(x_MxA, dy_MxB, group_E):
    visits = _visits(group_E, R, M, empty=1)
    return pl.pallas_call(
      functools.partial(_drhs_kernel, tile=tile),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(A, depth), pl.cdiv(B, cols), visits.count),
        in_specs=[
          pl.BlockSpec((R, depth), x_map),
          pl.BlockSpec((R, cols), dy_map),
        ],
        out_specs=pl.BlockSpec((1, depth, cols), dw_map),
        scratch_shapes=[pltpu.VMEM((depth, cols), jnp.float32)],
      ),
      out_shape=operands.like(x_MxA, (E, A, B)),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
        vmem_limit_bytes=tile.vmem_bytes,
      ),
      interpret=interpret,
      name='drhs',
    )(visits.edge_E, visits.expert_V, visits.tile_V, x_MxA, dy_MxB)

  return run(x_MxA, dy_MxB, group_E)


def _drhs_kernel(
  edge_E, expert_V, tile_V, x_RxA, dy_RxB, dw_1xAxB, sum_AxB, *, tile
):
  v = pl.program_id(2)
  own = _own_rows(edge_E, expert_V, tile_V, v, tile.rows)
  new = (v == 0) | (expert_V[v] != expert_V[jnp.maximum(v - 1, 0)])

  def compute(window, start):
    first = new & (window.start <= own.low)
    part = pl.ds(pl.multiple_of(start, tile.run), tile.run)
    # Both sides are masked: zero times NaN is NaN.
    x, dy = (
      jnp.where(_mask(own, window.start, a.shape), a, jnp.zeros_like(a))
      for a in (x_RxA[window, part], dy_RxB[window, :])
    )
    dw_AxB = lax.dot_general(
      x,
      dy,
      (((0,), (0,)), ((), ())),
      precision=_precision(x.dtype),
      preferred_element_type=jnp.float32,
    )
    # Selecting costs less than a pass that clears the sum before.
    dw_AxB += jnp.where(first, jnp.zeros_like(dw_AxB), sum_AxB[part, :])
    sum_AxB[part, :] = dw_AxB
    dw_1xAxB[0, part, :] = dw_AxB.astype(dw_1xAxB.dtype)

  _cover(own, tile, tile.depth, compute)

  strip = 128 if tile.depth % 128 == 0 else tile.depth

  @pl.when(own.low >= own.high)
  def _():
    @pl.loop(0, tile.depth, step=strip)
    def _(a):
      rows = pl.ds(pl.multiple_of(a, strip), strip)
      dw_1xAxB[0, rows, :] = jnp.zeros((strip, tile.cols), dw_1xAxB.dtype)


class _Visits(NamedTuple):
  """Which tile meets which expert, in the order of the rows."""

  edge_E: jax.Array  # int32 [E + 1], the first row of each expert, then the end
  expert_V: jax.Array  # int32
  tile_V: jax.Array  # int32
  count: jax.Array  # int32 scalar: the visits that exist; the rest is padding


def _visits(group_E, R, M, empty):
  """Each expert visits the tiles that hold its rows; V is static.

  An expert without rows makes `empty` visits, 0 or 1.
  """
  E, tiles = group_E.shape[0], pl.cdiv(M, R)
  end_E = lax.cumsum(group_E)
  first_E = (end_E - group_E) // R
  visits_E = jnp.where(group_E > 0, pl.cdiv(end_E, R) - first_E, empty)
  until_E = lax.cumsum(visits_E)
  # Two neighbours share one tile at most.
  v_V = lax.iota(jnp.int32, tiles + E)
  expert_V = jnp.sum(until_E[None, :] <= v_V[:, None], axis=1, dtype=jnp.int32)
  expert_V = jnp.minimum(expert_V, E - 1)
  tile_V = first_E[expert_V] + v_V - (until_E - visits_E)[expert_V]
  return _Visits(
    jnp.pad(end_E, (1, 0)),
    expert_V,
    jnp.clip(tile_V, 0, tiles - 1),
    until_E[-1],
  )


class _Own(NamedTuple):
  """The rows of its tile that a visit owns: low to high, within 0..R."""

  low: jax.Array
  high: jax.Array


def _own_rows(edge_E, expert_V, tile_V, v, R):
  e, row = expert_V[v], tile_V[v] * R
  low = jnp.maximum(edge_E[e] - row, 0)
  return _Own(low, jnp.minimum(edge_E[e + 1] - row, R))


def _cover(own, tile, width, compute):
  """Calls compute(window, start) with windows of rows that cover the own ones.

  The windows follow one another, each half or less of the one before. Starts go
  through `width` in steps of `tile.run`, which is what one straight run of code
  computes.
  """
  low = own.low // tiling.ALIGN * tiling.ALIGN
  steps = jnp.where(own.high > own.low, pl.cdiv(own.high - low, tile.step), 0)
  low = jnp.minimum(low, tile.rows - steps * tile.step)
  for rows in tiling.windows(tile):
    here = rows // tile.step
    before = steps // (2 * here) * (2 * here) * tile.step

    @pl.when(steps & here != 0)
    def _(rows=rows, before=before):
      first = pl.multiple_of(low + before, tiling.ALIGN)
      pl.loop(0, width, step=tile.run)(
        functools.partial(compute, pl.ds(first, rows))
      )


def _strips(start, tile, width=256):
  """Slices that cover `tile.run` from `start`."""
  for at in range(0, tile.run, width):
    size = min(width, tile.run - at)
    yield pl.ds(pl.multiple_of(start + at, math.gcd(tile.run, width)), size)


def _mask(own, start, shape):
  row = start + lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= own.low) & (row < own.high)


def _precision(dtype):
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None
