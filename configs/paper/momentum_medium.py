"""AdamSMoE-medium on WikiText-103's vocabulary (arXiv 2410.14574).

Claim: Adam's rule in the first layer and momentum in the rest ends below
MomentumSMoE, and that below the plain mixture. Cost: 80k steps, 4 GPUs.
Run:   moe-train --config=configs/paper/momentum_medium.py \
         --workdir=runs/medium --config.data.path='wiki.train.tokens'
"""

from moe_jax import config


def get_config():
  c = config.read('paper/momentum_small')
  c.description = 'AdamSMoE-medium'
  c.steps, c.batch_size, c.seq_len = 80_000, 48, 512
  c.model.update(N=6, D=352, F=352, expert_F=352, dropout=0.1)
  c.model.attention = config.attend('adaptive_span', span=1024)
  c.model.residual = config.choice('residual', 'adam')
  c.optimizer.warmup = 4000 / c.steps
  return c
