"""What a run of this study measures: modes of inference, and draws."""

import jax.numpy as jnp
import numpy as np

from experiments.harness import measures
from experiments.studies.thor.study import MODES
from moe_jax.training import loop, train_step

DRAWS = 4


def measure(job, state):
  """Of random experts: each mode of inference, and what a draw changes.

  `draw_deviation` is that of the loss over draws of an expert a token.
  """
  c = job.config['model']
  if c['router']['name'] != 'random' or c['pattern'] == 'd' or c['E'] == 1:
    return {}
  found = {}
  for mode in MODES:
    other = measures.changed(job, model__router__eval_per=mode)
    values = measures.evaluated(other, state)
    found[f'{mode}_loss'] = values['eval_loss']
  # The draws of an evaluation follow from the seed and the step.
  other = measures.changed(job, model__router__eval_per='token')
  run = train_step.make_eval(other)
  losses = []
  for i in range(DRAWS):
    later = state._replace(step=state.step + jnp.int32(i + 1))
    values = train_step.evaluate(other, run, later, share=1.0)
    losses.append(values['eval_loss'])
  found['draw_deviation'] = float(np.std(losses, ddof=1))
  best = measures.changed(job, model__router__eval_per='ensemble')
  found['ensemble_bleu'] = loop.bleu(best, state)['eval_bleu']
  return found
