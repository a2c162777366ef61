"""What a step of each arm of a study takes of a device that is idle else."""

import itertools
import math
import tempfile
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from moe_jax.sizing import aot
from moe_jax.training import jobs, train_step

ROUNDS = 7
SAMPLE = 0.3  # seconds that the steps of a round take at least, or it is one


def of(arms: dict[str, ml_collections.ConfigDict]) -> dict[str, dict]:
  """{arm: seconds and bytes of a step of it}

  All have a turn in every round, so that a slow moment hits neighbours alike.

    step_seconds: the median of ROUNDS means over some steps; reading and
      packing text is no part of it.
    step_bytes: what a step has of the device's memory, by the compiler's word:
      state, batch and all that comes between.
  """
  # A program from the cache does not say what memory it takes.
  jax.config.update('jax_enable_compilation_cache', False)
  turns, found = {}, {}
  for arm, c in arms.items():
    turns[arm], bytes_ = _compiled(c)
    found[arm] = {'step_bytes': bytes_}
    print(f'{arm}: compiled, {bytes_ / 2**20:.0f} MiB a step', flush=True)
  steps = {arm: math.ceil(SAMPLE / turn(1)) for arm, turn in turns.items()}
  rounds = [
    [turn(steps[arm]) for arm, turn in turns.items()] for _ in range(ROUNDS)
  ]
  for arm, seconds in zip(turns, np.median(rounds, axis=0), strict=True):
    found[arm]['step_seconds'] = float(seconds)
  return found


def _compiled(c) -> tuple[Callable[[int], float], int]:
  """(steps -> the seconds of one of so many, bytes), after a first step."""
  with tempfile.TemporaryDirectory() as workdir:
    job = jobs.prepare(c, workdir)
  with train_step.precision(job):
    batches = itertools.cycle(itertools.islice(job.train_batches(), 10))
    state, batch = train_step.initial_state(job), job.put(next(batches))
    step = train_step.make_step(job).lower(state, batch).compile()

  def turn(steps):
    nonlocal state
    began = time.perf_counter()
    for batch in itertools.islice(batches, steps):
      state, found = step(state, job.put(batch))
    jax.block_until_ready((state, found))
    return (time.perf_counter() - began) / steps

  turn(1)
  return turn, aot.taken(step.memory_analysis())
