"""Momentum over depth: MomentumSMoE (arXiv 2410.14574)."""

import jax.numpy as jnp

from moe_jax import ranges
from moe_jax.residuals import Residual

MOMENTUM = True


def rule(
  mu: ranges.Real = 0.7, gamma: ranges.Real = 1.0, sign: ranges.Real = 1.0
) -> Residual:
  """m = mu m + gamma h; x + sign m.

  The authors' code subtracts, sign = -1; their "negative momentum" is mu < 0.
  With mu = 0, gamma = sign = 1 this is `plain`, bit for bit.
  """

  def apply(x, memory, h, depth):
    del depth
    memory = mu * memory + gamma * h
    return x + sign * memory, memory

  return Residual(jnp.zeros_like, apply)
