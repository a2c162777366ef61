"""ReXMoE-R4 of 2.3B parameters, 0.3B active (arXiv 2510.17483, table 1).

Claim: at equal experts, pools of four layers with progressive scaling beat
vanilla by 1.1 points on nine tasks after 100B tokens. Cost: 32 Hopper GPUs.
Run:   moe-train --config=configs/paper/rexmoe_2b.py --workdir=runs/rexmoe \
         --config.data.path='fineweb/*.jsonl'
"""

from moe_jax import config


def get_config():
  c = config.read('paper/rexmoe_half')
  c.description = 'ReXMoE-R4, 2.3B parameters'
  c.model.update(N=32, D=512, E=64, expert_F=744)
  c.model.router = config.router('rexmoe', k=8, first=64)
  return c
