"""An encoder-decoder for translation (Vaswani et al. 2017, arXiv 1706.03762).

With expert feed-forwards in every second layer (pattern 'md') it is the model
of THOR (Zuo et al. 2021, arXiv 2110.04260).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import blocks, ranges, routers, trunk
from moe_jax.attention import View
from moe_jax.parallel import Layout

Encoded = tuple[jax.Array, View]  # tokens, and what a decoder may see of them


@dataclasses.dataclass(frozen=True)
class Config(trunk.Config):
  """The layers of encoder and decoder, which differ in their number alone.

  Attributes:
    encoder_N: layers of the encoder; the decoder has N.
    embed_std: of the initial embedding, which both sides and the head share.
  """

  V: ranges.Count
  encoder_N: ranges.Count
  embed_std: ranges.NonNegative

  def __post_init__(self):
    super().__post_init__()
    # Sines and as many cosines, of at least two frequencies.
    trunk.require(self.D % 2 == 0 and self.D > 2, f'D={self.D} is odd or 2')
    try:
      _ = self.encoder  # checks itself
    except ValueError as error:
      raise ValueError(f'the encoder: {error}') from error

  @property
  def encoder(self) -> trunk.Config:
    fields = [f.name for f in dataclasses.fields(trunk.Config)]
    values = {name: getattr(self, name) for name in fields}
    return trunk.Config(**{**values, 'N': self.encoder_N})


class Translator(nnx.Module):
  """Source and target ids to logits."""

  def __init__(
    self,
    c: Config,
    layout: Layout,
    *,
    rngs: nnx.Rngs,
  ):
    self.c = c
    init = nnx.initializers.normal(c.embed_std)
    self.embed_VxD = nnx.Param(init(rngs.params(), (c.V, c.D)))
    self.encoder = trunk.Trunk(c.encoder, layout, rngs=rngs)
    self.decoder = trunk.Trunk(c, layout, cross=True, rngs=rngs)
    if not blocks.get(c.block).normalised:
      self.norm_encoder = trunk.make_norm(c, c.D)
      self.norm_decoder = trunk.make_norm(c, c.D)

  def __call__(
    self, batch: dict[str, jax.Array], ctx: routers.Ctx
  ) -> tuple[jax.Array, routers.Aux]:
    """Returns logits_BxLxV, in at least float32, and aux.

    aux is the encoder's and then the decoder's, see trunk.Trunk.

    Args:
      batch: as moe_jax/data/pairs.py makes it.
      ctx: from routers.context.
    """
    pools = len(self.encoder.c.segments)
    first, second = None, None
    if ctx.replay is not None:
      first, second = ctx.replay[:pools], ctx.replay[pools:]
    encoded, aux = self.encode(batch, ctx.replace(replay=first))
    logits_BxLxV, more = self.decode(batch, encoded, ctx.replace(replay=second))
    return logits_BxLxV, aux + more

  def encode(
    self, batch: dict[str, jax.Array], ctx: routers.Ctx
  ) -> tuple[Encoded, routers.Aux]:
    """The source, and aux."""
    ids_BxS, mask_BxS = batch['source_BxS'], batch['source_mask_BxS']
    seen_BxS = mask_BxS > 0
    # Padding stands on either side and is not counted.
    pos_BxS = jnp.cumsum(seen_BxS, axis=1, dtype=jnp.int32) - 1
    ctx = ctx.for_tokens(ids_BxS, pos_BxS, seen_BxS)
    x_BxSxD = self._embed(ids_BxS, pos_BxS, seen_BxS, ctx)
    view = _view(seen_BxS, seen_BxS, causal=False)
    x_BxSxD, aux, _ = self.encoder(x_BxSxD, ctx, view)
    if hasattr(self, 'norm_encoder'):
      x_BxSxD = self.norm_encoder(x_BxSxD)
    return (x_BxSxD, view), aux

  def decode(
    self, batch: dict[str, jax.Array], encoded: Encoded, ctx: routers.Ctx
  ) -> tuple[jax.Array, routers.Aux]:
    """logits_BxLxV of the next target token, and aux."""
    source_BxSxD, view = encoded
    ids_BxL, seen_BxL = batch['ids_BxL'], batch['segment_BxL'] >= 0
    ctx = ctx.for_tokens(ids_BxL, batch['pos_BxL'], seen_BxL)
    ctx = ctx.at(layer=_DECODER).replace(depth=jnp.int32(self.encoder.c.depth))
    x_BxLxD = self._embed(ids_BxL, batch['pos_BxL'], seen_BxL, ctx)
    cross = _view(seen_BxL, view.key_BxL == 0, causal=False)
    x_BxLxD, aux, _ = self.decoder(
      x_BxLxD,
      ctx,
      _view(seen_BxL, seen_BxL, causal=True),
      source=(source_BxSxD, cross),
    )
    if hasattr(self, 'norm_decoder'):
      x_BxLxD = self.norm_decoder(x_BxLxD)
    layout = self.decoder.spec.layout
    logits_BxLxV = x_BxLxD @ layout.whole('embed_VxD', self._table()).T
    wide = np.promote_types(logits_BxLxV.dtype, jnp.float32)
    return logits_BxLxV.astype(wide), aux

  def _table(self):
    return self.embed_VxD[...].astype(self.c.dtype)

  def _embed(self, ids_BxL, pos_BxL, seen_BxL, ctx):
    c, layout = self.c, self.decoder.spec.layout
    x_BxLxD = layout.lookup('embed_VxD', self._table(), ids_BxL) * c.D**0.5
    sines_BxLxD = sinusoids(pos_BxL, c.D).astype(x_BxLxD.dtype)
    x_BxLxD += jnp.where(seen_BxL[..., None], sines_BxLxD, 0)
    here = ctx.at(layer=max(c.N, c.encoder_N))
    x_TxD = blocks.drop(blocks.flat(x_BxLxD), c.dropout, here, 0)
    return x_TxD.reshape(x_BxLxD.shape)

  def updated_state(self, aux: routers.Aux) -> dict[str, Any]:
    """The router state after an optimiser step with the load in aux."""
    pools = len(self.encoder.c.segments)
    new = {
      'encoder': self.encoder.updated_state(aux[:pools]),
      'decoder': self.decoder.updated_state(aux[pools:]),
    }
    return {k: v for k, v in new.items() if v}


build = Translator


def smallest(fields: dict[str, Any]) -> dict[str, Any]:
  """What data could tell a model of these fields at the least."""
  del fields
  return {'V': 8}


_DECODER = 2**20  # apart from the layers of the encoder
_FIRST = 2  # fairseq counts positions from its padding's id, 1, plus one


def sinusoids(pos_BxL: jax.Array, D: int) -> jax.Array:
  """[B, L, D]: the sines and then the cosines of a position, in fairseq's way.

  Frequencies fall from 1 to 1e-4; the first token stands at 2.
  """
  k = jnp.arange(D // 2, dtype=jnp.float32)
  frequency = jnp.exp(-np.log(1e4).astype(np.float32) * k / (D // 2 - 1))
  place_BxLx1 = (pos_BxL + _FIRST).astype(jnp.float32)[..., None]
  angle = place_BxLx1 * frequency[None, None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def cost(model: Translator, length: int) -> dict[str, float]:
  """Counts parameters and work, from shapes alone.

  As the decoder's; a target token is charged for one source token too.
  """
  c, total = model.c, trunk.size(model)
  expert, active = 0, total
  for layers in (model.encoder, model.decoder):
    its, met = layers.weights()
    expert, active = expert + its, active + met - trunk.size(layers)
  seen = lambda layers, causal: layers.products(length, length, causal)
  attended = c.encoder_N * seen(model.encoder.layers.attention, False)
  attended += c.N * seen(model.decoder.layers.attention, True)
  attended += c.N * seen(model.decoder.layers.cross, False)
  return {
    'params_total': total,
    'expert_params': expert,
    'params_active': round(active),
    'flops_per_token': round(6 * (active + attended)),
  }


def _view(query_BxL, key_BxM, causal):
  """Every query sees the keys that are no padding."""
  return View(
    jnp.zeros(query_BxL.shape, jnp.int32),
    jnp.where(key_BxM, 0, -1).astype(jnp.int32),
    causal=causal,
  )
