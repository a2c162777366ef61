"""Every router and variant on one text, at equal active FLOPs."""

import pathlib

import ml_collections

from experiments import language
from experiments.claims import Claim
from moe_jax import config

DATA = ('eltec-eng',)
COLUMNS = {'eval_loss': 'nats a token', 'eval_bits_per_byte': 'bits a byte'}
BASE = 'top-2 of 8'


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """A line an idea; what it changes of the base is what stands there."""

  def arm(**model):
    c = language.base()
    language.novels(c, data)
    c.model.update(N=4, E=8, shared_F=0, expert_F=128)
    c.model.router = config.router('topk', k=2)
    for key, value in model.items():
      c.model[key] = value
    return c

  route = lambda name, **options: arm(router=config.router(name, **options))
  follow = lambda name, **options: arm(
    residual=config.choice('residual', name, **options)
  )
  return {
    BASE: arm(),
    'dense': arm(pattern='d', F=256),
    'random 2 of 8': route('random', k=2),
    'top-1 of 8, wide': arm(router=config.router('topk', k=1), expert_F=256),
    'top-4 of 16, narrow': arm(
      router=config.router('topk', k=4), E=16, expert_F=64
    ),
    'top-2 of 32': arm(E=32),
    'Switch, capacity 1.25': arm(
      router=config.router('switch', capacity=1.25), expert_F=256
    ),
    'top-2, capacity 1.25': route('topk', k=2, capacity=1.25),
    'sigmoid, loss-free bias': _without_balance(
      route('topk', k=2, score='sigmoid', bias_rate=1e-3)
    ),
    'not renormalised': route('topk', k=2, renormalise=False),
    'expert choice': route('expert_choice', k=2),
    'V-MoE': _with_losses(route('vmoe', k=2)),
    'one shared, top-1': arm(
      router=config.router('topk', k=1, renormalise=False), shared_F=128
    ),
    'ReXMoE, r=2': arm(
      router=config.router('rexmoe', k=2, first=8), layers_per_pool=2
    ),
    'CoE-2, top-1 of 8': arm(
      router=config.router('topk', k=1, renormalise=False),
      iterations=2,
      link='add',
      residual=config.choice('residual', 'replace'),
    ),
    'momentum': follow('heavy_ball', mu=0.7),
    'Adam over depth': follow('adam'),
    'robust momentum': follow('robust'),
    'complex momentum': follow('complex'),
  }


def _without_balance(c):
  c.objective.losses.balance = 0.0
  return c


def _with_losses(c):
  c.objective.losses.update(importance=0.005, smooth_load=0.005)
  return c


ARMS = (
  *('random 2 of 8', 'top-1 of 8, wide', 'top-4 of 16, narrow'),
  *('top-2 of 32', 'Switch, capacity 1.25', 'top-2, capacity 1.25'),
  *('sigmoid, loss-free bias', 'not renormalised', 'expert choice', 'V-MoE'),
  *('one shared, top-1', 'ReXMoE, r=2', 'CoE-2, top-1 of 8', 'momentum'),
  *('Adam over depth', 'robust momentum', 'complex momentum'),
)
CLAIMS = [
  Claim('experts help', BASE, 'dense'),
  Claim('routing helps', BASE, 'random 2 of 8'),
  *(Claim(f'{arm} is better than {BASE}', arm, BASE) for arm in ARMS[1:]),
]
