"""MomentumSMoE (2410.14574): does momentum over depth pay, clean or not?"""

import pathlib

import ml_collections

from experiments.harness import language
from experiments.harness.claims import Claim
from moe_jax import config

DATA = ('eltec-eng', 'wikitext2-eval', 'mnist')
COLUMNS = {
  'eval_loss': 'nats a target',
  'swapped_loss': 'nats, words swapped',
  'wikitext_loss': 'nats, WikiText-2',
  'error': 'errors, %',
  'noise_error': 'noise, %',
  'blur_error': 'blur, %',
  'contrast_error': 'contrast, %',
  'shift_error': 'shift, %',
  'spoilt_error': 'mean of the four, %',
}

RULES = {
  'SMoE': ('plain', {}),
  'Momentum': ('heavy_ball', dict(mu=0.7, sign=-1.0)),
  'Adam': ('adam', {}),
  'Robust': ('robust', {}),
}


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """Language models in the authors' block and in a clean one; V-MoE."""
  made = {}
  for name, (rule, options) in RULES.items():
    made[name] = _language(data, rule, options)
  for name in ('SMoE', 'Momentum'):
    made[f'pre {name}'] = _pre(data, *RULES[name])
  made |= {
    'V-MoE': _vision(data, 'pre', 'plain'),
    # The authors' momentum has a norm more in every block; so has this one.
    'V-MoE, norms matched': _vision(data, 'vmoe', 'plain'),
    'V-MoE Momentum': _vision(data, 'vmoe', 'heavy_ball', mu=0.8, sign=-1.0),
    'V-MoE Robust': _vision(data, 'vmoe', 'robust'),
  }
  return made


def _language(data, rule, options):
  """Top-2 of 16 experts, as wide as the model; no balancing loss."""
  c = language.base(language.BY_MUON, language.novels(data))
  c.data.order = 'stream'
  c.model.update(N=3, E=16, expert_F=128, shared_F=0, tied=False, bias=True)
  c.model.update(block='momentum_lm', norm='layer', eps=1e-5)
  c.model.update(activation='relu', init='momentum_smoe', embed_std=1.0)
  c.model.attention = config.attend('adaptive_span', span=128)
  c.model.router = config.router('topk', k=2, bias=True, init='torch')
  c.model.residual = config.choice('residual', rule, **options)
  c.objective.losses.update(balance=0.0, z=0.0)
  return c


def _pre(data, rule, options):
  """The same number of layers and experts in a pre-norm block."""
  c = language.base(language.BY_MUON, language.novels(data))
  c.model.update(N=3, E=16, expert_F=128, shared_F=0)
  c.model.router = config.router('topk', k=2)
  c.model.residual = config.choice('residual', rule, **options)
  return c


def _vision(data, block, rule, **options):
  """Every second layer has 8 experts; tokens are 4 x 4 pixels."""
  c = config.default()
  c.steps, c.batch_size = 300, 64
  c.eval_every, c.checkpoint_every = 75, 150
  path = data / 'mnist/mnist_10k_train_10k_test.npz'
  c.data = config.source('images', path=str(path), eval_images=1000)
  c.model = config.model('classifier', N=4, D=64, H=4, F=128, patch=4)
  c.model.update(pattern='dm', E=8, expert_F=128, block=block, init='vit')
  # Eight images share a capacity, of 49 patches and a class token each.
  c.model.router = config.router('vmoe', k=2, capacity=1.05, group=8 * 50)
  c.model.residual = config.choice('residual', rule, **options)
  losses = dict(importance=0.005, smooth_load=0.005)
  c.objective = config.choice('objective', 'classification', losses=losses)
  c.optimizer.update(name='muon', learning_rate=1e-2)
  return c


CLAIMS = [
  Claim(
    'momentum over depth lowers the loss',
    'Momentum', 'SMoE', headline=True,
  ),
  Claim('Adam over depth lowers the loss', 'Adam', 'SMoE', headline=True),
  Claim('Adam is better than momentum', 'Adam', 'Momentum'),
  Claim(
    'robust momentum over depth lowers the loss',
    'Robust', 'SMoE', headline=True,
  ),
  Claim(
    'momentum over depth lowers the loss in a pre-norm block (a control)',
    'pre Momentum', 'pre SMoE', headline=True,
  ),
  Claim(
    'momentum over depth lowers the loss of text with words swapped',
    'Momentum', 'SMoE', 'swapped_loss', headline=True,
  ),
  Claim('Adam lowers that', 'Adam', 'SMoE', 'swapped_loss'),
  Claim('robust momentum lowers that', 'Robust', 'SMoE', 'swapped_loss'),
  Claim(
    "momentum lowers another domain's loss",
    'Momentum', 'SMoE', 'wikitext_loss',
  ),
  Claim(
    'momentum makes fewer errors on clean images',
    'V-MoE Momentum', 'V-MoE', 'error',
  ),
  Claim(
    'V-MoE with momentum makes fewer errors than its own architecture without'
    ' (a control)',
    'V-MoE Momentum', 'V-MoE, norms matched', 'error', headline=True,
  ),
  *(
    Claim(
      f'{rule} makes fewer errors on spoilt images than V-MoE',
      f'V-MoE {rule}', 'V-MoE', 'spoilt_error',
    )
    for rule in ('Momentum', 'Robust')
  ),
  *(
    Claim(
      f'{rule} makes fewer errors on spoilt images than its own architecture'
      ' without (a control)',
      f'V-MoE {rule}', 'V-MoE, norms matched', 'spoilt_error', headline=True,
    )
    for rule in ('Momentum', 'Robust')
  ),
  Claim(
    'robust momentum makes fewer errors on spoilt images than momentum',
    'V-MoE Robust', 'V-MoE Momentum', 'spoilt_error',
  ),
  Claim(
    'WikiText-103 and ImageNet at their sizes; learnable constants; Soft MoE',
    untestable='no such budget; no code of theirs is public for the last two',
  ),
]  # fmt: skip
