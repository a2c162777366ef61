"""The dense twin of configs/tiny.py: no experts, the same active parameters.

Claim: at equal active parameters, data and steps, the experts of tiny.py lower
the held-out loss; experiments/LOG.md has the comparison.
Run:   moe-train --config=configs/dense.py --workdir=runs/dense
"""

from moe_jax import config


def get_config():
  c = config.read('tiny')
  c.description = 'The dense twin of the main job'
  c.model.pattern = 'd'
  c.model.F = c.model.router.k * c.model.expert_F
  return c
