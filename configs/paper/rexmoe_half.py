"""ReXMoE-R4 of 0.5B parameters, 0.07B active (arXiv 2510.17483, table 1).

Claim: at equal experts, pools of four layers with progressive scaling beat
vanilla by 0.4 points on nine tasks after 100B tokens. Cost: 32 Hopper GPUs.
Run:   moe-train --config=configs/paper/rexmoe_half.py --workdir=runs/rexmoe \
         --config.data.path='fineweb/*.jsonl'
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'ReXMoE-R4, 0.5B parameters'
  c.steps, c.batch_size, c.seq_len = 47_684, 512, 4096
  c.data = config.source('text', vocab_size=32_000, field='text')
  c.model.update(N=16, D=768, H=16, E=32, expert_F=384, layers_per_pool=4)
  c.model.update(init='megatron', dtype='bfloat16', remat=True)
  c.model.attention = config.attend('gqa', num_kv_heads=2)
  c.model.router = config.router('rexmoe', k=4, first=32)
  c.objective.losses.update(balance=0.01, z=0.0)
  c.optimizer.update(learning_rate=3e-4, warmup=100 / c.steps)
  return c
