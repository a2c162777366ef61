"""What a step of a study's arm takes of the device, while it is alone."""

import itertools
import math
import tempfile
import time

import jax
import ml_collections
import numpy as np

from moe_jax import job as jobs
from moe_jax import programs

ROUNDS = 5
SAMPLE = 0.3  # seconds that the steps of a round take at least, or it is one


def of(c: ml_collections.ConfigDict) -> dict[str, float]:
  """Seconds and bytes of a step of a config.

  Returns:
    step_seconds: the median of ROUNDS means over some steps; reading and
      packing text is no part of it.
    step_bytes: the most that a step has of the device's memory at a time, by
      the compiler's word: state, batch and all that comes between.
  """
  # A program from the cache does not say what memory it takes.
  jax.config.update('jax_enable_compilation_cache', False)
  with tempfile.TemporaryDirectory() as workdir:
    job = jobs.prepare(c, workdir)
  with programs.precision(job):
    batches = itertools.cycle(itertools.islice(job.train_batches(), 10))
    state, batch = programs.initial_state(job), job.put(next(batches))
    step = programs.make_step(job).lower(state, batch).compile()

    def seconds(steps):
      nonlocal state
      began = time.perf_counter()
      for batch in itertools.islice(batches, steps):
        state, found = step(state, job.put(batch))
      jax.block_until_ready((state, found))
      return (time.perf_counter() - began) / steps

    seconds(1)
    steps = math.ceil(SAMPLE / seconds(1))
    found = [seconds(steps) for _ in range(ROUNDS)]
  return {
    'step_seconds': float(np.median(found)),
    'step_bytes': step.memory_analysis().peak_memory_in_bytes,
  }
