"""Momentum V-MoE (2410.14574): pre-norm, and one more norm after each layer.

The look-ahead follows the norm, in dense layers too. With the residual rule
`plain` it is the baseline with as many norms.
"""

from moe_jax import blocks


class Block(blocks.Block):
  """x + attention(norm(x)), then norm(x with the answer to norm(x))."""

  def __init__(self, D, norm, attention, cross, feed):
    super().__init__(D, norm, attention, cross, feed)
    self.norm_after = norm(D)

  def __call__(self, x, memory, experts, spec, ctx, view, source=None):
    del source
    x += self._attend(self.norm_attention(x), spec, ctx, view)
    h = blocks.flat(self.norm_feed(x))
    h = spec.residual.lookahead(h, memory[0]).reshape(x.shape)
    x, memory, aux = self._join(x, h, memory, experts, spec, ctx)
    return self.norm_after(x), memory, aux
