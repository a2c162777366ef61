"""The optimiser: AdamW or Muon, clipping, learning rates as fractions."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax import contrib


@dataclasses.dataclass(frozen=True)
class Config:
  """config.default() says what each field means."""

  name: str
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
  moments: str
  accumulate: int

  def __post_init__(self):
    for field, known in (
      ('name', OPTIMIZERS),
      ('schedule', SCHEDULES),
      ('moments', MOMENTS),
    ):
      if getattr(self, field) not in known:
        value, known = getattr(self, field), ', '.join(known)
        raise ValueError(f'optimizer.{field}={value!r}; there are {known}')
    for name in ('warmup', 'decay', 'end'):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ValueError(f'{name}={value} is not a fraction in [0, 1]')
    for name in ('learning_rate', 'clip', 'weight_decay'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative')
    if self.schedule == 'inverse_sqrt' and self.warmup == 0:
      raise ValueError(
        'schedule=inverse_sqrt falls from the end of a warm-up,'
        ' warmup=0 has none'
      )
    if self.schedule == 'wsd' and self.warmup + self.decay > 1 + 1e-9:
      raise ValueError(
        f'warmup={self.warmup} and decay={self.decay} are more than all steps'
      )
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
  """The optimiser that `c.name` names, after clipping; clip=0 does not clip."""
  clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
  rule = optax.chain(clip, OPTIMIZERS[c.name](c, schedule(c, steps)))
  return rule if c.moments == 'params' else _stored(rule, c.moments)


def _adamw(c, rate):
  """Norms' scales and biases do not decay (Loshchilov, Hutter, 1711.05101)."""
  return optax.adamw(
    rate,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mask=_decays,
  )


def _muon(c, rate):
  """Orthogonal momentum for matrices, which alone decay; Adam for the rest.

  Steps of matrices have the size of Adam's, RMS 0.2, so that one learning rate
  serves both (Liu et al. 2025, arXiv 2502.16982, eq. 4).
  """
  return contrib.muon(
    rate,
    consistent_rms=0.2,
    weight_decay=c.weight_decay,
    adam_b1=c.b1,
    adam_b2=c.b2,
    muon_weight_dimension_numbers=_matrices,
  )


OPTIMIZERS = {'adamw': _adamw, 'muon': _muon}

# In which dtype moments are kept between steps: the parameters', or this one.
MOMENTS = ('params', 'bfloat16')


def _stored(rule, dtype):
  """The rule, its moments in `dtype` between steps and float32 within one.

  In bfloat16 a moment does not move by less than 1/512 of itself: with b2 of
  0.999 the second one would rise but never fall.
  """

  def init(params):
    return _cast_moments(rule.init(params), dtype)

  def update(grads, state, params=None):
    state = _cast_moments(state, jnp.float32)
    updates, state = rule.update(grads, state, params)
    return updates, _cast_moments(state, dtype)

  return optax.GradientTransformation(init, update)


def _cast_moments(state, dtype):
  """What optax calls mu and nu; not the coefficients that Muon's state has."""

  def one(path, leaf):
    names = {getattr(key, 'name', None) for key in path}
    return leaf.astype(dtype) if names & {'mu', 'nu'} else leaf

  return jax.tree_util.tree_map_with_path(one, state)


def _matrices(params):
  """By the axes in its name, which dimensions of a parameter are its matrix.

  Of `up_ExDxF` D and F, of `query_DxHxS` D and HS, of `out_HxSxD` HS and D.
  Embeddings, heads, routers, scales and biases have none.
  """

  def one(path, leaf):
    name, _, suffix = str(path[-1].key).rpartition('_')
    axes = [a for a in suffix.split('x') if a != 'E']
    if name.startswith(('scale', 'bias')) or 'V' in axes or len(axes) < 2:
      return None
    places = list(range(leaf.ndim - len(axes), leaf.ndim))
    cut = -1 if axes[-1] == 'D' else 1
    return contrib.MuonDimensionNumbers(
      tuple(places[:cut]), tuple(places[cut:])
    )

  return jax.tree_util.tree_map_with_path(one, params)


def _decays(params):
  def one(path, leaf):
    del leaf
    return not str(path[-1].key).startswith(('scale', 'bias'))

  return jax.tree_util.tree_map_with_path(one, params)
