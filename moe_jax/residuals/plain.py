"""The answer is added to the stream."""

from moe_jax.residuals import Residual

MOMENTUM = False


def rule() -> Residual:
  """x + h."""
  return Residual(
    init=lambda x: (),
    apply=lambda x, memory, h, depth: (x + h, memory),
  )
