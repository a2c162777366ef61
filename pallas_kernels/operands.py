"""What every grouped matmul asks of its operands."""

import jax
import jax.numpy as jnp
from jax import lax


def check(x_MxA, w_ExAxB, group_sizes_E, dtypes, platform):
  """ValueError for shapes, NotImplementedError for dtypes that do not fit."""
  if (x_MxA.ndim, w_ExAxB.ndim, group_sizes_E.ndim) != (2, 3, 1) or (
    x_MxA.shape[1:] + group_sizes_E.shape != w_ExAxB.shape[1::-1]
  ):
    raise ValueError(
      'gmm wants x (M, A), w (E, A, B), group (E,), not '
      f'{x_MxA.shape}, {w_ExAxB.shape}, {group_sizes_E.shape}'
    )
  if x_MxA.dtype.name not in dtypes or w_ExAxB.dtype != x_MxA.dtype:
    raise NotImplementedError(
      f'gmm on {platform} takes x and w of one dtype among '
      f'{dtypes}, not {x_MxA.dtype}, {w_ExAxB.dtype}'
    )
  if group_sizes_E.dtype != jnp.int32:
    raise NotImplementedError(f'group must be int32, not {group_sizes_E.dtype}')


def same_axes(*trees):
  """Lets all vary over the same mesh axes, inside a checked shard_map.

  The transpose of this cast sums the gradient of a replicated weight.
  """
  arrays, structure = jax.tree.flatten(trees)
  axes = [jax.typeof(a).mat.varying for a in arrays]
  every = frozenset().union(*axes)
  return structure.unflatten(
    lax.pcast(a, tuple(every - own), to='varying') if every - own else a
    for a, own in zip(arrays, axes, strict=True)
  )


def like(x, shape):
  """A ShapeDtypeStruct of that shape that varies as x does, of its dtype."""
  return jax.ShapeDtypeStruct(
    shape, x.dtype, manual_axis_type=jax.typeof(x).mat
  )
