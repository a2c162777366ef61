"""It stays, and falls along a line in the last steps, to `end`."""

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules import Span


def factor(step: jax.Array, span: Span, end: float) -> jax.Array:
  top = max(span.steps - 1 - span.decay, 0)
  done = jnp.clip((step - top) / max(span.steps - 1 - top, 1), 0, 1)
  return 1 - (1 - end) * done
