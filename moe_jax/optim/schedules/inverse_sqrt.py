"""It falls like one over the root of the step, from the end of the warm-up."""

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules import Span


def factor(step: jax.Array, span: Span, end: float) -> jax.Array:
  del end
  return jnp.sqrt(span.warmup / jnp.maximum(step, span.warmup))
