"""Bad numbers: which steps are skipped, and when a run goes back.

A step is bad if its loss or its gradient's norm is not finite or, with
`spike`, if its loss is that many standard deviations above the mean of the
good steps before it. A bad step changes no parameter, moment or router. After
`skips` bad steps in a row the run goes back to the newest checkpoint from
before them, and on from there with the data that follow the bad ones; after
`rollbacks` times it stops, and says where the first bad number is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import ranges

KNOWN = 50  # good steps that mean and deviation are over, and need


@dataclasses.dataclass(frozen=True)
class Config:
  """config.default() says what each field means."""

  spike: ranges.NonNegative
  skips: ranges.Count
  rollbacks: ranges.Natural

  def __post_init__(self):
    ranges.check(type(self), vars(self), 'guard.')


class State(NamedTuple):
  """What the rule knows of the steps before."""

  skipped: jax.Array  # int32, bad steps of the run
  row: jax.Array  # int32, bad steps in a row, up to now
  good: jax.Array  # int32
  mean: jax.Array  # float32, of the loss of good steps
  variance: jax.Array  # float32


def init() -> State:
  """Before the first step."""
  count, value = jnp.int32(0), jnp.float32(0)
  return State(count, count, count, value, value)


def judge(
  c: Config, state: State, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, State]:
  """Whether a step with this loss and gradient's norm is bad; the next state.

  Mean and variance are exponential averages (of the last KNOWN steps, plain
  ones until then), of which spikes are no part.
  """
  loss = jnp.asarray(loss, jnp.float32)
  bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
  apart = loss - state.mean
  if c.spike:
    high = apart > c.spike * jnp.sqrt(state.variance)
    bad |= (state.good >= KNOWN) & high
  part = 1 / jnp.minimum(state.good + 1, KNOWN).astype(jnp.float32)
  good = State(
    skipped=state.skipped,
    row=jnp.int32(0),
    good=state.good + 1,
    mean=state.mean + part * apart,
    variance=(1 - part) * (state.variance + part * apart**2),
  )
  skipped = state._replace(skipped=state.skipped + 1, row=state.row + 1)
  return bad, choose(bad, skipped, good)


def choose(bad: jax.Array, old: Any, new: Any) -> Any:
  """The old arrays after a bad step, the new ones after a good one."""
  return jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)
