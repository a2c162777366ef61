"""ReXMoE: layers of a group share their experts, let in little by little.

Claim: routers over the experts of two layers (r = 2), with progressive
scaling, learn more than those over their own layer's (arXiv 2510.17483).
Run:   moe-train --config=configs/rexmoe.py --workdir=runs/rexmoe
Twins: no mask: --config.model.router.first=16; vanilla: that, with 8, and
       --config.model.layers_per_pool=1; with the same mask: 4 and 1.
"""

from moe_jax import config


def get_config():
  c = config.read('tiny')
  c.description = 'ReXMoE on the Python standard library'
  c.model.layers_per_pool = 2
  c.model.router = config.router('rexmoe', k=2, first=c.model.E)
  c.objective.losses.update(z=0.0)
  return c
