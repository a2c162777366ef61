"""moe-train, with bad numbers in some batches: POISON=4,5 or POISON=always."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np

from moe_jax import main
from moe_jax.training import jobs


def poisoned(job: jobs.Job, which: str) -> jobs.Job:
  """The job, whose loss is NaN in the batches that these steps read first.

  It is the data that are bad: a run that reads on has good ones.
  """
  clean, batches = job.objective, job.train_batches()
  steps = [int(s) for s in which.split(',') if s.isdigit()]
  read = [next(batches)['ids_BxL'] for _ in range(max(steps, default=0))]
  bad_NxBxL = np.stack([read[step - 1] for step in steps]) if steps else None

  def objective(forward, batch, tokens=None):
    loss, found = clean(forward, batch, tokens)
    if bad_NxBxL is None:  # always
      return loss * jnp.nan, found
    same_NxBxL = jnp.asarray(bad_NxBxL) == batch['ids_BxL'][None]
    bad = jnp.all(same_NxBxL, axis=(1, 2)).any()
    return loss * jnp.where(bad, jnp.nan, 1.0), found

  return dataclasses.replace(job, objective=objective)


if __name__ == '__main__':
  if os.environ.get('POISON'):
    prepare = jobs.prepare

    def prepare_poisoned(config, workdir):
      job = prepare(config, workdir)
      return job and poisoned(job, os.environ['POISON'])

    jobs.prepare = prepare_poisoned
  main.console()
