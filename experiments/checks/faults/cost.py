"""What checkpoints cost at the default period of configs/tiny.py."""

import pathlib
import runpy
import statistics
import tempfile
import time

import jax

from experiments.checks.faults import runs
from moe_jax.training import checkpoint, jobs, train_step


def percent(rounds: int) -> float:
  """Of the time of a step, by blocks of a period with a save and without one.

  The blocks alternate in one run; the median of each kind counts. A save takes
  time when it begins, and from the steps beside which it goes on.
  """
  c = runpy.run_path(str(runs.ROOT / 'configs/tiny.py'))['get_config']()
  with tempfile.TemporaryDirectory() as folder:
    job = jobs.prepare(c, folder)
    state, batches = train_step.initial_state(job), job.train_batches()
    step = train_step.make_step(job)
    saved = checkpoint.Checkpoints(pathlib.Path(folder), c.keep_checkpoints)
    seconds = {True: [], False: []}
    state, _ = step(state, job.put(next(batches)))  # compiles
    saved.save(0, state, {'batches': batches.get_state()})
    for i in range(1, 2 * rounds + 1):
      saved.wait()
      jax.block_until_ready(state)
      began = time.monotonic()
      if i % 2:
        saved.save(i, state, {'batches': batches.get_state()})
      for _ in range(c.checkpoint_every):
        state, found = step(state, job.put(next(batches)))
        jax.block_until_ready(found['row'])
      seconds[bool(i % 2)].append(time.monotonic() - began)
    saved.close()
  with_save, without = (statistics.median(seconds[k]) for k in (True, False))
  return 100 * (with_save / without - 1)
