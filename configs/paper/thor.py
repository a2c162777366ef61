"""THOR on IWSLT'14 German-English (arXiv 2110.04260, the released script).

Claim: two experts, drawn at random and made to agree, beat the dense model and
Switch. Cost: one GPU. Its E = 1 control (R-Drop) is --config.model.E=1.
Run:   moe-train --config=configs/paper/thor.py --workdir=runs/thor \
         --config.data.path='train.de-en.tsv' \
         --config.data.eval_path='valid.de-en.tsv'
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = "THOR on IWSLT'14"
  c.steps, c.batch_size, c.seq_len = 30_000, 256, 128  # 32k tokens a step
  c.data = config.source('pairs', vocab_size=10_000)
  c.model = config.model('translator', N=6, encoder_N=6, D=512, H=4, F=1024)
  c.model.update(pattern='md', E=2, expert_F=1024, block='post', init='thor')
  c.model.update(dropout=0.3, embed_std=512**-0.5, eps=1e-5, remat=True)
  c.model.router = config.router('random', per='batch', eval_per='sequence')
  c.objective = config.choice('objective', 'consistency', losses={}, alpha=5.0)
  c.optimizer.update(learning_rate=1e-3, schedule='inverse_sqrt', b2=0.98)
  c.optimizer.update(warmup=4000 / c.steps, weight_decay=1e-4, clip=0.0)
  return c
