"""The optimiser: AdamW or Muon, clipping, learning rates as fractions."""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from moe_jax import exact, ranges
from moe_jax.optim import schedules


@dataclasses.dataclass(frozen=True)
class Config:
  """config.default() says what each field means."""

  name: 'Annotated[str, ranges.OneOf(OPTIMIZERS)]'
  learning_rate: ranges.NonNegative
  schedule: Annotated[str, ranges.OneOf(schedules.names())]
  warmup: ranges.Fraction
  decay: ranges.Fraction
  end: ranges.Fraction
  b1: ranges.Decay
  b2: ranges.Decay
  eps: ranges.Positive
  weight_decay: ranges.NonNegative
  clip: ranges.NonNegative
  moments: 'Annotated[str, ranges.OneOf(MOMENTS)]'
  accumulate: ranges.Count

  def __post_init__(self):
    ranges.check(type(self), vars(self), 'optimizer.')
    if self.schedule == 'inverse_sqrt' and self.warmup == 0:
      raise ValueError(
        'schedule=inverse_sqrt falls from the end of a warm-up,'
        ' warmup=0 has none'
      )
    if self.schedule == 'wsd' and self.warmup + self.decay > 1 + 1e-9:
      raise ValueError(
        f'warmup={self.warmup} and decay={self.decay} are more than all steps'
      )


def schedule(c: Config, steps: int) -> Callable[[jax.Array], jax.Array]:
  """step (from 0) -> learning rate, float32.

  Warm-up and decay are parts of `steps`, rounded up to whole ones.
  """
  span = schedules.Span(
    steps, *(exact.ceil(part, steps) for part in (c.warmup, c.decay))
  )

  factor = schedules.get(c.schedule)

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    ramp = jnp.minimum(1.0, (step + 1) / max(span.warmup, 1))
    return c.learning_rate * ramp * factor(step, span, c.end)

  return rate


def make(c: Config, steps: int) -> optax.GradientTransformationExtraArgs:
  """The optimiser that `c.name` names, after clipping; clip=0 does not clip.

  `update(grads, state, params, step=step)`: the learning rate is that of the
  run's step, from 0. A count in the state would stand still at skipped steps.
  """
  clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
  rule = optax.chain(clip, OPTIMIZERS[c.name](c))
  if c.moments != 'params':
    rule = _stored(rule, c.moments)
  rate = schedule(c, steps)

  def update(grads, state, params, *, step):
    updates, state = rule.update(grads, state, params)
    now = rate(step)
    return jax.tree.map(lambda u: now.astype(u.dtype) * u, updates), state

  return optax.GradientTransformationExtraArgs(rule.init, update)


# Rules for a learning rate of 1.


def _adamw(c):
  """Vectors do not decay (Loshchilov, Hutter, 1711.05101)."""
  return optax.adamw(
    1.0,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mask=_decays,
  )


def _muon(c):
  """Orthogonal momentum for matrices, which alone decay; Adam for the rest.

  Steps of matrices have the size of Adam's, RMS 0.2, so that one learning rate
  serves both (Liu et al. 2025, arXiv 2502.16982, eq. 4).
  """
  return contrib.muon(
    1.0,
    consistent_rms=0.2,
    weight_decay=c.weight_decay,
    eps=c.eps,
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


# --- what a parameter is, by the first word of its name -----------------------

VECTORS = {'scale', 'bias', 'class'}
# Rows that are looked up, or met one by one: they are no map from D to D.
TABLES = {'embed', 'head', 'position'}


def role(name: str) -> str:
  """'vector', 'table' or 'matrix': what a parameter of this name is.

  Vectors alone do not decay, matrices alone are turned by Muon. The axes of a
  name decide where its first word does not: a matrix has two besides E. So
  routers, D x E, are tables, as is what has no axes in its name.
  """
  word, axes = name.partition('_')[0], _axes(name)
  if word in VECTORS or len(axes) == 1:
    return 'vector'
  within = [a for a in axes if a != 'E']
  return 'table' if word in TABLES or len(within) < 2 else 'matrix'


def _axes(name):
  """['D', 'E'] of 'w_DxE'; none of a name that has no such end."""
  end = re.search(r'_([A-Z](x[A-Z])*)$', name)
  return end[1].split('x') if end else []


def _matrices(params):
  """Which dimensions of a parameter are its matrix; None: it is none.

  Of `up_ExDxF` D and F, of `query_DxHxS` D and HS, of `out_HxSxD` HS and D.
  """

  def one(path, leaf):
    name = str(path[-1].key)
    if role(name) != 'matrix':
      return None
    axes = [a for a in _axes(name) if a != 'E']
    places = list(range(leaf.ndim - len(axes), leaf.ndim))
    cut = -1 if axes[-1] == 'D' else 1
    return contrib.MuonDimensionNumbers(
      tuple(places[:cut]), tuple(places[cut:])
    )

  return jax.tree_util.tree_map_with_path(one, params)


def _decays(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: role(str(path[-1].key)) != 'vector', params
  )
