"""Full: multi-head attention with biases (Vaswani et al., 1706.03762)."""

import math

import jax
from flax import nnx

from moe_jax import attention
from moe_jax.init import Scheme


class Attention(attention.Attention):
  """H heads of size D / H, without positions, over itself or a source.

  Raises:
    ValueError: H does not divide D.
  """

  crosses = True

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    S = attention.head_size(D, H)
    weight, bias = scheme.attention
    project = lambda: nnx.Param(weight(rngs.params(), (D, H, S), D, D))
    shift = lambda: nnx.Param(bias(rngs.params(), (H, S), D))
    self.query_DxHxS, self.bias_query_HxS = project(), shift()
    self.key_DxHxS, self.bias_key_HxS = project(), shift()
    self.value_DxHxS, self.bias_value_HxS = project(), shift()
    out_HxSxD = scheme.out.weight(rngs.params(), (H, S, D), D, D)
    self.out_HxSxD = nnx.Param(out_HxSxD * out_scale)
    self.bias_out_D = nnx.Param(scheme.out.bias(rngs.params(), (D,), D))

  def __call__(
    self,
    x_BxLxD: jax.Array,
    view: attention.View,
    source_BxMxD: jax.Array | None = None,
  ) -> jax.Array:
    """Keys and values are of the source, or of x if that is None."""
    dtype = x_BxLxD.dtype
    source_BxMxD = x_BxLxD if source_BxMxD is None else source_BxMxD

    def project(x_BxLxD, w_DxHxS, bias_HxS):
      bias_HxS = bias_HxS[...].astype(dtype)
      return attention.heads(x_BxLxD, w_DxHxS[...]) + bias_HxS[None, None]

    y_BxLxHxS = attention.attend(
      project(x_BxLxD, self.query_DxHxS, self.bias_query_HxS),
      project(source_BxMxD, self.key_DxHxS, self.bias_key_HxS),
      project(source_BxMxD, self.value_DxHxS, self.bias_value_HxS),
      view,
    )
    bias_D = self.bias_out_D[...].astype(dtype)
    return attention.join(y_BxLxHxS, self.out_HxSxD[...]) + bias_D[None, None]

  def products(self, L, M, causal):
    """Of queries and keys, and of values."""
    seen = attention.keys_seen(L, M, causal)
    return 2 * math.prod(self.out_HxSxD.shape[-3:-1]) * seen
