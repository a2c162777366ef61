"""Complex momentum over depth (MomentumSMoE, arXiv 2410.14574)."""

import jax.numpy as jnp

from moe_jax import ranges
from moe_jax.residuals import Residual

MOMENTUM = True


def rule(
  b1: ranges.Real = 0.7, b2: ranges.Real = 0.1, gamma: ranges.Real = 1.0
) -> Residual:
  """m = (b1 + i b2) m + gamma h; x - Re m, with m as a pair of real arrays."""

  def apply(x, memory, h, depth):
    del depth
    real, imaginary = memory
    real, imaginary = (
      b1 * real - b2 * imaginary + gamma * h,
      b1 * imaginary + b2 * real,
    )
    return x - real, (real, imaginary)

  return Residual(lambda x: (jnp.zeros_like(x),) * 2, apply)
