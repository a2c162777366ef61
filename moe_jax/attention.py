"""Causal self-attention: grouped queries, rotary positions, documents apart."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Queries that meet the keys up to them at once: at least, and blocks at most.
_BLOCK, _BLOCKS = 128, 8


class Norm(nnx.Module):
  """RMSNorm, computed in at least float32 (Zhang, Sennrich, 1910.07467)."""

  def __init__(self, D: int, eps: float = 1e-6):
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones((D,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = np.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale_D = self.scale_D[...].astype(wide)
    return (y * scale_D.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
  """H query heads over J key-value heads of size S (GQA, arXiv 2305.13245).

  Args:
    theta: base of the rotary frequencies (RoPE, arXiv 2104.09864).
    out_scale: factor on the initial output projection.
  """

  def __init__(
    self,
    D: int,
    H: int,
    J: int,
    S: int,
    *,
    theta: float,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.theta = theta
    init = nnx.initializers.lecun_normal()
    self.query_DxHxS = nnx.Param(_heads(init, rngs, D, H, S))
    self.key_DxJxS = nnx.Param(_heads(init, rngs, D, J, S))
    self.value_DxJxS = nnx.Param(_heads(init, rngs, D, J, S))
    out_HSxD = init(rngs.params(), (H * S, D)) * out_scale
    self.out_HxSxD = nnx.Param(out_HSxD.reshape(H, S, D))

  def __call__(self, x_BxLxD: jax.Array, segment_BxL: jax.Array) -> jax.Array:
    """y_BxLxD; a token sees itself and what precedes it in its document."""
    dtype = x_BxLxD.dtype
    project = lambda w: jnp.einsum('bld,dhs->blhs', x_BxLxD, w.astype(dtype))
    q_BxLxHxS = rotate(project(self.query_DxHxS[...]), self.theta)
    k_BxLxJxS = rotate(project(self.key_DxJxS[...]), self.theta)
    v_BxLxJxS = project(self.value_DxJxS[...])
    y_BxLxHxS = attend(q_BxLxHxS, k_BxLxJxS, v_BxLxJxS, segment_BxL)
    out_HxSxD = self.out_HxSxD[...].astype(dtype)
    return jnp.einsum('blhs,hsd->bld', y_BxLxHxS, out_HxSxD)


def attend(
  q_BxLxHxS: jax.Array,
  k_BxLxJxS: jax.Array,
  v_BxLxJxS: jax.Array,
  segment_BxL: jax.Array,
) -> jax.Array:
  """softmax(q k / sqrt(S)) v over the tokens of the same segment up to here.

  Head h reads key-value head h // (H / J). The softmax is in at least float32.
  """
  L = q_BxLxHxS.shape[1]
  # A block of queries does not meet the keys after it: half the work is saved
  # in the limit. Its scores are computed again for the gradient, not kept.
  size = max(_BLOCK, -(-L // _BLOCKS))
  blocks = [
    jax.checkpoint(_attend)(
      q_BxLxHxS[:, first : first + size],
      k_BxLxJxS[:, : first + size],
      v_BxLxJxS[:, : first + size],
      segment_BxL[:, : first + size],
    )
    for first in range(0, L, size)
  ]
  return jnp.concatenate(blocks, axis=1)


def _attend(q_BxQxHxS, k_BxLxJxS, v_BxLxJxS, segment_BxL):
  """The last Q of L tokens, as queries."""
  (B, Q, H, S), (L, J) = q_BxQxHxS.shape, k_BxLxJxS.shape[1:3]
  dtype = q_BxQxHxS.dtype
  wide = np.promote_types(dtype, jnp.float32)
  q_BxQxJxGxS = q_BxQxHxS.reshape(B, Q, J, H // J, S)
  score_BxJxGxQxL = jnp.einsum(
    'bqjgs,bmjs->bjgqm', q_BxQxJxGxS, k_BxLxJxS, preferred_element_type=wide
  )
  same_BxQxL = segment_BxL[:, L - Q :, None] == segment_BxL[:, None, :]
  seen_BxQxL = same_BxQxL & jnp.tri(Q, L, L - Q, dtype=bool)[None]
  score_BxJxGxQxL = jnp.where(
    seen_BxQxL[:, None, None], score_BxJxGxQxL * S**-0.5, -jnp.inf
  )
  probs_BxJxGxQxL = jax.nn.softmax(score_BxJxGxQxL, axis=-1).astype(dtype)
  y_BxQxJxGxS = jnp.einsum('bjgqm,bmjs->bqjgs', probs_BxJxGxQxL, v_BxLxJxS)
  return y_BxQxJxGxS.reshape(B, Q, H, S)


def rotate(x_BxLxHxS: jax.Array, theta: float) -> jax.Array:
  """Rotates the pairs (i, i + S/2) of each head by position * frequency."""
  L, S = x_BxLxHxS.shape[1], x_BxLxHxS.shape[3]
  wide = np.promote_types(x_BxLxHxS.dtype, jnp.float32)
  frequency = theta ** (-jnp.arange(0, S, 2, dtype=wide) / S)
  angle_LxS = jnp.arange(L, dtype=wide)[:, None] * frequency[None]
  cos = jnp.cos(angle_LxS)[None, :, None]
  sin = jnp.sin(angle_LxS)[None, :, None]
  a, b = jnp.split(x_BxLxHxS.astype(wide), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BxLxHxS.dtype)


def _heads(init, rngs, D, H, S):
  return init(rngs.params(), (D, H * S)).reshape(D, H, S)
