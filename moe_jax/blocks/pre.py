"""Pre-norm: x + attention(norm(x)), then x with the answer to norm(x)."""

from moe_jax import blocks


class Block(blocks.Block):
  """The default: nothing normalises the residual stream itself."""

  crosses = True

  def __call__(self, x, memory, experts, spec, ctx, view, source=None):
    x += self._attend(self.norm_attention(x), spec, ctx, view)
    if source is not None:
      x += self._cross(self.norm_cross(x), spec, ctx, source)
    h = self._lookahead(self.norm_feed(x), memory, spec)
    return self._join(x, h, memory, experts, spec, ctx)
