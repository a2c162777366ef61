"""What a run of this study measures beside its loss."""

import numpy as np

from moe_jax.report import metrics


def measure(job, state):
  """Over the last fifth of training, where all candidates are let in."""
  del state
  lines = [x for x in metrics.read(job.workdir) if 'load' in x]
  late = lines[-len(lines) // 5 :]
  load_NxE = np.mean([line['load'] for line in late], axis=0)
  relative_NxE = load_NxE / load_NxE.mean(axis=1, keepdims=True)
  return {
    'dead': 100 * float(np.mean(relative_NxE < 0.1)),  # a tenth of fair
    'load_deviation': float(relative_NxE.std(axis=1).mean()),
  }
