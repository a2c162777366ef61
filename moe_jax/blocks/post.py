"""Post-norm (1706.03762): norm(x + attention(x)), norm(x with its answer)."""

from moe_jax import blocks


class Block(blocks.Block):
  """The Transformer as it was first."""

  normalised, raw, crosses = True, True, True

  def __call__(self, x, memory, experts, spec, ctx, view, source=None):
    x = self.norm_attention(x + self._attend(x, spec, ctx, view))
    if source is not None:
      x = self.norm_cross(x + self._cross(x, spec, ctx, source))
    h = self._lookahead(x, memory, spec)
    x, memory, aux = self._join(x, h, memory, experts, spec, ctx)
    return self.norm_feed(x), memory, aux
