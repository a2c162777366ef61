"""ReXMoE (2510.17483): do routers gain from the experts of other layers?"""

import pathlib

import ml_collections

from experiments.harness import language
from experiments.harness.claims import Claim
from moe_jax import config

DATA = ('eltec-eng',)
COLUMNS = {
  'eval_loss': 'nats a token',
  'dead': 'dead experts, %',
  'load_deviation': 'deviation of load',
}
E = 8  # experts that a layer owns, of which a token has 2


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """r: layers that share their experts; PSR: candidates grow from 8 to all."""

  def arm(r=1, *, own=E, **router):
    c = language.base(language.ON_CPU, language.novels(data))
    c.model.update(N=4, E=own, shared_F=0, expert_F=128, layers_per_pool=r)
    c.model.router = config.router('rexmoe', k=2, **router)
    c.objective.losses.update(balance=0.01, z=0.0)
    return c

  steps = '0.21:16,0.42:24,0.63:32'
  return {
    'r=1': arm(),
    'r=2': arm(2),
    'r=4': arm(4),
    'r=2, linear': arm(2, first=E),
    'r=4, linear': arm(4, first=E),
    'r=4, stepwise': arm(4, first=E, schedule='stepwise', stages=steps),
    # The same part of the candidates masked, but within a layer's own experts.
    'r=1, masked from 1/2': arm(first=E // 2),
    'r=1, masked from 1/4': arm(first=E // 4),
    'r=1, renormalised': arm(renormalise=True),
    'r=4, linear, renormalised': arm(4, first=E, renormalise=True),
    'r=1 of 32 experts': arm(own=4 * E),
  }


NEARLY = 0.02  # nats

CLAIMS = [
  Claim(
    f'reuse alone changes nothing (to {NEARLY} nats)',
    'r=4', 'r=1', low=-NEARLY, high=NEARLY,
  ),
  Claim('reuse of two layers with PSR lowers the loss', 'r=2, linear', 'r=1'),
  Claim(
    'reuse of four layers with PSR lowers the loss',
    'r=4, linear', 'r=1', headline=True,
  ),
  Claim(
    'PSR is what makes reuse of four layers work',
    'r=4, linear', 'r=4', headline=True,
  ),
  Claim(
    f'linear PSR is no worse than stepwise (by {NEARLY} nats)',
    'r=4, linear', 'r=4, stepwise', high=NEARLY,
  ),
  Claim(
    'reuse of four layers with PSR is better than the same mask within a'
    ' layer (a control that the paper lacks)',
    'r=4, linear', 'r=1, masked from 1/4', headline=True,
  ),
  Claim(
    f'nor is the mask alone better than none (by {NEARLY} nats; a control)',
    'r=1, masked from 1/4', 'r=1', low=-NEARLY, high=float('inf'),
  ),
  Claim(
    'with gates that sum to 1 the gain is there too (a control)',
    'r=4, linear, renormalised', 'r=1, renormalised',
  ),
  Claim(
    f'reuse of four layers is as good as four times the experts (to {NEARLY}'
    ' nats)',
    'r=4, linear', 'r=1 of 32 experts', high=NEARLY, headline=True,
  ),
  Claim(
    'more experts are dead in a larger pool',
    'r=4', 'r=1', 'dead', 0.0, float('inf'),
  ),
  Claim(
    'load is less even in a larger pool',
    'r=4, linear', 'r=1', 'load_deviation', 0.0, float('inf'),
  ),
  Claim(
    'zero-shot accuracy; r above 4; prefill time on GPUs',
    untestable='no such budget',
  ),
]  # fmt: skip
