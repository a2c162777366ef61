"""The language model that studies change: two layers of 32 small experts.

Its sides are multiples of 64 and it computes in bfloat16, so that a GPU has a
grouped matmul for it; the parameters are float32.
"""

import pathlib

import ml_collections

from experiments import sources
from moe_jax import config

STEPS, ROWS, LENGTH = 1000, 16, 256  # 4,096,000 tokens


def base() -> ml_collections.ConfigDict:
  """A pre-norm decoder with top-8 of 32 experts and one that all see."""
  c = config.default()
  c.steps, c.batch_size, c.seq_len = STEPS, ROWS, LENGTH
  c.eval_every = STEPS // 4
  c.checkpoint_every = STEPS // 2
  c.model.update(N=2, D=128, H=4, E=31, expert_F=64, shared_F=64)
  c.model.dtype = 'bfloat16'
  c.model.router = config.router('topk', k=8, renormalise=False)
  c.optimizer.update(learning_rate=2e-3, warmup=0.1)
  return c


def novels(c: ml_collections.ConfigDict, data: pathlib.Path) -> None:
  """Trains on novels; evaluates on 1000 paragraphs of others."""
  folder = data / 'eltec-eng'
  held_out = sources.head(folder / 'valid.txt.xz', 1000)
  c.data = _text(folder / 'train.txt.xz', held_out)


def sums(c: ml_collections.ConfigDict, data: pathlib.Path) -> None:
  """Trains on grade-school mathematics; evaluates on 600 of the test."""
  folder = data / 'gsm8k'
  held_out = sources.head(folder / 'test.jsonl', 600)
  c.data = _text(folder / 'train.jsonl', held_out, field='question,answer')


def _text(path, eval_path, **options):
  c = config.source('text', path=str(path), eval_path=str(eval_path), **options)
  c.vocab_size, c.eval_bytes = 2048, 300_000
  return c
