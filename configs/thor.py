"""THOR: random experts that are made to agree, in a translation model.

Claim: of two passes through randomly drawn experts, each a regulariser of the
other, a translation model learns as well as from a learned router (2110.04260).
Run:   moe-train --config=configs/thor.py --workdir=runs/thor \
         --config.data.path='train.en-de.tsv' \
         --config.data.eval_path='valid.en-de.tsv'
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'THOR: two passes through random experts, translation'
  c.steps, c.batch_size, c.seq_len = 1500, 32, 40
  c.data = config.source('pairs', vocab_size=2048, eval_lines=200)
  c.model = config.model('translator', N=2, encoder_N=2, D=128, H=4, F=256)
  c.model.update(pattern='md', E=2, expert_F=256, block='post', init='thor')
  c.model.update(dropout=0.1, embed_std=128**-0.5, eps=1e-5)
  c.model.router = config.router('random', per='batch', eval_per='sequence')
  c.objective = config.choice('objective', 'consistency', losses={}, alpha=5.0)
  c.optimizer.update(schedule='inverse_sqrt', warmup=0.1, b2=0.98, clip=0.0)
  return c
