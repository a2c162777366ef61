"""MomentumSMoE-small on WikiText-103's vocabulary (arXiv 2410.14574).

Claim: 70,603,015 parameters, as a log of the authors' code has it, 768 of them
in norms that are never used and that we do not have. Cost: 60k steps.
Run:   moe-train --config=configs/paper/momentum_small.py --workdir=runs/small \
         --config.data.path='wiki.train.tokens'
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'MomentumSMoE-small'
  c.steps, c.batch_size, c.seq_len = 60_000, 96, 256
  c.data = config.source('text', vocab_size=267_735, order='stream')
  c.model.update(N=3, D=128, H=8, F=128, E=16, expert_F=128, dropout=0.7)
  c.model.update(block='momentum_lm', norm='layer', eps=1e-5, tied=False)
  c.model.update(activation='relu', bias=True, init='momentum_smoe')
  c.model.update(embed_std=1.0)
  c.model.attention = config.attend('adaptive_span', span=256)
  c.model.router = config.router('topk', k=2, bias=True, init='torch')
  c.model.residual = config.choice('residual', 'heavy_ball', mu=0.7, sign=-1.0)
  c.objective.losses.update(balance=0.0, z=0.0)
  c.optimizer.update(learning_rate=7e-4, schedule='constant', b2=0.999)
  c.optimizer.update(warmup=3000 / c.steps, weight_decay=0.0, clip=0.0)
  return c
