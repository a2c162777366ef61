"""Span: each token meets a fixed number of tokens before itself.

The attention of MomentumSMoE's language models (arXiv 2410.14574): adaptive
span (Sukhbaatar et al. 2019, 1905.07799) at its full span. Axes: P, the span;
W, the keys that a block of Q queries meets, Q + P - 1.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention, ranges
from moe_jax.init import Scheme


class Attention(attention.Attention):
  """softmax over j of (q_i k_j + q_i position_{j - i + P}) / sqrt(S).

  j runs over the P places before i, i itself left out, in the cache and these
  inputs. Nothing else is masked: a place before the stream's start holds the
  input 0, and documents are not kept apart. No projection has a bias.

  Args:
    span: P.

  Raises:
    ValueError: H does not divide D, or, when called, the cache is not P long.
  """

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    span: ranges.Count = 256,
    rngs: nnx.Rngs,
  ):
    self.caches = span
    S = attention.head_size(D, H)
    weight = scheme.attention.weight
    project = lambda: weight(rngs.params(), (D, H, S), D, D)
    self.query_DxHxS = nnx.Param(project())
    self.key_DxHxS = nnx.Param(project())
    self.value_DxHxS = nnx.Param(project())
    out_HxSxD = scheme.out.weight(rngs.params(), (H, S, D), D, D)
    self.out_HxSxD = nnx.Param(out_HxSxD * out_scale)

  @staticmethod
  def shared(
    H: int, D: int, rngs: nnx.Rngs, *, span: int = 256
  ) -> dict[str, nnx.Param]:
    """`position_SxP` of all heads and layers; the oldest place is first."""
    shape = attention.head_size(D, H), span
    return {'position_SxP': nnx.Param(jax.random.normal(rngs.params(), shape))}

  def __call__(self, x_BxLxD: jax.Array, view: attention.View) -> jax.Array:
    """The view's `shared` has position_SxP; its cache is of zeros if None."""
    B, L, D = x_BxLxD.shape
    dtype, P = x_BxLxD.dtype, self.caches
    cache_BxPxD = view.cache_BxCxD
    if cache_BxPxD is None:
      cache_BxPxD = jnp.zeros((B, P, D), dtype)
    if cache_BxPxD.shape[1] != P:
      raise ValueError(f'a cache of {cache_BxPxD.shape[1]} inputs, not {P}')
    past_BxMxD = jnp.concatenate([cache_BxPxD.astype(dtype), x_BxLxD], axis=1)
    q_BxLxHxS = attention.heads(x_BxLxD, self.query_DxHxS[...])
    k_BxMxHxS = attention.heads(past_BxMxD, self.key_DxHxS[...])
    v_BxMxHxS = attention.heads(past_BxMxD, self.value_DxHxS[...])
    position_SxP = view.shared['position_SxP']
    answers = []
    for first in range(0, L, attention.block(L)):
      q_BxQxHxS = q_BxLxHxS[:, first : first + attention.block(L)]
      # Token i of the block is at place P + first + i of the past.
      end = first + q_BxQxHxS.shape[1] + P - 1
      k_BxWxHxS, v_BxWxHxS = k_BxMxHxS[:, first:end], v_BxMxHxS[:, first:end]
      answers.append(
        jax.checkpoint(_attend)(q_BxQxHxS, k_BxWxHxS, v_BxWxHxS, position_SxP)
      )
    return attention.join(jnp.concatenate(answers, 1), self.out_HxSxD[...])

  def products(self, L, M, causal):
    """With the keys, the places and the values of the whole span."""
    del L, M, causal
    return 3 * math.prod(self.out_HxSxD.shape[-3:-1]) * self.caches


def _attend(q_BxQxHxS, k_BxWxHxS, v_BxWxHxS, position_SxP):
  """Query i meets the keys i to i + P - 1."""
  S, P = position_SxP.shape
  dtype = q_BxQxHxS.dtype
  wide = np.promote_types(dtype, jnp.float32)
  score_BxHxQxW = jnp.einsum(
    'bqhs,bwhs->bhqw', q_BxQxHxS, k_BxWxHxS, preferred_element_type=wide
  )
  # Cast before, not by preferred_element_type: XLA on CPU has no such product.
  place_BxHxQxP = jnp.einsum(
    'bqhs,sp->bhqp', q_BxQxHxS.astype(wide), position_SxP.astype(wide)
  )
  score_BxHxQxP = _band(score_BxHxQxW, P) + place_BxHxQxP
  probs_BxHxQxP = jax.nn.softmax(score_BxHxQxP * S**-0.5, axis=-1)
  probs_BxHxQxW = _unband(probs_BxHxQxP.astype(dtype))
  return jnp.einsum('bhqw,bwhs->bqhs', probs_BxHxQxW, v_BxWxHxS)


def _band(a_BxHxQxW, P):
  """[.., q, p] is a[.., q, q + p]: rows that are one longer shift by one."""
  B, H, Q, W = a_BxHxQxW.shape
  flat = jnp.pad(a_BxHxQxW.reshape(B, H, Q * W), ((0, 0), (0, 0), (0, Q)))
  return flat.reshape(B, H, Q, W + 1)[..., :P]


def _unband(a_BxHxQxP):
  """[.., q, q + p] is a[.., q, p] and the rest 0: the inverse of `_band`."""
  B, H, Q, P = a_BxHxQxP.shape
  W = Q + P - 1
  long = jnp.pad(a_BxHxQxP, ((0, 0), (0, 0), (0, 0), (0, W + 1 - P)))
  return long.reshape(B, H, Q * (W + 1))[..., : Q * W].reshape(B, H, Q, W)
