"""How the learning rate goes over the steps of a run.

A file here defines `factor(step, span, end)`, float32, of a step from 0. The
warm-up comes apart: the factor is 1 at its last step, or at the first; cosine
and wsd are at `end` in the run's last step, if that is another.
"""

from collections.abc import Callable
from typing import NamedTuple

from moe_jax import byname


class Span(NamedTuple):
  """The steps of a run: those of the warm-up and, of wsd, those that fall."""

  steps: int
  warmup: int
  decay: int


def names() -> list[str]:
  """The schedules that exist."""
  return byname.names(__name__)


def get(name: str) -> Callable:
  """The factor of that schedule; ValueError if there is none."""
  return byname.find(__name__, 'schedule', name).factor
