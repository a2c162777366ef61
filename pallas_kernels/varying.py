"""What a checked shard_map wants of a kernel: all operands vary alike."""

import jax
from jax import lax


def same_axes(*arrays):
  """Lets all vary over the same mesh axes, inside a checked shard_map.

  The transpose of this cast sums the gradient of a replicated weight.
  """
  axes = [jax.typeof(a).mat.varying for a in arrays]
  every = frozenset().union(*axes)
  return [
    lax.pcast(a, tuple(every - own), to='varying') if every - own else a
    for a, own in zip(arrays, axes, strict=True)
  ]


def like(x, shape):
  """A ShapeDtypeStruct of that shape that varies as x does, of its dtype."""
  return jax.ShapeDtypeStruct(
    shape, x.dtype, manual_axis_type=jax.typeof(x).mat
  )
