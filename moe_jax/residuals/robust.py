"""Robust momentum over depth: Robust MomentumSMoE (arXiv 2410.14574)."""

from typing import Annotated

import jax.numpy as jnp

from moe_jax import ranges
from moe_jax.residuals import Residual

MOMENTUM = True


def rule(
  rho: Annotated[float, ranges.Within('(0, 1)')] = 0.2,
  kappa: Annotated[float, ranges.Within('(1, inf)')] = 1.25,
) -> Residual:
  """m = alpha m - h; x + beta m, with h answered at what lookahead shows.

  The robust momentum method (Cyrus et al. 2018, arXiv 1710.04753) of rate rho
  for condition numbers up to kappa and curvatures up to 1: ValueError unless
  1 - 1 / sqrt(kappa) <= rho <= 1 - 1 / kappa.
  """
  low, high = 1 - kappa**-0.5, 1 - 1 / kappa
  if not low - 1e-9 <= rho <= high + 1e-9:
    between = f'[{low:.4f}, {high:.4f}]'
    raise ValueError(f'rho is {rho}, not in {between} of kappa={kappa}')
  alpha = kappa * rho**3 / (kappa - 1)
  beta = kappa * (1 - rho) ** 2 * (1 + rho)
  ahead = rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho)) * beta

  def apply(x, memory, h, depth):
    del depth
    memory = alpha * memory - h
    return x + beta * memory, memory

  return Residual(jnp.zeros_like, apply, lambda h, memory: h + ahead * memory)
