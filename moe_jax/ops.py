"""The grouped matmul by name: the only doorway to pallas_kernels."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import plans

GMM = ('cpu', 'tpu', 'interpret', 'gpu', 'xla', 'tokamax')
_PACKAGES = {
  'cpu': 'pallas_kernels',
  'tpu': 'pallas_kernels',
  'interpret': 'pallas_kernels',
  'gpu': 'pallas_kernels',
  'tokamax': 'tokamax',
}


def choose_gmm(impl: str | None, dtype: str = 'float32', *sides: int) -> str:
  """The implementation that `gmm` runs here, of matrices with these sides.

  For None that of the platform; on GPUs, where only Hopper has one, and that
  not for every matrix, else 'xla', of which `told` says what it costs.

  Raises ValueError for one that is unknown, not installed, or meant for another
  platform than jax's default.
  """
  platform = jax.default_backend()
  if impl is None:
    if platform == 'gpu':
      return 'gpu' if _hopper() and _multiplies(dtype, sides) else 'xla'
    return platform if platform in ('cpu', 'tpu') else 'xla'
  if impl not in GMM:
    raise ValueError(f'gmm is {impl!r}; there are {", ".join(GMM)}')
  package = _PACKAGES.get(impl)
  if package and importlib.util.find_spec(package) is None:
    raise ValueError(f'gmm is {impl!r}, but {package} is not installed')
  if impl == 'tpu' and platform != 'tpu':
    raise ValueError(
      f"gmm is 'tpu' on {platform}; 'interpret' runs that kernel anywhere"
    )
  if impl == 'gpu' and not _hopper():
    raise ValueError(
      f"gmm is 'gpu' on {jax.devices()[0].device_kind}, and for NVIDIA's"
      f' Hopper; {_OTHERS}'
    )
  return impl


_ALL = "multiplies each row by every expert's matrix"
_OTHERS = f"others on GPUs are 'tokamax' and 'xla', which {_ALL}"


def check(impl: str, dtype: str, *sides: int) -> None:
  """ValueError if `gmm` has no matrices of these sides and this dtype."""
  if impl == 'gpu' and not _multiplies(dtype, sides):
    raise ValueError(
      f"gmm 'gpu' has bfloat16 matrices of multiples of 64, not {dtype} of"
      f' {" x ".join(map(str, sides))}; {_OTHERS}'
    )


def told(impl: str) -> str:
  """An implementation, for who runs it: 'xla' is slow off TPUs."""
  slow = impl == 'xla' and jax.default_backend() != 'tpu'
  return f'{impl} ({_ALL})' if slow else impl


def _multiplies(dtype, sides):
  """Whether the kernel for Hopper has such matrices."""
  return dtype == 'bfloat16' and not any(side % 64 for side in sides)


def _hopper():
  capability = getattr(jax.devices()[0], 'compute_capability', '')
  return str(capability).startswith('9.')


def gmm(
  x_MxA: jax.Array,
  w_ExAxB: jax.Array,
  group_sizes_E: jax.Array,
  *,
  impl: str | None = None,
) -> jax.Array:
  """y_MxB: the first group_sizes_E[0] rows times w[0], the next times w[1], ...

  Rows from sum(group_sizes_E) on are undefined, in the result and in every
  gradient: callers mask with `where`. What stands there in x, or in the
  gradient of y, NaN included, reaches nothing else. The gradient of an empty
  expert is zero.

  Args:
    x_MxA: float rows, grouped by expert.
    w_ExAxB: a matrix per expert, of the same dtype.
    group_sizes_E: int32 rows per expert, with a sum of at most M.
    impl: 'cpu' (plain JAX without E-fold work), 'tpu' (a Mosaic kernel),
      'interpret' (the same under Pallas' interpreter, on any platform), 'gpu'
      (a Mosaic kernel for Hopper), 'xla' (`jax.lax.ragged_dot`; on GPUs E-fold
      work), 'tokamax' (`tokamax.ragged_dot`, which chooses among its own); None
      chooses for the platform. A named one runs or raises.

  Raises:
    NotImplementedError: the implementation has not the shape or dtype.
  """
  impl = impl or choose_gmm(None, x_MxA.dtype.name, *w_ExAxB.shape[1:])
  # Imported here, so that 'xla' works where pallas_kernels is absent.
  match impl:
    case 'xla':
      return _inside(jax.lax.ragged_dot, x_MxA, w_ExAxB, group_sizes_E)
    case 'cpu':
      kernel = importlib.import_module('pallas_kernels.cpu').gmm
      return kernel(x_MxA, w_ExAxB, group_sizes_E)
    case 'tpu' | 'interpret':
      kernel = importlib.import_module('pallas_kernels.tpu').gmm
      return kernel(
        x_MxA, w_ExAxB, group_sizes_E, interpret=impl == 'interpret'
      )
    case 'gpu':
      kernel = importlib.import_module('pallas_kernels.gpu').gmm
      return kernel(x_MxA, w_ExAxB, group_sizes_E)
    case 'tokamax':
      kernel = importlib.import_module('tokamax').ragged_dot
      return _inside(kernel, x_MxA, w_ExAxB, group_sizes_E)
  raise ValueError(f'gmm is {impl!r}; there are {", ".join(GMM)}')


@dataclasses.dataclass(frozen=True)
class Products:
  """The products of a grouped matmul and of its gradients, each by itself.

  Used by `fused`, which defines its own VJP. Rows from sum(group_sizes_E) on
  are undefined in what fwd, dlhs, up_and_activate and down_vjp return, and
  reach nothing else. With a token_M, int32 [M], the rows are x[token_M], and
  what it says past the groups does not matter. Several matrices of the same
  experts are one product where the implementation can.

  Attributes:
    fwd: (x, ws, group_sizes_E, token_M=None) -> (y_MxB, ...), x w of each w.
    dlhs: (dys, ws, group_sizes_E, token_M=None) -> dx_MxA, the sum of dy w^T.
    drhs: (x, dys, group_sizes_E, x_token_M=None, dy_token_M=None) ->
      (dw_ExAxB, ...), each expert's x^T dy, zero where it has no rows.
    up_and_activate: (activation, x, ws, group_sizes_E, biases=(), token_M=None)
      -> hidden_MxB, pre: those of fwd, with a bias_ExB for each or none, and
      activation(*pre), elementwise.
    down_vjp: (activation, dy, w, pre, gate_M, group_sizes_E, token_M=None) ->
      d_pre,
      weight * hidden, sum over A of dh * hidden; with dh = dy w^T, hidden =
      activation(*pre), and d_pre what weight * dh is before `activation`.
  """

  fwd: Callable[..., tuple[jax.Array, ...]]
  dlhs: Callable[..., jax.Array]
  drhs: Callable[..., tuple[jax.Array, ...]]
  up_and_activate: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
  down_vjp: Callable[..., tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]


def products(impl: str) -> Products:
  """Those of an implementation of `gmm`.

  Those of 'cpu' gather in the loads of the product; of the others, which have
  no such kernel, the gathered rows are an array that lives as long as one.
  """
  match impl:
    case 'cpu':
      kernels = importlib.import_module('pallas_kernels.cpu')
      return composed(kernels.fwd, kernels.dlhs, kernels.drhs)
    case 'tpu' | 'interpret':
      return _mosaic(interpret=impl == 'interpret')
  return by_gradients(functools.partial(gmm, impl=impl))


def composed(fwd, dlhs, drhs) -> Products:
  """Products of which nobody does elementwise work in their stores."""

  def up_and_activate(
    activation, x, ws, group_sizes_E, biases=(), token_M=None
  ):
    pre = fwd(x, ws, group_sizes_E, token_M)
    if biases:
      expert_M = plans.expert_of(group_sizes_E, len(pre[0]))
      pre = tuple(
        a_MxB + bias_ExB.at[expert_M].get(mode='fill', fill_value=0)
        for a_MxB, bias_ExB in zip(pre, biases, strict=True)
      )
    return activation(*pre), pre

  def down_vjp(
    activation, dy, w_ExAxB, pre, gate_M, group_sizes_E, token_M=None
  ):
    dh_MxA = dlhs([dy], [w_ExAxB], group_sizes_E, token_M)
    wide = np.promote_types(dh_MxA.dtype, gate_M.dtype)
    weight_Mx1 = gate_M[:, None].astype(wide)
    gated = lambda a_MxA: (a_MxA.astype(wide) * weight_Mx1).astype(a_MxA.dtype)
    hidden_MxA, pull = jax.vjp(activation, *pre)
    d_gate_M = jnp.sum(dh_MxA.astype(wide) * hidden_MxA.astype(wide), axis=1)
    return pull(gated(dh_MxA)), gated(hidden_MxA), d_gate_M

  return Products(fwd, dlhs, drhs, up_and_activate, down_vjp)


def by_gradients(gmm: Callable[..., jax.Array]) -> Products:
  """Those of any grouped matmul, one matrix after the other."""

  def fwd(x, ws, group_sizes_E, token_M=None):
    x_MxA = _taken(x, token_M)
    return tuple(gmm(x_MxA, w_ExAxB, group_sizes_E) for w_ExAxB in ws)

  def dlhs(dys, ws, group_sizes_E, token_M=None):
    total = None
    for dy, w_ExAxB in zip(dys, ws, strict=True):
      dy_MxB = _taken(dy, token_M)
      zeros_MxA = jnp.zeros_like(dy_MxB, shape=(len(dy_MxB), w_ExAxB.shape[1]))
      of_x = lambda x_MxA, w_ExAxB=w_ExAxB: gmm(x_MxA, w_ExAxB, group_sizes_E)
      (dx_MxA,) = jax.vjp(of_x, zeros_MxA)[1](dy_MxB)
      total = dx_MxA if total is None else total + dx_MxA
    return total

  def drhs(x, dys, group_sizes_E, x_token_M=None, dy_token_M=None):
    x_MxA, found = _taken(x, x_token_M), []
    of_w = lambda w_ExAxB: gmm(x_MxA, w_ExAxB, group_sizes_E)
    for dy in dys:
      dy_MxB = _taken(dy, dy_token_M)
      E, A, B = len(group_sizes_E), x_MxA.shape[1], dy_MxB.shape[1]
      zeros_ExAxB = jnp.zeros_like(dy_MxB, shape=(E, A, B))
      found.extend(jax.vjp(of_w, zeros_ExAxB)[1](dy_MxB))
    return tuple(found)

  return composed(fwd, dlhs, drhs)


def _mosaic(interpret: bool) -> Products:
  """Those of the TPU kernels, of which some do more than a product."""
  kernels = importlib.import_module('pallas_kernels.tpu')

  def fwd(x, ws, group_sizes_E, token_M=None):
    x_MxA = _taken(x, token_M)
    return tuple(
      kernels.gmm(x_MxA, w_ExAxB, group_sizes_E, interpret=interpret)
      for w_ExAxB in ws
    )

  def dlhs(dys, ws, group_sizes_E, token_M=None):
    rows = [_taken(dy, token_M) for dy in dys]
    return kernels.dlhs(rows, ws, group_sizes_E, interpret=interpret)

  def drhs(x, dys, group_sizes_E, x_token_M=None, dy_token_M=None):
    x_MxA = _taken(x, x_token_M)
    return tuple(
      kernels.drhs(
        x_MxA, _taken(dy, dy_token_M), group_sizes_E, interpret=interpret
      )
      for dy in dys
    )

  def up_and_activate(
    activation, x, ws, group_sizes_E, biases=(), token_M=None
  ):
    x_MxA = _taken(x, token_M)
    return kernels.into(
      activation, x_MxA, ws, group_sizes_E, biases, interpret=interpret
    )

  def down_vjp(
    activation, dy, w_ExAxB, pre, gate_M, group_sizes_E, token_M=None
  ):
    arrays = _taken(dy, token_M), w_ExAxB, pre, gate_M, group_sizes_E
    return kernels.slope(activation, *arrays, interpret=interpret)

  return Products(fwd, dlhs, drhs, up_and_activate, down_vjp)


def _taken(x, token_M):
  return x if token_M is None else x.at[token_M].get(mode='clip')


def _inside(ragged_dot, x_MxA, w_ExAxB, group_sizes_E):
  """A product that reaches past the groups, kept inside, also backward."""
  row_Mx1 = jnp.arange(x_MxA.shape[0], dtype=jnp.int32)[:, None]
  own_Mx1 = row_Mx1 < jnp.sum(group_sizes_E, dtype=jnp.int32)
  y_MxB = ragged_dot(jnp.where(own_Mx1, x_MxA, 0), w_ExAxB, group_sizes_E)
  return jnp.where(own_Mx1, y_MxB, 0)
