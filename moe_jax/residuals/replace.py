"""The stream is what the inner residual carries: Chain-of-Experts."""

from moe_jax.residuals import Residual

MOMENTUM = False


def rule() -> Residual:
  """h: the stream is carried inside a layer (Chain-of-Experts, 2506.18945)."""
  return Residual(
    init=lambda x: (),
    apply=lambda x, memory, h, depth: (h, memory),
  )
