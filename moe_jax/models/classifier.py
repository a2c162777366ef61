"""A vision transformer that names an image's class (arXiv 2010.11929).

With experts in every second layer it is V-MoE (Riquelme et al. 2021, arXiv
2106.05974).
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


@dataclasses.dataclass(frozen=True)
class Config(trunk.Config):
  """The layers, and how images enter them.

  Attributes:
    V: classes.
    size: rows, columns and channels of an image.
    patch: rows and columns of a token.
  """

  V: ranges.Count
  size: tuple[int, int, int]
  patch: ranges.Count

  def __post_init__(self):
    super().__post_init__()
    for axis, n in zip(('rows', 'columns'), self.size[:2], strict=True):
      trunk.divides('patch', self.patch, f'the {axis} of an image', n)

  @property
  def tokens(self) -> int:
    """Patches and the class token."""
    rows, columns, _ = self.size
    return rows * columns // self.patch**2 + 1


class Classifier(nnx.Module):
  """Images to logits of their classes."""

  def __init__(
    self,
    c: Config,
    layout: Layout,
    *,
    rngs: nnx.Rngs,
  ):
    self.c = c
    lecun, normal = (
      nnx.initializers.lecun_normal(),
      nnx.initializers.normal(0.02),
    )
    pixels = c.patch**2 * c.size[2]
    self.patch_PxD = nnx.Param(lecun(rngs.params(), (pixels, c.D)))
    self.bias_D = nnx.Param(jnp.zeros((c.D,)))
    self.class_D = nnx.Param(jnp.zeros((c.D,)))
    self.position_LxD = nnx.Param(normal(rngs.params(), (c.tokens, c.D)))
    self.head_DxV = nnx.Param(jnp.zeros((c.D, c.V)))
    self.bias_V = nnx.Param(jnp.zeros((c.V,)))
    self.trunk = trunk.Trunk(c, layout, rngs=rngs)
    self.norm = trunk.make_norm(c, c.D)

  def __call__(
    self, batch: dict[str, jax.Array], ctx: routers.Ctx
  ) -> tuple[jax.Array, routers.Aux]:
    """Returns logits_Bx1xV, in at least float32, and aux, see trunk.Trunk.

    Args:
      batch: `image_BxYxXxC`, and `segment_BxL`, L = 1, -1 for padding.
      ctx: from routers.context.
    """
    c = self.c
    x_BxPxD = patches(batch['image_BxYxXxC'].astype(c.dtype), c.patch)
    x_BxPxD = x_BxPxD @ self.patch_PxD[...].astype(c.dtype)
    x_BxPxD += self.bias_D[...].astype(c.dtype)[None, None]
    class_Bx1xD = jnp.broadcast_to(
      self.class_D[...].astype(c.dtype), (len(x_BxPxD), 1, c.D)
    )
    x_BxLxD, aux = self.encode(
      jnp.concatenate([class_Bx1xD, x_BxPxD], axis=1),
      ctx,
      batch['segment_BxL'],
    )
    x_Bx1xD = x_BxLxD[:, :1]
    wide = np.promote_types(x_Bx1xD.dtype, jnp.float32)
    logits_Bx1xV = (x_Bx1xD @ self.head_DxV[...].astype(c.dtype)).astype(wide)
    return logits_Bx1xV + self.bias_V[...].astype(wide)[None, None], aux

  def encode(
    self,
    x_BxLxD: jax.Array,
    ctx: routers.Ctx,
    segment_Bx1: jax.Array,
  ) -> tuple[jax.Array, routers.Aux]:
    """The tokens after all layers and the last norm, and aux."""
    c, (B, L) = self.c, x_BxLxD.shape[:2]
    zeros_BxL = jnp.zeros((B, L), jnp.int32)
    pos_BxL = zeros_BxL + jnp.arange(L, dtype=jnp.int32)[None]
    real_BxL = jnp.broadcast_to(segment_Bx1 >= 0, (B, L))
    ctx = ctx.for_tokens(zeros_BxL, pos_BxL, real_BxL)
    x_BxLxD += self.position_LxD[...].astype(x_BxLxD.dtype)[None]
    x_TxD = blocks.drop(blocks.flat(x_BxLxD), c.dropout, ctx.at(layer=c.N), 0)
    x_BxLxD, aux, _ = self.trunk(
      x_TxD.reshape(x_BxLxD.shape),
      ctx,
      View(zeros_BxL, zeros_BxL, causal=False),
    )
    return self.norm(x_BxLxD), aux

  def updated_state(self, aux: routers.Aux) -> dict[str, Any]:
    """The router state after an optimiser step with the load in aux."""
    new = self.trunk.updated_state(aux)
    return {'trunk': new} if new else {}


build = Classifier


def smallest(fields: dict[str, Any]) -> dict[str, Any]:
  """What data could tell a model of these fields at the least."""
  return {'V': 8, 'size': (fields['patch'], fields['patch'], 1)}


def patches(image_BxYxXxC: jax.Array, patch: int) -> jax.Array:
  """[B, tokens, pixels]: squares, row by row."""
  B, Y, X, C = image_BxYxXxC.shape
  cut = image_BxYxXxC.reshape(B, Y // patch, patch, X // patch, patch, C)
  return cut.swapaxes(2, 3).reshape(B, -1, patch**2 * C)


def cost(model: Classifier, length: int) -> dict[str, float]:
  """Counts parameters and work, from shapes alone; a row is one image.

  As the decoder's, but params_active are those that meet one patch, and
  flops_per_token is of a whole image, since that is what has a target.
  """
  del length
  c, total = model.c, trunk.size(model)
  expert, active = model.trunk.weights()
  active += total - trunk.size(model.trunk)
  L = c.tokens
  layer = model.trunk.layers.attention.products(L, L, causal=False)
  return {
    'params_total': total,
    'expert_params': expert,
    'params_active': round(active),
    'flops_per_token': round(6 * L * (active + c.N * layer)),
  }
