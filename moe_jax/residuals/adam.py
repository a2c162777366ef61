"""Adam over depth: AdamSMoE (arXiv 2410.14574)."""

from typing import Literal

import jax.numpy as jnp

from moe_jax import ranges
from moe_jax.residuals import Residual

MOMENTUM = True


def rule(
  gamma: ranges.Real = 1.0,
  b1: ranges.Decay = 0.9,
  b2: ranges.Decay = 0.999,
  mu: ranges.Real = 0.7,
  momentum_gamma: ranges.Real = 1.0,
  layers: Literal['first', 'all'] = 'first',
  decay: ranges.Fraction = 1.0,
  eps: ranges.Positive = 1e-8,
) -> Residual:
  """p = b1 p + (1 - b1) h; v = b2 v + (1 - b2) h^2; eps inside the root:

    (1 - decay) x - gamma p / sqrt(v + eps), without a correction of the bias.

  With layers='first' that is the first MoE layer, and those above it go on with
  m = mu m + momentum_gamma h; x - m, in which the first answer counts too; so
  has it the authors' code, and decay 1. With 'all' it is every layer.
  """

  def apply(x, memory, h, depth):
    p, v, m = memory
    here = depth == 0 if layers == 'first' else True
    p = jnp.where(here, b1 * p + (1 - b1) * h, p)
    v = jnp.where(here, b2 * v + (1 - b2) * h * h, v)
    m = mu * m + momentum_gamma * h
    step = gamma * p / jnp.sqrt(v + eps)
    return jnp.where(here, (1 - decay) * x - step, x - m), (p, v, m)

  return Residual(lambda x: (jnp.zeros_like(x),) * 3, apply)
