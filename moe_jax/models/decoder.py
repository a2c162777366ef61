"""A decoder-only language model: dense and MoE layers in any pattern."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import blocks, ranges, routers, trunk
from moe_jax.attention import View
from moe_jax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Config(trunk.Config):
  """The layers, and what is below and above them.

  Attributes:
    tied: the output head is the embedding.
    embed_std: of the initial embedding.
  """

  V: ranges.Count
  tied: bool
  embed_std: ranges.NonNegative


class Decoder(nnx.Module):
  """ids to logits."""

  def __init__(
    self,
    c: Config,
    layout: Layout,
    *,
    rngs: nnx.Rngs,
  ):
    self.c = c
    init = nnx.initializers.normal
    self.embed_VxD = nnx.Param(init(c.embed_std)(rngs.params(), (c.V, c.D)))
    if not c.tied:
      self.head_DxV = nnx.Param(init(0.02)(rngs.params(), (c.D, c.V)))
      if c.bias:
        self.bias_V = nnx.Param(jnp.zeros((c.V,)))
    self.trunk = trunk.Trunk(c, layout, rngs=rngs)
    if not blocks.get(c.block).normalised:
      self.norm = trunk.make_norm(c, c.D)

  def __call__(
    self, batch: dict[str, jax.Array], ctx: routers.Ctx
  ) -> tuple[jax.Array, routers.Aux]:
    """Returns logits_BxLxV, in at least float32, and aux, see trunk.Trunk.

    Args:
      batch: `ids_BxL`, `segment_BxL`: documents, which attention keeps apart;
        -1 is padding.
      ctx: from routers.context.
    """
    logits_BxLxV, aux, _ = self.forward_with_cache(batch, ctx, None)
    return logits_BxLxV, aux

  def forward_with_cache(
    self,
    batch: dict[str, jax.Array],
    ctx: routers.Ctx,
    cache_NxBxCxD: jax.Array | None,
  ) -> tuple[jax.Array, list[dict[str, Any]], jax.Array | None]:
    """The same for the next block of each row; also returns its cache."""
    segment_BxL = batch['segment_BxL']
    view = View(segment_BxL, segment_BxL, causal=True)
    return self._run(batch, ctx, view, cache_NxBxCxD)

  def decode(
    self, batch: dict[str, jax.Array], ctx: routers.Ctx, kv_cache: Any
  ) -> tuple[jax.Array, routers.Aux, Any]:
    """The same for tokens of one text a row, at the places `pos_BxL`.

    A token sees those at places up to its own in `kv_cache`, which
    `init_kv_cache` made and earlier calls filled. Returns logits_BxLxV, aux and
    `kv_cache` with these.
    """
    zero_BxL = jnp.zeros_like(batch['ids_BxL'])
    view = View(zero_BxL, zero_BxL, causal=True, place_BxL=batch['pos_BxL'])
    return self._run(batch, ctx, view, kv_cache)

  def init_kv_cache(self, B: int, M: int) -> dict[str, jax.Array]:
    """A cache for M tokens in each of B rows, [N, B, M, ...], empty.

    Raises:
      ValueError: the attention writes no texts.
    """
    c = self.c
    graph, state = nnx.split(self.trunk.layers.attention)

    def entries(state):
      one = jax.tree.map(lambda a: a[0] if c.first else a[0, 0], state)
      x_BxMxD = jnp.zeros((B, M, c.D), c.dtype)
      return nnx.merge(graph, one).kv_entries(x_BxMxD, None)

    shapes = jax.eval_shape(entries, state)
    return jax.tree.map(lambda a: jnp.zeros((c.N, *a.shape), a.dtype), shapes)

  def _run(self, batch, ctx, view, cache):
    c, layout = self.c, self.trunk.spec.layout
    x_BxLxD = layout.lookup(
      'embed_VxD', self.embed_VxD[...].astype(c.dtype), batch['ids_BxL']
    )
    x_TxD = blocks.drop(blocks.flat(x_BxLxD), c.dropout, ctx.at(layer=c.N), 0)
    x_BxLxD, aux, cache = self.trunk(
      x_TxD.reshape(x_BxLxD.shape), ctx, view, cache=cache
    )
    if hasattr(self, 'norm'):
      x_BxLxD = self.norm(x_BxLxD)
    if c.tied:
      head_DxV = self._whole('embed_VxD').T
    else:
      head_DxV = self._whole('head_DxV')
    logits_BxLxV = x_BxLxD @ head_DxV
    wide = np.promote_types(logits_BxLxV.dtype, jnp.float32)
    logits_BxLxV = logits_BxLxV.astype(wide)
    if hasattr(self, 'bias_V'):
      logits_BxLxV += self.bias_V[...].astype(wide)[None, None]
    return logits_BxLxV, aux, cache

  def _whole(self, name):
    w = getattr(self, name)[...].astype(self.c.dtype)
    return self.trunk.spec.layout.whole(name, w)

  def init_stream_cache(self, B: int) -> jax.Array | None:
    """The cache before the first block of B rows; None if there is none."""
    c = self.c
    layers = self.trunk.layers
    if not (layers.attention.caches and blocks.get(c.block).raw):
      return None
    return jnp.zeros((c.N, B, layers.attention.caches, c.D), c.dtype)

  def updated_state(self, aux: routers.Aux) -> dict[str, Any]:
    """The router state after an optimiser step with the load in aux."""
    new = self.trunk.updated_state(aux)
    return {'trunk': new} if new else {}


build = Decoder


def smallest(fields: dict[str, Any]) -> dict[str, Any]:
  """What data could tell a model of these fields at the least."""
  del fields
  return {'V': 8}


def cost(model: Decoder, length: int) -> dict[str, float]:
  """Counts parameters and work, from shapes alone.

  Returns:
    params_total. expert_params: those of the pools. params_active: those that
    meet one token, the embedding included; a weight used twice counts twice.
    flops_per_token: forward and backward of the matmuls, 6 for each active
    weight, and of what its kind of attention multiplies in rows of `length`
    tokens; recomputation not counted.
  """
  c, total = model.c, trunk.size(model)
  expert, active = model.trunk.weights()
  active += total - trunk.size(model.trunk)
  lookup = 0 if c.tied else c.V * c.D
  layer = model.trunk.layers.attention.products(length, length, causal=True)
  return {
    'params_total': total,
    'expert_params': expert,
    'params_active': round(active),
    'flops_per_token': round(6 * (active - lookup + c.N * layer)),
  }
