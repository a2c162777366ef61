"""Rotary: grouped queries (arXiv 2305.13245), RoPE (arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention
from moe_jax.init import Scheme


class Attention(attention.Attention):
  """H query heads over J key-value heads, without biases.

  Args:
    J: H if None.
    theta: base of the rotary frequencies.

  Raises:
    ValueError: J does not divide H, H not D, or heads have an odd size.
  """

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    J: int | None = None,
    theta: float = 10_000.0,
    rngs: nnx.Rngs,
  ):
    self.theta = theta
    J, S = H if J is None else J, attention.head_size(D, H)
    if H % J:
      raise ValueError(f'J ({J}) does not divide H ({H})')
    if S % 2:
      raise ValueError(
        f'D={D} over H={H} heads gives the odd size {S},'
        ' which rotary positions cannot pair'
      )
    weight = scheme.attention.weight
    project = lambda H: weight(rngs.params(), (D, H, S), D, H * S)
    self.query_DxHxS = nnx.Param(project(H))
    self.key_DxJxS = nnx.Param(project(J))
    self.value_DxJxS = nnx.Param(project(J))
    out_HxSxD = scheme.out.weight(rngs.params(), (H, S, D), H * S, D)
    self.out_HxSxD = nnx.Param(out_HxSxD * out_scale)

  def __call__(self, x_BxLxD: jax.Array, view: attention.View) -> jax.Array:
    S = self.query_DxHxS.shape[2]
    wide = np.promote_types(x_BxLxD.dtype, jnp.float32)
    frequency_P = self.theta ** (-jnp.arange(0, S, 2, dtype=wide) / S)
    q_BxLxHxS = attention.heads(x_BxLxD, self.query_DxHxS[...])
    k_BxLxJxS = attention.heads(x_BxLxD, self.key_DxJxS[...])
    v_BxLxJxS = attention.heads(x_BxLxD, self.value_DxJxS[...])
    y_BxLxHxS = attention.attend(
      attention.rotate(q_BxLxHxS, frequency_P),
      attention.rotate(k_BxLxJxS, frequency_P),
      v_BxLxJxS,
      view,
    )
    return attention.join(y_BxLxHxS, self.out_HxSxD[...])
