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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import operands, tiling

_DTYPES = ('float32', 'bfloat16')


def gmm(x_MxA, w_ExAxB, group_sizes_E, *, tiles=None, interpret=False):
  """Multiplies consecutive groups of rows by one matrix each.

  The first group_sizes_E[0] rows of x meet w[0], the next group_sizes_E[1] rows
  w[1], and so on. Rows from sum(group_sizes_E) on are undefined in y and in the
  gradient of x; their values in x or in dy, NaN included, reach nothing else.
  The gradient of w is exactly zero for an empty expert. Products of float32 are
  exact to float32. Under vmap the instances run one after the other. Reverse
  mode only.

  Args:
    x_MxA: rows sorted by expert; float32 or bfloat16.
    w_ExAxB: one matrix per expert, of the dtype of x.
    group_sizes_E: int32 rows per expert, none negative, their sum at most M.
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
  operands.check(x_MxA, w_ExAxB, group_sizes_E, _DTYPES, 'tpu')
  (M, _), B = x_MxA.shape, w_ExAxB.shape[2]
  _check_widths(w_ExAxB, interpret)
  if not M:
    return jnp.zeros((M, B), x_MxA.dtype)
  if tiles is None:
    tiles = tiling.Tiles(
      *(
        _tile(kernel, M, w_ExAxB, interpret)
        for kernel in (tiling.FWD, tiling.DLHS, tiling.DRHS)
      )
    )
  return _gmm(
    *operands.same_axes(x_MxA, w_ExAxB, group_sizes_E), tiles, interpret
  )


def _check_widths(w_ExAxB, interpret):
  if 1 in w_ExAxB.shape[1:] and w_ExAxB.dtype == jnp.bfloat16 and not interpret:
    raise NotImplementedError(
      f'gmm on tpu has no bfloat16 matrices of width 1: {w_ExAxB.shape}'
    )


def _tile(kernel, M, w_ExAxB, interpret):
  """The `tiling.Tile` of one of tiling's kernels."""
  E, A, B = w_ExAxB.shape
  chip = tiling.this_chip(interpret=bool(interpret))
  # An interpreter compiles each window of a tile: small tiles have few.
  rows = min(M, 64) if interpret else M
  return tiling.best(kernel, rows, A, B, E, w_ExAxB.dtype.itemsize, chip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(x_MxA, w_ExAxB, group_sizes_E, tiles, interpret):
  return product(x_MxA, w_ExAxB, group_sizes_E, tiles.fwd, interpret=interpret)


def _gmm_fwd(x_MxA, w_ExAxB, group_sizes_E, tiles, interpret):
  y_MxB = _gmm(x_MxA, w_ExAxB, group_sizes_E, tiles, interpret)
  return y_MxB, (x_MxA, w_ExAxB, group_sizes_E)


def _gmm_bwd(tiles, interpret, saved, dy_MxB):
  x_MxA, w_ExAxB, group_sizes_E = saved
  dx_MxA = product(
    dy_MxB,
    w_ExAxB,
    group_sizes_E,
    tiles.dlhs,
    transpose=True,
    interpret=interpret,
  )
  dw_ExAxB = drhs(x_MxA, dy_MxB, group_sizes_E, tiles.drhs, interpret=interpret)
  return dx_MxA, dw_ExAxB, None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


# The products of a layer with gradients of its own, see `fused`. Nothing that a
# strip of them becomes on its way to memory is a pass of its own. None has
# gradients; rows past the groups are as those of `gmm`.


def into(
  of, x_MxA, ws, group_sizes_E, biases=(), *, tile=None, interpret=False
):
  """The pre-activations of the rows, of each w, and the hidden rows of them.

  Args:
    of: (pre, ...) -> hidden, elementwise; it gets and returns float32.
    x_MxA, group_sizes_E: as for `gmm`.
    ws: (w_ExAxB, ...), of one shape and of the dtype of x.
    biases: none, or for each w a bias_ExB.
    tile: a `tiling.Tile`; None lets the model in `tiling` choose.
    interpret: as for `gmm`.

  Returns:
    hidden_MxB, (pre_MxB, ...), in the dtype of x.

  Raises:
    ValueError, NotImplementedError: as `gmm`.
  """
  for w_ExAxB in ws:
    operands.check(x_MxA, w_ExAxB, group_sizes_E, _DTYPES, 'tpu')
  _check_widths(ws[0], interpret)
  M, B = len(x_MxA), ws[0].shape[2]
  if not M:
    empty_MxB = jnp.zeros((M, B), x_MxA.dtype)
    return empty_MxB, (empty_MxB,) * len(ws)
  tile = tile or _tile(tiling.into(len(ws)), M, ws[0], interpret)

  def finish(products, sides):
    if sides:
      products = [y + b for y, b in zip(products, sides, strict=True)]
    return (of(*products), *products), ()

  form = _Form('into', False, finish, ys=1 + len(ws))
  sides = [bias_ExB[:, None, :] for bias_ExB in biases]
  arrays = operands.same_axes((x_MxA,), tuple(ws), sides, group_sizes_E)
  (hidden_MxB, *pre), _ = _products(form, *arrays, tile, interpret)
  return hidden_MxB, tuple(pre)


def slope(
  of, dy_MxB, w_ExAxB, pre, gate_M, group_sizes_E, *, tile=None, interpret=False
):
  """Back through hidden w, times a weight for each row, and through `of`.

  With dh = dy w^T, and d the derivatives of `of` at the pre-activations:

  Args:
    of: as of `into`.
    dy_MxB: of the rows, as if each weight were 1.
    w_ExAxB: what hidden rows of width A meet.
    pre: (pre_MxA, ...), as `into` returns them.
    gate_M: float.
    group_sizes_E, tile, interpret: as of `into`.

  Returns:
    (weight * dh * d of each), weight * hidden, sum of dh * hidden over A; the
    last is float32 [M], the others are [M, A] in the dtype of dy.

  Raises:
    ValueError, NotImplementedError: as `gmm`.
  """
  turned = jax.ShapeDtypeStruct(
    (w_ExAxB.shape[0], *w_ExAxB.shape[:0:-1]), w_ExAxB.dtype
  )
  operands.check(dy_MxB, turned, group_sizes_E, _DTYPES, 'tpu')
  _check_widths(w_ExAxB, interpret)
  M = len(dy_MxB)
  if not M:
    return tuple(pre), pre[0], jnp.zeros((M,), jnp.float32)
  tile = tile or _tile(tiling.slope(len(pre)), M, w_ExAxB, interpret)

  def finish(products, sides):
    (dh,), (*pre, weight) = products, sides
    hidden, pull = jax.vjp(of, *pre)
    return (*pull(dh * weight), hidden * weight), (dh * hidden,)

  form = _Form('slope', True, finish, ys=len(pre) + 1, sums=1)
  sides = (*pre, gate_M.astype(jnp.float32)[:, None])
  arrays = operands.same_axes((dy_MxB,), (w_ExAxB,), sides, group_sizes_E)
  ys, (d_gate_M,) = _products(form, *arrays, tile, interpret)
  return ys[:-1], ys[-1], d_gate_M


def dlhs(dys, ws, group_sizes_E, *, tile=None, interpret=False):
  """dx_MxA: the sum of dy w^T over pairs of a dy_MxB and a w_ExAxB.

  Accumulated as one product; other arguments are those of `into`.
  """
  turned = jax.ShapeDtypeStruct(
    (ws[0].shape[0], *ws[0].shape[:0:-1]), ws[0].dtype
  )
  for dy_MxB in dys:
    operands.check(dy_MxB, turned, group_sizes_E, _DTYPES, 'tpu')
  _check_widths(ws[0], interpret)
  M = len(dys[0])
  if not M:
    return jnp.zeros((M, ws[0].shape[1]), dys[0].dtype)
  tile = tile or _tile(tiling.dlhs(len(ws)), M, ws[0], interpret)
  form = _Form('dlhs', True, _as_they_are, ys=1)
  arrays = operands.same_axes(tuple(dys), tuple(ws), (), group_sizes_E)
  (dx_MxA,), _ = _products(form, *arrays, tile, interpret)
  return dx_MxA


def gathered(
  x_TxA,
  token_M,
  w_ExAxB,
  group_sizes_E,
  tile,
  *,
  transpose=False,
  interpret=False,
):
  """`product` of the rows x[token_M], which are never copied as a whole.

  A tile's rows come by a DMA each, while the tile before is multiplied. Memory
  is tiled, so that a row of a matrix is no contiguous piece of it, and two rows
  of bfloat16 share words; so each row is first made a tile of words of its own:
  word c holds columns c and c + A / 2 of bfloat16.

  Args:
    x_TxA: A is a multiple of 128, in bfloat16 of 256.
    token_M: int32; past the groups any.
    w_ExAxB, group_sizes_E, tile, transpose, interpret: as for `product`.
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
  def run(words_TxSx128, token_M, w_ExAxB, group_sizes_E):
    visits = _visits(group_sizes_E, R, M, empty=0)
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

  return run(words_TxSx128, token_M, w_ExAxB, group_sizes_E)


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
    form=_Form('gathered', transpose, _as_they_are, ys=1),
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


def product(
  x_MxA, w_ExAxB, group_sizes_E, tile, *, transpose=False, interpret=False
):
  """Rows times their expert's matrix, or its transpose (dlhs).

  Args:
    x_MxA, w_ExAxB: as for `gmm`; with transpose, x is [M, B].
    group_sizes_E: as for `gmm`.
    tile: `tiling.Tile`: rows R of one visit, columns of one block of y.
    transpose: contracts the last axis of w instead of the middle one.
    interpret: as for `gmm`.
  """
  form = _Form('dlhs' if transpose else 'gmm', transpose, _as_they_are, ys=1)
  arrays = (x_MxA,), (w_ExAxB,), ()
  return _products(form, *arrays, group_sizes_E, tile, interpret)[0][0]


class _Form(NamedTuple):
  """A kernel of products, and what it makes of them before it writes.

  of: (products, sides) -> (ys, sums), all float32, of some rows and columns. A
  side is an array's part there: of [M, B], of [M, 1] the rows, of [E, 1, B] the
  expert's. Of sums, which are functions of the rows, the sum over B is written.
  """

  name: str
  transpose: bool
  of: Callable
  ys: int
  sums: int = 0


def _as_they_are(products, sides):
  del sides
  return products, ()


def _products(form, xs, ws, sides, group_sizes_E, tile, interpret):
  """([M, B] in the dtype of x, ...), (float32 [M], ...): what `form` writes.

  One x meets each w, or each x its own w, and then it is one product, the sum.
  """
  R, cols, transpose = tile.rows, tile.cols, form.transpose
  M, B = xs[0].shape[0], ws[0].shape[1 if transpose else 2]
  lanes = 128 if tile.run % 128 == 0 else 1

  def x_map(j, v, edge_E, expert_V, tile_V):
    del j, edge_E, expert_V
    return tile_V[v], 0

  def w_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, tile_V
    return (expert_V[v], j, 0) if transpose else (expert_V[v], 0, j)

  def bias_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, tile_V
    return expert_V[v], 0, j

  def y_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, expert_V
    return tile_V[v], j

  def sum_map(j, v, edge_E, expert_V, tile_V):
    del edge_E, expert_V
    return j, tile_V[v], 0

  def w_spec(w_ExAxB):
    A = w_ExAxB.shape[2 if transpose else 1]
    return pl.BlockSpec((1, cols, A) if transpose else (1, A, cols), w_map)

  def side_spec(side):
    if side.ndim == 3:
      return pl.BlockSpec((1, 1, cols), bias_map)
    if side.shape[1] == B:
      return pl.BlockSpec((R, cols), y_map)
    return pl.BlockSpec((R, 1), x_map)

  blocks = pl.cdiv(B, cols)

  @jax.custom_batching.sequential_vmap
  def run(xs, ws, sides, group_sizes_E):
    visits = _visits(group_sizes_E, R, M, empty=0)
    y_MxB = operands.like(xs[0], (M, B))
    sum_JxMxL = operands.like(xs[0], (blocks, M, lanes))
    found = pl.pallas_call(
      functools.partial(
        _product_kernel,
        tile=tile,
        form=form,
        counts=(len(xs), len(ws), len(sides)),
        edge=B % cols,
      ),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(blocks, visits.count),
        in_specs=[
          *(pl.BlockSpec((R, x.shape[1]), x_map) for x in xs),
          *map(w_spec, ws),
          *map(side_spec, sides),
        ],
        out_specs=[
          *[pl.BlockSpec((R, cols), y_map)] * form.ys,
          *[pl.BlockSpec((1, R, lanes), sum_map)] * form.sums,
        ],
      ),
      out_shape=[
        *[y_MxB] * form.ys,
        *[sum_JxMxL.update(dtype=jnp.float32)] * form.sums,
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=tile.vmem_bytes,
      ),
      interpret=interpret,
      name=form.name,
    )(visits.edge_E, visits.expert_V, visits.tile_V, *xs, *ws, *sides)
    sums = [jnp.sum(part, axis=(0, 2)) for part in found[form.ys :]]
    return tuple(found[: form.ys]), tuple(sums)

  return run(tuple(xs), tuple(ws), tuple(sides), group_sizes_E)


def _product_kernel(
  edge_E, expert_V, tile_V, *refs, tile, form, counts=(1, 1, 0), edge=0
):
  own = _own_rows(edge_E, expert_V, tile_V, pl.program_id(1), tile.rows)
  j, last = pl.program_id(0), pl.num_programs(0) - 1
  xs, ws, sides, ys, sums = _cut(refs, (*counts, form.ys, form.sums))

  def compute(window, start):
    # The first window starts this much before the own rows, at most.
    head = min(tile.step + tiling.ALIGN, window.size)
    write = functools.partial(_write, own, window, head)
    totals = [0.0] * len(sums)
    # One strip of results after the other leaves the matrix units while the
    # next one's products run.
    for cols in _strips(start, tile):
      dot = functools.partial(_dot, window, cols, form.transpose)
      found = [dot(*pair) for pair in zip(_as_many(xs, ws), ws, strict=True)]
      found = found if len(xs) == 1 else [functools.reduce(jnp.add, found)]
      parts, terms = form.of(found, [_side(a, window, cols) for a in sides])
      for y_RxB, part in zip(ys, parts, strict=True):
        write(y_RxB, cols, part.astype(y_RxB.dtype))
      for i, term in enumerate(terms):
        if edge:
          column = cols.start + lax.broadcasted_iota(jnp.int32, term.shape, 1)
          term = jnp.where((j < last) | (column < edge), term, 0.0)
        totals[i] += _lane_sums(term, sums[i].shape[-1])
    for sum_1xRxL, total in zip(sums, totals, strict=True):
      sum_RxL = sum_1xRxL.at[0]
      before = sum_RxL[window, :]
      total += jnp.where(start > 0, before, jnp.zeros_like(before))
      write(sum_RxL, slice(None), total)

  _cover(own, tile, tile.cols, compute)


def _cut(refs, counts):
  """The refs in consecutive lists of these lengths."""
  refs = iter(refs)
  return [[next(refs) for _ in range(n)] for n in counts]


def _as_many(xs, ws):
  return xs if len(xs) == len(ws) else xs * len(ws)


def _dot(window, cols, transpose, x_RxA, w_1xAxB):
  return lax.dot_general(
    x_RxA[window, :],
    w_1xAxB[0, cols, :] if transpose else w_1xAxB[0, :, cols],
    (((1,), (1 if transpose else 0,)), ((), ())),
    precision=_precision(x_RxA.dtype),
    preferred_element_type=jnp.float32,
  )


def _side(ref, window, cols):
  """The part of a side, see `_Form`, for these rows and columns."""
  if len(ref.shape) == 3:
    part = ref[0, :, cols]
  else:
    part = ref[window, cols] if ref.shape[1] > 1 else ref[window, :]
  return part.astype(jnp.float32)


def _lane_sums(a_RxB, lanes):
  """[R, lanes]: sums over columns, as far as it goes without moving them."""
  if lanes == 1:
    return jnp.sum(a_RxB, axis=1, keepdims=True)
  parts = range(0, a_RxB.shape[1], lanes)
  return functools.reduce(jnp.add, [a_RxB[:, p : p + lanes] for p in parts])


def _write(own, window, head, y_RxB, cols, y):
  """Rows below the own ones belong to the experts before, and are not touched.

  Those above are written by the experts after.
  """
  keep = _mask(own, window.start, (head, y.shape[1]))
  top = jnp.where(keep, y[:head], y_RxB[pl.ds(window.start, head), cols])
  y_RxB[pl.ds(window.start, head), cols] = top
  if head < window.size:
    rest = pl.ds(window.start + head, window.size - head)
    y_RxB[rest, cols] = y[head:]


def drhs(x_MxA, dy_MxB, group_sizes_E, tile=None, *, interpret=False):
  """[E, A, B]: each expert's x^T dy, zero where it has no rows.

  Args:
    x_MxA, dy_MxB, group_sizes_E: as for `gmm`.
    tile: `tiling.Tile`: rows R of one visit, and the part of A x B that one
      block of the result holds; None lets the model in `tiling` choose.
    interpret: as for `gmm`.
  """
  (M, A), B, E = x_MxA.shape, dy_MxB.shape[1], group_sizes_E.shape[0]
  if not M:
    return jnp.zeros((E, A, B), x_MxA.dtype)
  w_ExAxB = jax.ShapeDtypeStruct((E, A, B), dy_MxB.dtype)
  _check_widths(w_ExAxB, interpret)
  tile = tile or _tile(tiling.DRHS, M, w_ExAxB, interpret)
  R, depth, cols = tile.rows, tile.depth, tile.cols

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
  def run(x_MxA, dy_MxB, group_sizes_E):
    visits = _visits(group_sizes_E, R, M, empty=1)
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

  return run(*operands.same_axes(x_MxA, dy_MxB, group_sizes_E))


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


def _visits(group_sizes_E, R, M, empty):
  """Each expert visits the tiles that hold its rows; V is static.

  An expert without rows makes `empty` visits, 0 or 1.
  """
  E, tiles = group_sizes_E.shape[0], pl.cdiv(M, R)
  end_E = lax.cumsum(group_sizes_E)
  first_E = (end_E - group_sizes_E) // R
  visits_E = jnp.where(group_sizes_E > 0, pl.cdiv(end_E, R) - first_E, empty)
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
