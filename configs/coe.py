"""Chain-of-Experts: two steps through the same experts, half of them a step.

Claim: with as many experts per token, CoE-2 (2 of 8, twice) learns more than
the top-4 router with the same carried residual (arXiv 2506.18945).
Run:   moe-train --config=configs/coe.py --workdir=runs/coe
Twin:  --config.model.iterations=1 --config.model.router.k=4
"""

from moe_jax import config


def get_config():
  c = config.read('tiny')
  c.description = 'Chain-of-Experts on the Python standard library'
  c.model.router = config.router('topk', k=2, renormalise=False)
  c.model.iterations, c.model.inner_residual = 2, 'add'
  c.model.residual = config.choice('residual', 'replace')
  c.model.shared_F = c.model.expert_F
  c.objective.losses.update(balance=0.0, sequence_balance=0.001)
  return c
