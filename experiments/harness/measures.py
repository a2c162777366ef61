"""More numbers of a trained run: on other data, or with other options."""

import tempfile
from typing import Any

import ml_collections

from moe_jax.training import jobs, train_step


def changed(job: jobs.Job, **changes: Any) -> jobs.Job:
  """The job with other options: data__path='x' sets config.data.path.

  A trained state of the first is one of the second, if only what is evaluated
  changes, or how.
  """
  values = {k: v for k, v in job.config.items() if k != 'corpus_sha256'}
  c = ml_collections.ConfigDict(values)
  c.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  with tempfile.TemporaryDirectory() as folder:
    return jobs.prepare(c, folder)


def evaluated(job: jobs.Job, state: train_step.TrainState) -> dict[str, float]:
  """All that an evaluation of the whole held-out data finds."""
  return train_step.evaluate(job, train_step.make_eval(job), state, share=1.0)
