"""The grouped matmul by name: the only doorway to pallas_kernels."""

import importlib

import jax

GMM = ('cpu', 'xla')


def choose_gmm(impl: str | None) -> str:
  """The implementation that `gmm` runs here; ValueError for an unknown one."""
  if impl is None:
    return 'cpu' if jax.default_backend() == 'cpu' else 'xla'
  if impl not in GMM:
    raise ValueError(f'gmm is {impl!r}; there are {", ".join(GMM)}')
  return impl


def gmm(
  x_MxA: jax.Array,
  w_ExAxB: jax.Array,
  group_E: jax.Array,
  *,
  impl: str | None = None,
) -> jax.Array:
  """y_MxB: the first group_E[0] rows times w[0], the next times w[1], ...

  Rows from sum(group_E) on are undefined, in the result and in every gradient:
  callers mask with `where`. The gradient of an empty expert is exactly zero.

  Args:
    x_MxA: float rows, grouped by expert.
    w_ExAxB: a matrix per expert, of the same dtype.
    group_E: int32 rows per expert, with a sum of at most M.
    impl: 'cpu' (plain JAX without E-fold work), 'xla' (`jax.lax.ragged_dot`);
      None chooses for the platform. A named one runs or raises.
  """
  impl = choose_gmm(impl)
  if impl == 'xla':
    return jax.lax.ragged_dot(x_MxA, w_ExAxB, group_E)
  # Imported here, so that 'xla' works where pallas_kernels is absent.
  return importlib.import_module(f'pallas_kernels.{impl}').gmm(
    x_MxA, w_ExAxB, group_E
  )
