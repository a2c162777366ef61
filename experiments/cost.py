"""What a step of a study's arm takes of the device, while it is alone."""

import fcntl
import itertools
import pathlib
import tempfile
import time

import jax
import ml_collections
import numpy as np

from moe_jax import job as jobs
from moe_jax import programs

STEPS, ROUNDS = 10, 5


def of(c: ml_collections.ConfigDict, lock: pathlib.Path) -> dict[str, float]:
  """Seconds and bytes of a step of a config.

  Args:
    lock: a file; of those who share it one is timed at a time, while others
      compile.

  Returns:
    step_seconds: the median of ROUNDS means over STEPS steps, with what feeds
      them.
    step_bytes: the most that a step has of the device's memory at a time, by
      the compiler's word: state, batch and all that comes between.
  """
  with tempfile.TemporaryDirectory() as workdir:
    job = jobs.prepare(c, workdir)
  with programs.precision(job):
    batches = itertools.cycle(itertools.islice(job.train_batches(), STEPS))
    state, batch = programs.initial_state(job), job.put(next(batches))
    step = programs.make_step(job).lower(state, batch).compile()
    memory = step.memory_analysis()
    seconds = []
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open('w') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      for _ in range(1 + ROUNDS):  # the first does not count
        began = time.perf_counter()
        for batch in itertools.islice(batches, STEPS):
          state, found = step(state, job.put(batch))
        jax.block_until_ready((state, found))
        seconds.append((time.perf_counter() - began) / STEPS)
  return {
    'step_seconds': float(np.median(seconds[1:])),
    'step_bytes': memory.peak_memory_in_bytes,
  }
