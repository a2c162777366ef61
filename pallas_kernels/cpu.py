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


def gmm(x_MxA, w_ExAxB, group_E):
  """Multiplies consecutive groups of rows by one matrix each.

  The first group_E[0] rows of x meet w[0], the next group_E[1] rows w[1], and
  so on. Rows from sum(group_E) on are undefined in y and in the gradient of x;
  whatever stands there in x or in dy, NaN included, reaches nothing else. The
  gradient of w is exactly zero for an empty expert. Under vmap the instances
  run one after the other. Reverse mode only.

  Args:
    x_MxA: rows sorted by expert; float32, bfloat16 or float64.
    w_ExAxB: one matrix per expert, of the dtype of x.
    group_E: int32 rows per expert, none negative, their sum at most M.

  Returns:
    y_MxB in the dtype of x, accumulated in float32 or wider.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: a dtype is not one of the above.
  """
  operands.check(x_MxA, w_ExAxB, group_E, _DTYPES, 'cpu')
  return _gmm(*operands.same_axes(x_MxA, w_ExAxB, group_E))


@jax.custom_vjp
def _gmm(x_MxA, w_ExAxB, group_E):
  return _product(x_MxA, w_ExAxB, group_E, transpose=False)


def _gmm_fwd(x_MxA, w_ExAxB, group_E):
  return _gmm(x_MxA, w_ExAxB, group_E), (x_MxA, w_ExAxB, group_E)


def _gmm_bwd(saved, dy_MxB):
  x_MxA, w_ExAxB, group_E = saved
  dx_MxA = _product(dy_MxB, w_ExAxB, group_E, transpose=True)
  return dx_MxA, _drhs(x_MxA, dy_MxB, group_E), None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


def _product(x_MxA, w_ExAxB, group_E, transpose):
  """Rows times their expert's matrix, or its transpose (dlhs)."""
  M = x_MxA.shape[0]
  E, B = w_ExAxB.shape[0], w_ExAxB.shape[1 if transpose else 2]
  dot = functools.partial(
    lax.dot_general,
    dimension_numbers=(((1,), (1 if transpose else 0,)), ((), ())),
    preferred_element_type=_wide(x_MxA.dtype),
  )
  # Every tile costs a few passes over its rows, so a tile that is nearly full
  # beats several small ones that fit exactly.
  top = _top_tile(M, E)
  tiles = sorted({max(top // d, 1) for d in (1, 2, 4, 8)}, reverse=True)

  @jax.custom_batching.sequential_vmap
  def product(x_MxA, w_ExAxB, group_E):
    end_E = lax.cumsum(group_E)

    def expert(e, y_MxB):
      row, end = end_E[e] - group_E[e], end_E[e]
      w_AxB = lax.dynamic_index_in_dim(w_ExAxB, e, keepdims=False)

      def tile(i, y_MxB, row, R):
        first, own_Rx1 = _own_rows(row + i * R, end, R, M)
        y_RxB = dot(_rows(x_MxA, first, R), w_AxB)
        y_RxB = jnp.where(own_Rx1, y_RxB, _rows(y_MxB, first, R))
        return lax.dynamic_update_slice_in_dim(y_MxB, y_RxB, first, 0)

      for R in tiles:
        spare = R - 1 if R == tiles[-1] else R // 4
        n = jnp.maximum(end - row + spare, 0) // R
        y_MxB = lax.fori_loop(
          jnp.zeros_like(n), n, functools.partial(tile, row=row, R=R), y_MxB
        )
        row = row + n * R
      return y_MxB

    # The carry stays wide: XLA would convert all of a bfloat16 carry at every
    # step.
    y_MxB = jnp.zeros_like(x_MxA, shape=(M, B), dtype=_wide(x_MxA.dtype))
    y_MxB = lax.fori_loop(0, E, expert, y_MxB) if M else y_MxB
    return y_MxB.astype(x_MxA.dtype)

  return product(x_MxA, w_ExAxB, group_E)


@jax.custom_batching.sequential_vmap
def _drhs(x_MxA, dy_MxB, group_E):
  """Each expert's x^T dy, zero where it has no rows."""
  (M, A), B, E = x_MxA.shape, dy_MxB.shape[1], group_E.shape[0]
  wide = _wide(x_MxA.dtype)
  top = _top_tile(M, E)
  tiles = sorted({-(-top * d // 4) for d in (1, 2, 3, 4)})
  end_E = lax.cumsum(group_E)

  def tile(row, end, R):
    first, own_Rx1 = _own_rows(row, end, R, M)
    # Both sides are masked: zero times NaN is NaN.
    x_RxA, dy_RxB = (
      jnp.where(own_Rx1, a, jnp.zeros_like(a))
      for a in (_rows(x_MxA, first, R), _rows(dy_MxB, first, R))
    )
    # XLA:CPU is slow where both sides contract their first axis. The barrier
    # keeps it from folding the transpose back into the product.
    x_AxR = lax.optimization_barrier(x_RxA.T)
    return lax.dot(x_AxR, dy_RxB, preferred_element_type=wide)

  def empty(row, end):
    del row, end
    return jnp.zeros_like(x_MxA, shape=(A, B), dtype=wide)

  def expert(e, dw_ExAxB):
    row, end = end_E[e] - group_E[e], end_E[e]
    # Adding is a pass over A x B, so the first product, the one that need not
    # be full, starts the sum; most experts have no other.
    n = jnp.maximum(group_E[e] - 1, 0) // top
    rest = group_E[e] - n * top
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
    return lax.dynamic_update_index_in_dim(dw_ExAxB, dw_AxB, e, 0)

  dw_ExAxB = jnp.zeros_like(x_MxA, shape=(E, A, B), dtype=wide)
  dw_ExAxB = lax.fori_loop(0, E, expert, dw_ExAxB) if M else dw_ExAxB
  return dw_ExAxB.astype(x_MxA.dtype)


def _top_tile(M, E):
  """Rows of the largest tile: an expert's share, in 32 to 1024, at most M."""
  share = -(-M // max(E, 1))
  return min(M, max(32, min(1024, 1 << (share - 1).bit_length())))


def _wide(dtype):
  return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _rows(x_MxA, first, R):
  return lax.dynamic_slice_in_dim(x_MxA, first, R)


def _own_rows(row, end, R, M):
  """First row of a tile, moved back inside M, and which of its rows count."""
  first = jnp.minimum(row, M - R)
  row_R = first + lax.iota(jnp.int32, R)
  return first, ((row_R >= row) & (row_R < end))[:, None]
