"""Grouped matrix multiplication on CPU in plain JAX.

Rows of x are sorted by expert: the first group_E[0] rows meet w[0], the next
group_E[1] rows meet w[1], and so on. A loop over experts slices each weight
out once and covers the expert's rows with tiles of a few static sizes, so that
XLA calls its own matrix product on every tile.

Axes: M rows, E experts, A contracted, B output, R rows of one tile.
"""


import jax
import jax.numpy as jnp
from jax import lax

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float64)


def _tiles(M: int, E: int) -> tuple[int, ...]:
  """Row counts of the tiles, large to small; the last one may overrun."""
  mean = M / E
  sizes = [s for s in (1024, 256, 64) if s <= min(M, mean)]
  return tuple(sizes + [min(M, 16)])


def _accumulator(dtype):
  return jnp.promote_types(dtype, jnp.float32)


def _cover(tiles, start, size, body, carry):
  """Folds body(row, R, ragged, carry) over tiles that cover a group."""
  M_done = start
  for i, R in enumerate(tiles):
    ragged = i == len(tiles) - 1
    left = start + size - M_done
    n = -(-left // R) if ragged else left // R
    first = M_done

    def step(j, carry, first=first, R=R, ragged=ragged):
      return body(first + j * R, R, ragged, carry)

    carry = lax.fori_loop(jnp.zeros_like(n), n, step, carry)
    M_done = first + n * R
  return carry


def _rows(x_MxA, row, R):
  return lax.dynamic_slice_in_dim(x_MxA, row, R)


def _own(row, R, M, start, end):
  """First row of the tile, moved back inside M, and a mask of own rows."""
  first = jnp.minimum(row, M - R)
  r_R = first + lax.iota(jnp.int32, R)
  return first, ((r_R >= row) & (r_R < end))[:, None]


def _forward(x_MxA, w_ExAxB, group_E, transpose, tiles):
  M = x_MxA.shape[0]
  E, A, B = w_ExAxB.shape
  if transpose:
    A, B = B, A
  acc = _accumulator(x_MxA.dtype)
  contract = (((1,), (1 if transpose else 0,)), ((), ()))
  end_E = jnp.cumsum(group_E)

  def expert(e, y_MxB):
    size, end = group_E[e], end_E[e]
    w = lax.dynamic_index_in_dim(w_ExAxB, e, keepdims=False)

    def tile(row, R, ragged, y_MxB):
      first, own_Rx1 = _own(row, R, M, end - size, end)
      if not ragged:
        first = row
      y_RxB = lax.dot_general(
        _rows(x_MxA, first, R), w, contract, preferred_element_type=acc
      )
      y_RxB = y_RxB.astype(y_MxB.dtype)
      if ragged:
        y_RxB = jnp.where(own_Rx1, y_RxB, _rows(y_MxB, first, R))
      return lax.dynamic_update_slice_in_dim(y_MxB, y_RxB, first, 0)

    return _cover(tiles, end - size, size, tile, y_MxB)

  y_MxB = jnp.zeros((M, B), x_MxA.dtype)
  return lax.fori_loop(0, E, expert, y_MxB)


def _drhs(x_MxA, dy_MxB, group_E, tiles, dtype):
  M, A = x_MxA.shape
  B = dy_MxB.shape[1]
  E = group_E.shape[0]
  acc = _accumulator(x_MxA.dtype)
  end_E = jnp.cumsum(group_E)

  def expert(e, dw_ExAxB):
    size, end = group_E[e], end_E[e]

    def tile(row, R, ragged, dw_AxB):
      first, own_Rx1 = _own(row, R, M, end - size, end)
      if not ragged:
        first = row
      x_RxA, dy_RxB = _rows(x_MxA, first, R), _rows(dy_MxB, first, R)
      if ragged:
        x_RxA = jnp.where(own_Rx1, x_RxA, jnp.zeros_like(x_RxA))
        dy_RxB = jnp.where(own_Rx1, dy_RxB, jnp.zeros_like(dy_RxB))
      return dw_AxB + lax.dot_general(
        x_RxA, dy_RxB, (((0,), (0,)), ((), ())), preferred_element_type=acc
      )

    dw_AxB = _cover(tiles, end - size, size, tile, jnp.zeros((A, B), acc))
    return lax.dynamic_update_index_in_dim(dw_ExAxB, dw_AxB.astype(dtype), e, 0)

  return lax.fori_loop(0, E, expert, jnp.zeros((E, A, B), dtype))


@jax.custom_vjp
def gmm(x_MxA, w_ExAxB, group_E):
  """y_MxB"""
  return _forward(
    x_MxA, w_ExAxB, group_E, False, _tiles(x_MxA.shape[0], w_ExAxB.shape[0])
  )


def _fwd(x_MxA, w_ExAxB, group_E):
  return gmm(x_MxA, w_ExAxB, group_E), (x_MxA, w_ExAxB, group_E)


def _bwd(saved, dy_MxB):
  x_MxA, w_ExAxB, group_E = saved
  tiles = _tiles(x_MxA.shape[0], w_ExAxB.shape[0])
  dx_MxA = _forward(dy_MxB, w_ExAxB, group_E, True, tiles)
  dw_ExAxB = _drhs(x_MxA, dy_MxB, group_E, tiles, w_ExAxB.dtype)
  return dx_MxA, dw_ExAxB, None


gmm.defvjp(_fwd, _bwd)
