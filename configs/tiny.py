"""The main job: a small MoE language model on Python's own standard library.

Claim: in four minutes on two CPU cores it predicts held-out source files at
the bits per byte that README.md states, beside those of xz -9.
Run:   moe-train --config=configs/tiny.py --workdir=runs/tiny
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'A small MoE language model on the Python standard library'
  # Few tokens a step: what four minutes lack is updates, not rows.
  c.steps, c.batch_size, c.seq_len = 840, 8, 128
  c.eval_every, c.checkpoint_every = 200, 200
  c.data.vocab_size = 2048
  c.data.eval_bytes = 100_000
  c.model.update(N=2, D=128, H=2, E=8, expert_F=256)
  c.optimizer.update(name='muon', learning_rate=1e-2)
  return c
