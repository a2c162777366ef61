"""MomentumSMoE's own language model, small: its attention and double residual.

Claim: in the authors' block, momentum over depth lowers the held-out loss of
the sparse mixture of experts (arXiv 2410.14574).
Run:   moe-train --config=configs/momentum_lm.py --workdir=runs/momentum_lm
Twin:  --config.model.residual.mu=0
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = "MomentumSMoE's language model on the standard library"
  c.steps, c.batch_size, c.seq_len = 840, 8, 128
  c.data.update(vocab_size=2048, eval_bytes=100_000, order='stream')
  c.model.update(N=3, D=128, H=4, E=8, expert_F=128, tied=False, bias=True)
  c.model.update(block='momentum_lm', norm='layer', eps=1e-5)
  c.model.update(activation='relu', init='momentum_smoe', embed_std=1.0)
  c.model.attention = config.attend('adaptive_span', span=128)
  c.model.router = config.router('topk', k=2, bias=True, init='torch')
  c.model.residual = config.choice('residual', 'heavy_ball', mu=0.7, sign=-1.0)
  c.objective.losses.update(balance=0.0, z=0.0)
  c.optimizer.update(learning_rate=3e-3, schedule='constant', warmup=0.05)
  c.optimizer.update(b2=0.999, weight_decay=0.0, clip=0.0)
  return c
