"""Momentum V-MoE on handwritten digits that scikit-learn brings along.

Claim: carrying momentum over depth makes a vision mixture of experts no worse
on clean images and better on corrupted ones (MomentumSMoE, 2410.14574).
Run:   moe-train --config=configs/vmoe.py --workdir=runs/vmoe
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'Momentum V-MoE on digits'
  c.steps, c.batch_size = 400, 64
  c.data = config.source('digits')
  c.model = config.model('classifier', N=4, D=64, H=4, F=128, patch=2)
  c.model.update(pattern='dm', E=8, expert_F=128, block='vmoe', init='vit')
  c.model.router = config.router('vmoe', k=2, capacity=1.05)
  c.model.residual = config.choice('residual', 'heavy_ball', mu=0.8, sign=-1.0)
  losses = dict(importance=0.005, smooth_load=0.005)
  c.objective = config.choice('objective', 'classification', losses=losses)
  c.optimizer.learning_rate = 1e-3
  return c
