"""Attention: how tokens meet. One kind per file, found by its name.

A file here defines one class `Attention(attention.Attention)`; `{'name':
'gqa', 'num_kv_heads': 2}` in a config makes `gqa.Attention(D, H, scheme=scheme,
rngs=rngs, num_kv_heads=2)`. Nothing else has to be edited.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import byname, ranges
from moe_jax.init import Scheme

# Queries that meet the keys up to them at once: at least, and blocks at most.
_BLOCK, _BLOCKS = 128, 8
# Of rotary frequencies, which fall from pair to pair.
Base = Annotated[float, ranges.Within('(1, inf)')]


@flax.struct.dataclass
class View:
  """Who sees whom. Self-attention has one array for queries and keys."""

  query_BxL: jax.Array  # int32, segment of each query's token
  key_BxL: jax.Array  # int32, of each key's; seen from the same one; -1 padding
  causal: bool = flax.struct.field(pytree_node=False)  # no later key is seen
  shared: Any = None  # arrays of what `Attention.shared` made for all layers
  cache_BxCxD: jax.Array | None = None  # inputs before the first of these
  # Of a text that is being written: the place of each query in its row, and
  # `kv_entries` of the tokens up to it by their places, [B, M, ...].
  place_BxL: jax.Array | None = None
  kv_cache: Any = None


class Attention(nnx.Module):
  """The contract: H heads over a stream of width D.

  Attributes:
    caches: how many inputs before these the view's `cache_BxCxD` may hold.
    crosses: whether it is also called with another sequence, (x_BxLxD, view,
      source_BxMxD), whose tokens the view's keys then are.
  """

  caches = 0
  crosses = False

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    if '__init__' in vars(cls):
      cls.__init__ = ranges.checked(cls.__init__)

  def __init__(
    self,
    D: int,
    H: int,
    *,
    scheme: Scheme,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    """`out_scale` is a factor on the initial output projection."""
    raise NotImplementedError

  @staticmethod
  def shared(
    H: int, D: int, rngs: nnx.Rngs, **options: Any
  ) -> dict[str, nnx.Param]:
    """By their names, the parameters that all layers of these options share."""
    del H, D, rngs, options
    return {}

  def __call__(self, x_BxLxD: jax.Array, view: View) -> jax.Array:
    """y_BxLxD, in the dtype of x."""
    raise NotImplementedError

  def products(self, L: int, M: int, causal: bool) -> float:
    """Multiplications of a query with its keys and with their values.

    Of all heads, and the mean over L queries that meet M keys; those with a
    weight are not counted. `cost` of a model multiplies it by its layers.
    """
    raise NotImplementedError

  def kv_entries(
    self, x_BxLxD: jax.Array, place_BxL: jax.Array | None
  ) -> dict[str, jax.Array]:
    """What later queries need of these tokens, [B, L, ...].

    Args:
      place_BxL: int32, in their rows; 0 to L - 1 if None.

    Raises:
      ValueError: this kind does not write texts.
    """
    kind = type(self).__module__.rpartition('.')[2]
    raise ValueError(f'attention {kind!r} keeps no keys, and writes no texts')

  def update_kv_cache(
    self, kv_cache: Any, x_BxLxD: jax.Array, place_BxL: jax.Array
  ) -> dict[str, jax.Array]:
    """`kv_cache` with the entries of these tokens at their places."""
    row_Bx1 = jnp.arange(len(x_BxLxD), dtype=jnp.int32)[:, None]
    put = lambda old, new: old.at[row_Bx1, place_BxL].set(new, mode='drop')
    return jax.tree.map(put, kv_cache, self.kv_entries(x_BxLxD, place_BxL))


def keys_seen(L: int, M: int, causal: bool, window: int | None = None) -> float:
  """How many of M keys a query sees, the mean over L; padding is not counted.

  Causal queries see the keys up to their own, `window` of them at most.
  """
  if not causal:
    return float(M)
  most = min(window or L, L)
  return (most * (most + 1) / 2 + (L - most) * most) / L


def names() -> list[str]:
  """The kinds of attention that exist."""
  return byname.names(__name__)


def get(name: str) -> type[Attention]:
  """The class in moe_jax/attention/<name>.py; ValueError if there is none."""
  return byname.find(__name__, 'attention', name).Attention


def attend(
  q_BxLxHxS: jax.Array,
  k_BxMxJxS: jax.Array,
  v_BxMxJxU: jax.Array,
  view: View,
  scale: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """y_BxLxHxU: softmax(q k * scale) v over the keys that each query sees.

  Head h reads key-value head h // (H / J). The softmax is in at least float32.
  The answer to a query that sees no key is 0. If the view is causal, query i
  and key i are the same token.

  Args:
    scale: S**-0.5 if None.
    window: a causal query sees so many keys at most, the last of them its own
      token's; None: all.
  """
  L, S = q_BxLxHxS.shape[1], q_BxLxHxS.shape[3]
  scale = S**-0.5 if scale is None else scale
  # A block of queries does not meet the keys after it: half the work is saved
  # in the limit. Its scores are computed again for the gradient, not kept.
  size = block(L) if view.causal else L
  answers = []
  for first in range(0, L, size):
    piece = functools.partial(
      _piece, first, size, causal=view.causal, scale=scale, window=window
    )
    whole = q_BxLxHxS, k_BxMxJxS, v_BxMxJxU, view.query_BxL, view.key_BxL
    answers.append(jax.checkpoint(piece)(*whole))
  return jnp.concatenate(answers, axis=1)


def attend_kept(
  q_BxLxHxS: jax.Array,
  k_BxMxJxS: jax.Array,
  v_BxMxJxU: jax.Array,
  place_BxL: jax.Array,
  scale: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """The same over keys by their places, up to that of each query."""
  scale = q_BxLxHxS.shape[3] ** -0.5 if scale is None else scale
  key_1x1xM = jnp.arange(k_BxMxJxS.shape[1], dtype=jnp.int32)[None, None]
  ahead_BxLxM = place_BxL[:, :, None] - key_1x1xM
  seen_BxLxM = ahead_BxLxM >= 0
  if window is not None:
    seen_BxLxM &= ahead_BxLxM < window
  return _attend(q_BxLxHxS, k_BxMxJxS, v_BxMxJxU, seen_BxLxM, scale)


def block(L: int) -> int:
  """How many of L causal queries meet their keys at once."""
  return max(_BLOCK, -(-L // _BLOCKS))


def _piece(
  first,
  size,
  q_BxLxHxS,
  k_BxMxJxS,
  v_BxMxJxU,
  query_BxL,
  key_BxM,
  *,
  causal,
  scale,
  window,
):
  """The answers to `size` queries; cut here, so that no piece is kept."""
  begin, last = 0, first + size if causal else None
  if causal and window is not None:
    begin = max(first + 1 - window, 0)
  q_BxQxHxS = q_BxLxHxS[:, first : first + size]
  k_BxMxJxS, v_BxMxJxU = k_BxMxJxS[:, begin:last], v_BxMxJxU[:, begin:last]
  query_BxQ = query_BxL[:, first : first + size]
  seen_BxQxM = query_BxQ[:, :, None] == key_BxM[:, None, begin:last]
  if causal:
    # Query i is token `first` + i, the keys begin with token `begin`.
    Q, M = seen_BxQxM.shape[1:]
    seen_QxM = jnp.tri(Q, M, first - begin, dtype=bool)
    if window is not None:
      seen_QxM &= ~jnp.tri(Q, M, first - begin - window, dtype=bool)
    seen_BxQxM &= seen_QxM[None]
  return _attend(q_BxQxHxS, k_BxMxJxS, v_BxMxJxU, seen_BxQxM, scale)


def _attend(q_BxQxHxS, k_BxMxJxS, v_BxMxJxU, seen_BxQxM, scale):
  (B, Q, H, S), J = q_BxQxHxS.shape, k_BxMxJxS.shape[2]
  dtype = q_BxQxHxS.dtype
  wide = np.promote_types(dtype, jnp.float32)
  q_BxQxJxGxS = q_BxQxHxS.reshape(B, Q, J, H // J, S)
  score_BxJxGxQxM = jnp.einsum(
    'bqjgs,bmjs->bjgqm', q_BxQxJxGxS, k_BxMxJxS, preferred_element_type=wide
  )
  # Not -inf, of which a softmax over nothing else is NaN, and its gradient.
  score_BxJxGxQxM = jnp.where(
    seen_BxQxM[:, None, None], score_BxJxGxQxM * scale, jnp.finfo(wide).min
  )
  probs_BxJxGxQxM = jax.nn.softmax(score_BxJxGxQxM, axis=-1).astype(dtype)
  y_BxQxJxGxU = jnp.einsum('bjgqm,bmju->bqjgu', probs_BxJxGxQxM, v_BxMxJxU)
  y_BxQxHxU = y_BxQxJxGxU.reshape(B, Q, H, -1)
  any_BxQ = jnp.any(seen_BxQxM, axis=-1)
  return jnp.where(any_BxQ[:, :, None, None], y_BxQxHxU, 0)


def head_size(D: int, H: int) -> int:
  """D / H; ValueError if that is no whole number."""
  if D % H:
    raise ValueError(f'H ({H}) does not divide D ({D})')
  return D // H


def heads(x_BxLxD: jax.Array, w_DxHxS: jax.Array) -> jax.Array:
  """A projection into heads, [B, L, H, S], in the dtype of x."""
  return jnp.einsum('bld,dhs->blhs', x_BxLxD, w_DxHxS.astype(x_BxLxD.dtype))


def join(y_BxLxHxS: jax.Array, w_HxSxD: jax.Array) -> jax.Array:
  """The output projection, [B, L, D], in the dtype of y."""
  return jnp.einsum('blhs,hsd->bld', y_BxLxHxS, w_HxSxD.astype(y_BxLxHxS.dtype))


def rotate(
  x_BxLxHxS: jax.Array,
  frequency_P: jax.Array,
  place_BxL: jax.Array | None = None,
) -> jax.Array:
  """Rotates the pairs (i, i + S/2) of each head by place * frequency_P[i].

  Places are 0 to L - 1 if None.
  """
  wide = frequency_P.dtype
  if place_BxL is None:
    place_BxL = jnp.arange(x_BxLxHxS.shape[1], dtype=wide)[None]
  angle_BxLxP = place_BxL.astype(wide)[..., None] * frequency_P[None, None]
  cos = jnp.cos(angle_BxLxP)[:, :, None]
  sin = jnp.sin(angle_BxLxP)[:, :, None]
  a, b = jnp.split(x_BxLxHxS.astype(wide), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BxLxHxS.dtype)


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Rotary frequencies for a context that was extended (arXiv 2309.00071).

  Attributes:
    factor: by how much `length` tokens are extended; 0 is not at all.
    beta_fast: pairs that turn more often in `length` keep their frequency.
    beta_slow: those that turn less often are slowed by the factor.
    length: of the context before.
    by_turns: between the two a pair is slowed by how often it turns (Llama
      3.1, arXiv 2407.21783), else by its place among the pairs.
  """

  factor: float
  beta_fast: float
  beta_slow: float
  length: int
  by_turns: bool = False

  def __post_init__(self):
    if self.factor and self.beta_fast <= self.beta_slow:
      raise ValueError(
        f'yarn_beta_fast={self.beta_fast} is not above'
        f' yarn_beta_slow={self.beta_slow}'
      )

  def frequency(self, theta: float, P: int) -> np.ndarray:
    """float64 [P/2], radians per token."""
    frequency = theta ** (-np.arange(0, P, 2) / P)
    if not self.factor:
      return frequency
    if self.by_turns:
      turns = self.length * frequency / (2 * math.pi)
      width = self.beta_fast - self.beta_slow
      slowed = np.clip((self.beta_fast - turns) / width, 0, 1)
      return frequency * (1 - slowed + slowed / self.factor)
    # The pair, as a real number, that turns so many times in the length.
    pair = lambda turns: (
      P * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    )
    low = max(math.floor(pair(self.beta_fast)), 0)
    high = min(math.ceil(pair(self.beta_slow)), P - 1)
    # It may be below 0: then no pair is slowed, or all are.
    width = high - low or 1e-3
    slowed = np.clip((np.arange(P // 2) - low) / width, 0, 1)
    return frequency * (1 - slowed + slowed / self.factor)

  def amplitude(self, mscale: float = 1.0) -> float:
    """1 + mscale ln(factor) / 10."""
    return 1 + 0.1 * mscale * math.log(max(self.factor, 1))
