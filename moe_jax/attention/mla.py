"""Latent: keys and values from one small vector (DeepSeek-V2, 2405.04434).

Axes of this file: S = W + P, the parts of a query or key without and with a
position; U, size of a value; Z and Y, ranks of the key-value and of the query.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention, ranges
from moe_jax.init import Scheme
from moe_jax.norm import RMSNorm


class Attention(attention.Attention):
  """Multi-head latent attention (eq. 9-19), without biases.

  Args:
    nope, rope, value: W, P and U. P of a key is one for all heads.
    rank: Z. The latent is normalised, by RMS.
    query_rank: Y, likewise; queries are not compressed if None.
    theta: base of the rotary frequencies.
    interleaved: a rotated pair is (2i, 2i + 1), as in DeepSeek's weights; else
      (i, i + P/2).
    yarn_factor: by how much the context of `yarn_length` tokens is extended
      (YaRN, arXiv 2309.00071); 0 is not at all. Pairs that turn more than
      `yarn_beta_fast` times in it keep their frequency, those below
      `yarn_beta_slow` are slowed by the factor. The rotated parts are scaled by
      m(mscale) / m(mscale_all_dim) and all scores by m(mscale_all_dim)^2, with
      m(a) = 1 + a ln(factor) / 10.

  Raises:
    ValueError: `rope` is odd.
  """

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    nope: ranges.Count = 128,
    rope: ranges.Count = 64,
    value: ranges.Count = 128,
    rank: ranges.Count = 512,
    query_rank: ranges.Count | None = None,
    theta: attention.Base = 10_000.0,
    interleaved: bool = True,
    yarn_factor: ranges.NonNegative = 0.0,
    yarn_beta_fast: ranges.Positive = 32.0,
    yarn_beta_slow: ranges.Positive = 1.0,
    yarn_mscale: ranges.NonNegative = 1.0,
    yarn_mscale_all_dim: ranges.NonNegative = 0.0,
    yarn_length: ranges.Count = 4096,
    rngs: nnx.Rngs,
  ):
    if rope % 2:
      raise ValueError(f'a rotated part of odd size, rope={rope}, has no pairs')
    self.nope, self.interleaved = nope, interleaved
    self.compressed = query_rank is not None
    yarn = attention.Yarn(
      yarn_factor, yarn_beta_fast, yarn_beta_slow, yarn_length
    )
    self.frequency_P = tuple(yarn.frequency(theta, rope).tolist())
    all_dim = yarn.amplitude(yarn_mscale_all_dim)
    self.amplitude = yarn.amplitude(yarn_mscale) / all_dim
    self.scale = all_dim**2 * (nope + rope) ** -0.5

    def weight(*shape):
      fans = shape[0], math.prod(shape[1:])
      return nnx.Param(scheme.attention.weight(rngs.params(), shape, *fans))

    if self.compressed:
      self.query_DxY = weight(D, query_rank)
      self.norm_query = RMSNorm(query_rank)
      self.query_YxHxS = weight(query_rank, H, nope + rope)
    else:
      self.query_DxHxS = weight(D, H, nope + rope)
    self.latent_DxZ = weight(D, rank)
    self.norm_latent = RMSNorm(rank)
    self.key_ZxHxW = weight(rank, H, nope)
    self.value_ZxHxU = weight(rank, H, value)
    self.key_DxP = weight(D, rope)
    out_HxUxD = scheme.out.weight(rngs.params(), (H, value, D), H * value, D)
    self.out_HxUxD = nnx.Param(out_HxUxD * out_scale)

  def __call__(self, x_BxLxD: jax.Array, view: attention.View) -> jax.Array:
    q_BxLxHxS = self._query(x_BxLxD)
    q_BxLxHxW, q_BxLxHxP = jnp.split(q_BxLxHxS, [self.nope], axis=-1)
    q_BxLxHxP = self._rotate(q_BxLxHxP, view.place_BxL)
    if view.kv_cache is None:
      y_BxLxHxU = self._attend(q_BxLxHxW, q_BxLxHxP, x_BxLxD, view)
    else:
      y_BxLxHxU = self._attend_kept(q_BxLxHxW, q_BxLxHxP, view)
    return attention.join(y_BxLxHxU, self.out_HxUxD[...])

  def products(self, L, M, causal):
    """Of queries and keys of both parts, and of values."""
    (H, W), U = self.key_ZxHxW.shape[-2:], self.value_ZxHxU.shape[-1]
    P = self.key_DxP.shape[-1]
    return H * (W + P + U) * attention.keys_seen(L, M, causal)

  def kv_entries(self, x_BxLxD, place_BxL):
    """The latent, and the part of a key that has a position."""
    dtype = x_BxLxD.dtype
    latent_BxLxZ = self.norm_latent(
      x_BxLxD @ self.latent_DxZ[...].astype(dtype)
    )
    key_BxLxP = x_BxLxD @ self.key_DxP[...].astype(dtype)
    key_BxLxP = self._rotate(key_BxLxP[:, :, None], place_BxL)[:, :, 0]
    return {'latent_BxLxZ': latent_BxLxZ, 'key_BxLxP': key_BxLxP}

  def _attend(self, q_BxLxHxW, q_BxLxHxP, x_BxLxD, view):
    of = self.kv_entries(x_BxLxD, None)
    k_BxLxHxW = attention.heads(of['latent_BxLxZ'], self.key_ZxHxW[...])
    v_BxLxHxU = attention.heads(of['latent_BxLxZ'], self.value_ZxHxU[...])
    k_BxLxHxP = jnp.broadcast_to(of['key_BxLxP'][:, :, None], q_BxLxHxP.shape)
    return attention.attend(
      jnp.concatenate([q_BxLxHxW, q_BxLxHxP], axis=-1),
      jnp.concatenate([k_BxLxHxW, k_BxLxHxP], axis=-1),
      v_BxLxHxU,
      view,
      self.scale,
    )

  def _attend_kept(self, q_BxLxHxW, q_BxLxHxP, view):
    """The same among latents: one key and one value for all heads."""
    dtype = q_BxLxHxW.dtype
    latent_BxMxZ, key_BxMxP = (
      view.kv_cache[name] for name in ('latent_BxLxZ', 'key_BxLxP')
    )
    q_BxLxHxZ = jnp.einsum(
      'blhw,zhw->blhz', q_BxLxHxW, self.key_ZxHxW[...].astype(dtype)
    )
    y_BxLxHxZ = attention.attend_kept(
      jnp.concatenate([q_BxLxHxZ, q_BxLxHxP], axis=-1),
      jnp.concatenate([latent_BxMxZ, key_BxMxP], axis=-1)[:, :, None],
      latent_BxMxZ[:, :, None],
      view.place_BxL,
      self.scale,
    )
    value_ZxHxU = self.value_ZxHxU[...].astype(dtype)
    return jnp.einsum('blhz,zhu->blhu', y_BxLxHxZ, value_ZxHxU)

  def _query(self, x_BxLxD):
    if not self.compressed:
      return attention.heads(x_BxLxD, self.query_DxHxS[...])
    query_BxLxY = x_BxLxD @ self.query_DxY[...].astype(x_BxLxD.dtype)
    return attention.heads(self.norm_query(query_BxLxY), self.query_YxHxS[...])

  def _rotate(self, x_BxLxHxP, place_BxL):
    wide = np.promote_types(x_BxLxHxP.dtype, jnp.float32)
    if self.interleaved:
      x_BxLxHxP = jnp.concatenate(
        [x_BxLxHxP[..., 0::2], x_BxLxHxP[..., 1::2]], axis=-1
      )
    frequency_P = jnp.asarray(self.frequency_P, wide)
    return attention.rotate(x_BxLxHxP, frequency_P, place_BxL) * self.amplitude
