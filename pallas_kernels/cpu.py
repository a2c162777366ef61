"""Grouped matrix multiplication on CPU, in plain JAX.

A loop over experts copies each weight out once and covers the expert's rows
with tiles of a few static sizes, so that every product is one of XLA's own.
Only the trip counts depend on the group sizes; code size depends on neither
the number of experts nor the number of rows.

Axes: M rows, E experts, A contracted, B output, R rows of one tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import operands

_DTYPES = ('float32', 'bfloat16', 'float64')


def gmm(x_MxA, w_ExAxB, group_sizes_E):
  """Multiplies consecutive groups of rows by one matrix each.

  The first group_sizes_E[0] rows of x meet w[0], the next group_sizes_E[1] rows
  w[1], and so on. Rows from sum(group_sizes_E) on are undefined in y and in the
  gradient of x; their values in x or in dy, NaN included, reach nothing else.
  The gradient of w is exactly zero for an empty expert. Under vmap the
  instances run one after the other. Reverse mode only.

  Args:
    x_MxA: rows sorted by expert; float32, bfloat16 or float64.
    w_ExAxB: one matrix per expert, of the dtype of x.
    group_sizes_E: int32 rows per expert, none negative, their sum at most M.

  Returns:
    y_MxB in the dtype of x, accumulated in float32 or wider.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: a dtype is not one of the above.
  """
  operands.check(x_MxA, w_ExAxB, group_sizes_E, _DTYPES, 'cpu')
  return _gmm(*operands.same_axes(x_MxA, w_ExAxB, group_sizes_E))


@jax.custom_vjp
def _gmm(x_MxA, w_ExAxB, group_sizes_E):
  return fwd(x_MxA, (w_ExAxB,), group_sizes_E)[0]


def _gmm_fwd(x_MxA, w_ExAxB, group_sizes_E):
  return _gmm(x_MxA, w_ExAxB, group_sizes_E), (x_MxA, w_ExAxB, group_sizes_E)


def _gmm_bwd(saved, dy_MxB):
  x_MxA, w_ExAxB, group_sizes_E = saved
  dx_MxA = dlhs((dy_MxB,), (w_ExAxB,), group_sizes_E)
  return dx_MxA, *drhs(x_MxA, (dy_MxB,), group_sizes_E), None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


# The three products, without gradients of their own. The matrices that an
# expert has for the same rows lie side by side in one product. With a token_M
# the rows are those of x that it names, gathered tile by tile and never copied
# as a whole; what it says past the groups does not matter.


def fwd(x, ws, group_sizes_E, token_M=None):
  """(y_MxB, ...): the rows times their expert's matrix of each w.

  Args:
    x: x_MxA, or x_TxA with a token_M.
    ws: of (w_ExAxB, ...), of one A and of the dtype of x.
    group_sizes_E: as of `gmm`; so is what is undefined.
    token_M: int32, each row's own in x.
  """
  arrays = operands.same_axes((x,), tuple(ws), group_sizes_E, token_M)
  return _product(*arrays, transpose=False)


def dlhs(dys, ws, group_sizes_E, token_M=None):
  """dx_MxA: the sum of dy w^T over the pairs of a dy and a w, as one product.

  Args:
    dys: (dy_MxB, ...), or (dy_TxB, ...) with a token_M.
    ws, group_sizes_E, token_M: as of `fwd`.
  """
  arrays = operands.same_axes(tuple(dys), tuple(ws), group_sizes_E, token_M)
  return _product(*arrays, transpose=True)[0]


def drhs(x, dys, group_sizes_E, x_token_M=None, dy_token_M=None):
  """(dw_ExAxB, ...): each expert's x^T dy, zero where it has no rows.

  Args:
    x: x_MxA, or x_TxA with an x_token_M.
    dys: (dy_MxB, ...), or (dy_TxB, ...) with a dy_token_M.
    group_sizes_E: as of `gmm`.
    x_token_M, dy_token_M: as token_M of `fwd`.
  """
  arrays = operands.same_axes(
    x, tuple(dys), group_sizes_E, x_token_M, dy_token_M
  )
  return _drhs(*arrays)


def _product(xs, ws, group_sizes_E, token_M, transpose):
  """The products of `fwd`, or with transpose of `dlhs`, as a tuple."""
  M = (xs[0] if token_M is None else token_M).shape[0]
  E, A = ws[0].shape[:2]
  widths = [A] if transpose else [w.shape[2] for w in ws]
  dot = functools.partial(
    lax.dot_general,
    dimension_numbers=(((1,), (1 if transpose else 0,)), ((), ())),
    preferred_element_type=_wide(xs[0].dtype),
  )
  # Every tile costs a few passes over its rows, so a tile that is nearly full
  # beats several small ones that fit exactly.
  top = _top_tile(M, E)
  tiles = sorted({max(top // d, 1) for d in (1, 2, 4, 8)}, reverse=True)

  @jax.custom_batching.sequential_vmap
  def product(xs, ws, group_sizes_E, token_M):
    end_E = lax.cumsum(group_sizes_E)

    def expert(e, ys):
      row, end = end_E[e] - group_sizes_E[e], end_E[e]
      w_AxB = _side_by_side(
        lax.dynamic_index_in_dim(w_ExAxB, e, keepdims=False) for w_ExAxB in ws
      )

      def tile(i, ys, row, R):
        first, own_Rx1 = _own_rows(row + i * R, end, R, M)
        x_RxA = _side_by_side(_rows(x, first, R, token_M) for x in xs)
        parts = _columns(dot(x_RxA, w_AxB), widths)
        return tuple(
          lax.dynamic_update_slice_in_dim(
            y_MxB, jnp.where(own_Rx1, y_RxB, _rows(y_MxB, first, R)), first, 0
          )
          for y_MxB, y_RxB in zip(ys, parts, strict=True)
        )

      for R in tiles:
        spare = R - 1 if R == tiles[-1] else R // 4
        n = jnp.maximum(end - row + spare, 0) // R
        ys = lax.fori_loop(
          jnp.zeros_like(n), n, functools.partial(tile, row=row, R=R), ys
        )
        row = row + n * R
      return ys

    # The carry stays wide: XLA would convert all of a bfloat16 carry at every
    # step.
    dtype = xs[0].dtype
    ys = tuple(
      _unwritten(w_ExAxB, (M, B))
      for w_ExAxB, B in zip(ws[: len(widths)], widths, strict=True)
    )
    ys = lax.fori_loop(0, E, expert, ys) if M else ys
    return tuple(y_MxB.astype(dtype) for y_MxB in ys)

  return product(xs, ws, group_sizes_E, token_M)


@jax.custom_batching.sequential_vmap
def _drhs(x, dys, group_sizes_E, x_token_M, dy_token_M):
  """The products of `drhs`."""
  A, E = x.shape[1], group_sizes_E.shape[0]
  M = (x if x_token_M is None else x_token_M).shape[0]
  widths = [dy.shape[1] for dy in dys]
  wide = _wide(x.dtype)
  top = _top_tile(M, E)
  tiles = sorted({-(-top * d // 4) for d in (1, 2, 3, 4)})
  end_E = lax.cumsum(group_sizes_E)

  def tile(row, end, R):
    first, own_Rx1 = _own_rows(row, end, R, M)
    # Both sides are masked: zero times NaN is NaN.
    x_RxA, *dys_RxB = (
      jnp.where(own_Rx1, a, jnp.zeros_like(a))
      for a in (
        _rows(x, first, R, x_token_M),
        *(_rows(dy, first, R, dy_token_M) for dy in dys),
      )
    )
    # XLA:CPU is slow where both sides contract their first axis. The barrier
    # keeps it from folding the transpose back into the product.
    x_AxR = lax.optimization_barrier(x_RxA.T)
    return lax.dot(x_AxR, _side_by_side(dys_RxB), preferred_element_type=wide)

  def empty(row, end):
    del row, end
    return jnp.zeros_like(x, shape=(A, sum(widths)), dtype=wide)

  def expert(e, dws):
    row, end = end_E[e] - group_sizes_E[e], end_E[e]
    # Adding is a pass over A x B, so the first product, the one that need not
    # be full, starts the sum; most experts have no other.
    n = jnp.maximum(group_sizes_E[e] - 1, 0) // top
    rest = group_sizes_E[e] - n * top
    size = sum((rest > R).astype(jnp.int32) for R in [0, *tiles[:-1]])
    dw_AxB = lax.switch(
      size,
      [empty, *(functools.partial(tile, R=R) for R in tiles)],
      end - rest,
      end,
    )
    dw_AxB = lax.fori_loop(
      jnp.zeros_like(n),
      n,
      lambda i, dw_AxB: dw_AxB + tile(row + i * top, end, top),
      dw_AxB,
    )
    return tuple(
      lax.dynamic_update_index_in_dim(dw_ExAxB, part_AxB, e, 0)
      for dw_ExAxB, part_AxB in zip(dws, _columns(dw_AxB, widths), strict=True)
    )

  if not M:
    return tuple(jnp.zeros_like(dys[0], shape=(E, A, B)) for B in widths)
  dws = tuple(
    _unwritten(dy, (E, A, B)) for dy, B in zip(dys, widths, strict=True)
  )
  dws = lax.fori_loop(0, E, expert, dws)
  return tuple(dw_ExAxB.astype(x.dtype) for dw_ExAxB in dws)


def _unwritten(a, shape):
  """An array for a loop to write, full of some number of a.

  Zeros would be one constant for all loops with results of this shape, and XLA
  would copy it for each of them.
  """
  one = a[(0,) * a.ndim]
  return jnp.broadcast_to(one.astype(_wide(a.dtype)), shape)


def _top_tile(M, E):
  """Rows of the largest tile: an expert's share, in 32 to 1024, at most M."""
  share = -(-M // max(E, 1))
  return min(M, max(32, min(1024, 1 << (share - 1).bit_length())))


def _wide(dtype):
  return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _rows(x, first, R, token_M=None):
  """R rows of x from `first` on, or those that token_M names there."""
  if token_M is None:
    return lax.dynamic_slice_in_dim(x, first, R)
  token_R = lax.dynamic_slice_in_dim(token_M, first, R)
  return x.at[token_R].get(mode='clip')


def _side_by_side(parts):
  parts = list(parts)
  return lax.concatenate(parts, 1) if len(parts) > 1 else parts[0]


def _columns(a_AxB, widths):
  """The parts of these widths; they are all of the columns."""
  return lax.split(a_AxB, widths, axis=1)


def _own_rows(row, end, R, M):
  """First row of a tile, moved back inside M, and which of its rows count."""
  first = jnp.minimum(row, M - R)
  row_R = first + lax.iota(jnp.int32, R)
  return first, ((row_R >= row) & (row_R < end))[:, None]
