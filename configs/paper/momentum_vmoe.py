"""Robust MomentumV-MoE, ViT-S/32 with experts in every second layer.

Claim: robust momentum over depth keeps ImageNet's accuracy and raises that on
corrupted images (arXiv 2410.14574). Cost: 300 epochs of ImageNet.
Run:   moe-train --config=configs/paper/momentum_vmoe.py --workdir=runs/vmoe \
         --config.data.path='imagenet/*.npz'
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'Robust MomentumV-MoE-S/32'
  c.steps, c.batch_size = 46_000, 8192
  c.data = config.source('images')
  c.model = config.model('classifier', N=8, D=512, H=8, F=2048, patch=32)
  c.model.update(pattern='dm', E=8, expert_F=2048, block='vmoe', init='vit')
  c.model.update(dtype='bfloat16', remat=True)
  # Eight images of 7 x 7 patches and a class token share a capacity.
  c.model.router = config.router('vmoe', k=2, capacity=1.05, group=8 * 50)
  c.model.residual = config.choice('residual', 'robust', rho=0.2, kappa=1.25)
  losses = dict(importance=0.005, smooth_load=0.005)
  c.objective = config.choice('objective', 'classification', losses=losses)
  c.objective.sigmoid = True
  c.optimizer.update(learning_rate=3e-3, b2=0.999, warmup=10_000 / c.steps)
  return c
