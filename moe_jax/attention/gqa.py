"""Rotary: grouped queries (arXiv 2305.13245), RoPE (arXiv 2104.09864)."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention, ranges
from moe_jax.init import Scheme
from moe_jax.norm import RMSNorm

NORMED = ('none', 'head', 'all')


class Attention(attention.Attention):
  """H query heads over J key-value heads.

  Args:
    num_kv_heads: J; H if None.
    size: S, of a head; D / H if None.
    theta: base of the rotary frequencies.
    window: a token sees so many tokens at most, itself the last; all if None.
    bias: whether the projections have biases.
    qk_norm: what RMS normalises of queries and keys before they turn: 'none';
      each 'head', with one scale for all heads (Qwen3); or 'all' heads as one
      vector (OLMoE).
    eps: of these norms.
    yarn_factor, yarn_beta_fast, yarn_beta_slow, yarn_length, yarn_by_turns: of
      attention.Yarn; a factor of 0 extends nothing.
    yarn_amplitude: factor on queries and keys; 1 + ln(yarn_factor) / 10 if
      None.

  Raises:
    ValueError: num_kv_heads does not divide H, H not D where `size` is None, or
      heads have an odd size.
  """

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    num_kv_heads: ranges.Count | None = None,
    size: ranges.Count | None = None,
    theta: attention.Base = 10_000.0,
    window: ranges.Count | None = None,
    bias: bool = False,
    qk_norm: Annotated[str, ranges.OneOf(NORMED)] = 'none',
    eps: ranges.Positive = 1e-6,
    yarn_factor: ranges.NonNegative = 0.0,
    yarn_beta_fast: ranges.Positive = 32.0,
    yarn_beta_slow: ranges.Positive = 1.0,
    yarn_amplitude: ranges.Positive | None = None,
    yarn_length: ranges.Count = 4096,
    yarn_by_turns: bool = False,
    rngs: nnx.Rngs,
  ):
    J = H if num_kv_heads is None else num_kv_heads
    S = attention.head_size(D, H) if size is None else size
    _check(D, H, J, S)
    self.window, self.bias, self.qk_norm = window, bias, qk_norm
    yarn = attention.Yarn(
      *(yarn_factor, yarn_beta_fast, yarn_beta_slow),
      *(yarn_length, yarn_by_turns),
    )
    self.frequency_P = tuple(yarn.frequency(theta, S).tolist())
    self.amplitude = yarn_amplitude
    if yarn_amplitude is None or not yarn_factor:
      self.amplitude = yarn.amplitude()
    weight, shift = scheme.attention
    project = lambda H: weight(rngs.params(), (D, H, S), D, H * S)
    self.query_DxHxS = nnx.Param(project(H))
    self.key_DxJxS = nnx.Param(project(J))
    self.value_DxJxS = nnx.Param(project(J))
    out_HxSxD = scheme.out.weight(rngs.params(), (H, S, D), H * S, D)
    self.out_HxSxD = nnx.Param(out_HxSxD * out_scale)
    if bias:
      self.bias_query_HxS = nnx.Param(shift(rngs.params(), (H, S), D))
      self.bias_key_JxS = nnx.Param(shift(rngs.params(), (J, S), D))
      self.bias_value_JxS = nnx.Param(shift(rngs.params(), (J, S), D))
      self.bias_out_D = nnx.Param(scheme.out.bias(rngs.params(), (D,), H * S))
    if qk_norm != 'none':
      whole = qk_norm == 'all'
      self.norm_query = RMSNorm(H * S if whole else S, eps)
      self.norm_key = RMSNorm(J * S if whole else S, eps)

  def __call__(self, x_BxLxD: jax.Array, view: attention.View) -> jax.Array:
    q_BxLxHxS = self._heads(x_BxLxD, 'query_DxHxS', 'bias_query_HxS')
    if self.qk_norm != 'none':
      q_BxLxHxS = self._normed(q_BxLxHxS, self.norm_query)
    q_BxLxHxS = self._rotate(q_BxLxHxS, view.place_BxL)
    if view.kv_cache is None:
      of = self.kv_entries(x_BxLxD, None)
      y_BxLxHxS = attention.attend(
        q_BxLxHxS, of['k_BxLxJxS'], of['v_BxLxJxS'], view, window=self.window
      )
    else:
      of = view.kv_cache
      y_BxLxHxS = attention.attend_kept(
        q_BxLxHxS,
        of['k_BxLxJxS'],
        of['v_BxLxJxS'],
        view.place_BxL,
        window=self.window,
      )
    y_BxLxD = attention.join(y_BxLxHxS, self.out_HxSxD[...])
    if self.bias:
      y_BxLxD += self.bias_out_D[...].astype(y_BxLxD.dtype)[None, None]
    return y_BxLxD

  def products(self, L, M, causal):
    """As full attention, over the keys in the window."""
    seen = attention.keys_seen(L, M, causal, self.window)
    return 2 * math.prod(self.out_HxSxD.shape[-3:-1]) * seen

  def kv_entries(self, x_BxLxD, place_BxL):
    """Keys, turned, and values."""
    k_BxLxJxS = self._heads(x_BxLxD, 'key_DxJxS', 'bias_key_JxS')
    if self.qk_norm != 'none':
      k_BxLxJxS = self._normed(k_BxLxJxS, self.norm_key)
    return {
      'k_BxLxJxS': self._rotate(k_BxLxJxS, place_BxL),
      'v_BxLxJxS': self._heads(x_BxLxD, 'value_DxJxS', 'bias_value_JxS'),
    }

  def _heads(self, x_BxLxD, weight, bias):
    y_BxLxHxS = attention.heads(x_BxLxD, getattr(self, weight)[...])
    if self.bias:
      bias_HxS = getattr(self, bias)[...].astype(y_BxLxHxS.dtype)
      y_BxLxHxS += bias_HxS[None, None]
    return y_BxLxHxS

  def _normed(self, x_BxLxHxS, norm):
    if self.qk_norm == 'head':
      return norm(x_BxLxHxS)
    B, L, H, S = x_BxLxHxS.shape
    return norm(x_BxLxHxS.reshape(B, L, H * S)).reshape(B, L, H, S)

  def _rotate(self, x_BxLxHxS, place_BxL):
    wide = np.promote_types(x_BxLxHxS.dtype, jnp.float32)
    frequency_P = jnp.asarray(self.frequency_P, wide)
    return attention.rotate(x_BxLxHxS, frequency_P, place_BxL) * self.amplitude


def _check(D, H, J, S):
  if H % J:
    raise ValueError(f'num_kv_heads ({J}) does not divide H ({H})')
  if S % 2:
    raise ValueError(
      f'D={D} over H={H} heads gives the odd size {S},'
      ' which rotary positions cannot pair'
    )
