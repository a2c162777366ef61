"""MomentumSMoE's language model (2410.14574, the released code)."""

from moe_jax import blocks


class Block(blocks.Block):
  """norm(x + attention(x)), then norm(x + inner(x with the answer to x)).

  The residual is added twice. A dense layer is norm(x + y), as in their GLaM.
  """

  normalised, raw = True, True

  def __init__(self, D, norm, attention, cross, feed):
    super().__init__(D, norm, attention, cross, feed)
    if feed.routed:
      self.norm_inner = norm(D)

  def __call__(self, x, memory, experts, spec, ctx, view, source=None):
    del source
    x = self.norm_attention(x + self._attend(x, spec, ctx, view))
    h = self._lookahead(x, memory, spec)
    y, memory, aux = self._join(x, h, memory, experts, spec, ctx)
    if self.feed.routed:
      y = x + self.norm_inner(y)
    return self.norm_feed(y), memory, aux
