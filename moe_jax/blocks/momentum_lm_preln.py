"""MomentumSMoE's language model with `pre_lnorm` (2410.14574, its code)."""

from moe_jax import blocks


class Block(blocks.Block):
  """norm(x + attention(x)), then norm(x + (x with the answer to inner(x))).

  As momentum_lm, but for the inner norm, which is before the experts.
  """

  normalised, raw = True, True

  def __init__(self, D, norm, attention, cross, feed):
    super().__init__(D, norm, attention, cross, feed)
    if feed.routed:
      self.norm_inner = norm(D)

  def __call__(self, x, memory, experts, spec, ctx, view, source=None):
    del source
    x = self.norm_attention(x + self._attend(x, spec, ctx, view))
    h = self.norm_inner(x) if self.feed.routed else x
    h = self._lookahead(h, memory, spec)
    y, memory, aux = self._join(x, h, memory, experts, spec, ctx)
    if self.feed.routed:
      y = x + y
    return self.norm_feed(y), memory, aux
