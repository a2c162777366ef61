"""It stays as it is after the warm-up."""

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules import Span


def factor(step: jax.Array, span: Span, end: float) -> jax.Array:
  del span, end
  return jnp.ones_like(step)
