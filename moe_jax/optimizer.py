"""The optimiser: AdamW with clipping, and learning rates as fractions."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Config:
  """config.default() says what each field means."""

  learning_rate: float
  schedule: str
  warmup: float
  decay: float
  end: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip: float
  accumulate: int

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      known = ', '.join(SCHEDULES)
      raise ValueError(f'schedule={self.schedule!r}; there are {known}')
    for name in ('warmup', 'decay', 'end'):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ValueError(f'{name}={value} is not a fraction in [0, 1]')
    for name in ('learning_rate', 'clip', 'weight_decay'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative')
    if self.accumulate < 1:
      raise ValueError(f'accumulate={self.accumulate} is < 1')


# Each is (done, c) -> factor; done in [0, 1] is the part of all steps behind.


def _cosine(done, c):
  left = (done - c.warmup) / max(1 - c.warmup, 1e-9)
  return c.end + (1 - c.end) * 0.5 * (1 + jnp.cos(math.pi * left))


def _constant(done, c):
  del c
  return jnp.ones_like(done)


def _inverse_sqrt(done, c):
  return jnp.sqrt(c.warmup / jnp.maximum(done, max(c.warmup, 1e-9)))


def _wsd(done, c):
  left = (done - (1 - c.decay)) / max(c.decay, 1e-9)
  return 1 - (1 - c.end) * jnp.clip(left, 0, 1)


SCHEDULES = {
  'cosine': _cosine,
  'constant': _constant,
  'inverse_sqrt': _inverse_sqrt,
  'wsd': _wsd,
}


def schedule(c: Config, steps: int) -> Callable[[jax.Array], jax.Array]:
  """step (from 0) -> learning rate; warm-up and decay are parts of `steps`."""
  warmup_steps = c.warmup * steps

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.maximum(step / steps, c.warmup)
    ramp = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1.0))
    return c.learning_rate * ramp * SCHEDULES[c.schedule](done, c)

  return rate


def make(c: Config, steps: int) -> optax.GradientTransformation:
  """AdamW; norms' scales and biases do not decay. clip=0 does not clip."""
  clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
  adamw = optax.adamw(
    schedule(c, steps),
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mask=_decays,
  )
  return optax.chain(clip, adamw)


def _decays(params):
  def one(path, leaf):
    del leaf
    return not str(path[-1].key).startswith(('scale', 'bias'))

  return jax.tree_util.tree_map_with_path(one, params)
