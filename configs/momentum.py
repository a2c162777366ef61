"""MomentumSMoE: the experts' answers move the stream with momentum over depth.

Claim: m = 0.7 m + answer, in place of the answer, lowers the held-out loss at
no cost in parameters (arXiv 2410.14574). A clean pre-norm block.
Run:   moe-train --config=configs/momentum.py --workdir=runs/momentum
Twin:  --config.model.residual.mu=0
"""

from moe_jax import config


def get_config():
  c = config.read('tiny')
  c.description = 'MomentumSMoE on the Python standard library'
  c.model.N, c.model.expert_F = 4, 128
  c.model.residual = config.choice('residual', 'heavy_ball', mu=0.7)
  return c
