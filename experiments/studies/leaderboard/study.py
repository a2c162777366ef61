"""Every router and variant on one text, at equal active FLOPs."""

import pathlib

import ml_collections

from experiments.harness import language
from experiments.harness.claims import Claim
from moe_jax import config

DATA = ('eltec-eng',)
COLUMNS = {'eval_loss': 'nats a token', 'eval_bits_per_byte': 'bits a byte'}
BASE = 'top-2 of 8'


def _route(name, **options):
  return {'router': config.router(name, **options)}


def _follow(name, **options):
  return {'residual': config.choice('residual', name, **options)}


# What each changes of the model, of the losses' weights, and of the objective.
IDEAS = {
  BASE: {},
  'dense': dict(pattern='d', F=256),
  'random 2 of 8': _route('random', k=2),
  # Of one gate that is made 1 the router would learn nothing.
  'top-1 of 8, wide': dict(
    _route('topk', k=1, renormalise=False), expert_F=256
  ),
  'top-4 of 16, narrow': dict(_route('topk', k=4), E=16, expert_F=64),
  'top-2 of 32': dict(E=32),
  'Switch, capacity 1.25': dict(_route('switch', capacity=1.25), expert_F=256),
  'top-2, capacity 1.25': _route('topk', k=2, capacity=1.25),
  'sigmoid, loss-free bias': dict(
    _route('topk', k=2, score='sigmoid', bias_rate=1e-3),
    losses=dict(balance=0.0),
  ),
  'not renormalised': _route('topk', k=2, renormalise=False),
  'expert choice': _route('expert_choice', k=2),
  'V-MoE': dict(
    _route('vmoe', k=2),
    losses=dict(balance=0.0, z=0.0, importance=0.005, smooth_load=0.005),
  ),
  'one shared, top-1': dict(
    _route('topk', k=1, renormalise=False), shared_F=128
  ),
  'ReXMoE, r=2': dict(_route('rexmoe', k=2, first=8), layers_per_pool=2),
  'CoE-2, top-1 of 8': dict(
    _route('topk', k=1, renormalise=False),
    iterations=2,
    inner_residual='add',
    **_follow('replace'),
  ),
  # A step has two passes.
  'THOR, half the steps': dict(
    _route('random', per='batch', eval_per='sequence'), expert_F=256, alpha=5.0
  ),
  'momentum': _follow('heavy_ball', mu=0.7),
  # It would take the stream's place, which only its authors' block brings back.
  'Adam over depth': _follow('adam', decay=0.0),
  'robust momentum': _follow('robust'),
  'complex momentum': _follow('complex'),
}


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """A config an idea."""
  return {name: _arm(data, **changes) for name, changes in IDEAS.items()}


def _arm(data, losses=None, alpha=None, **model):
  c = language.base(language.BY_MUON, language.novels(data))
  c.model.update(N=4, E=8, shared_F=0, expert_F=128)
  c.model.router = config.router('topk', k=2)
  for key, value in model.items():
    c.model[key] = value
  c.objective.losses.update(losses or {})
  if alpha is not None:
    c.steps, c.eval_every = c.steps // 2, c.eval_every // 2
    c.objective = config.choice(
      'objective', 'consistency', losses={}, alpha=alpha, smoothing=0.0
    )
  return c


CONTROLS = {
  'dense': Claim('experts help', BASE, 'dense', headline=True),
  'random 2 of 8': Claim('routing helps', BASE, 'random 2 of 8', headline=True),
}
CLAIMS = [
  CONTROLS.get(name)
  or Claim(f'{name} is better than {BASE}', name, BASE, headline=True)
  for name in IDEAS
  if name != BASE
]
