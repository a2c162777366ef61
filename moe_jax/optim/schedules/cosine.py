"""It falls like half a cosine, to `end` in the last step."""

import math

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules import Span


def factor(step: jax.Array, span: Span, end: float) -> jax.Array:
  top = max(span.warmup - 1, 0)
  done = jnp.clip((step - top) / max(span.steps - 1 - top, 1), 0, 1)
  return end + (1 - end) * 0.5 * (1 + jnp.cos(math.pi * done))
