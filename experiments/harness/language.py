"""The language model that studies change: two layers of 32 small experts.

In two sizes of study: for a core of a CPU, minutes a run, and for a GPU. There
it computes in bfloat16, from float32 parameters, as the grouped matmul for
Hopper wants it, which wants multiples of 64 too.
"""

import pathlib
from typing import NamedTuple

import ml_collections

from experiments.harness import sources
from moe_jax import config


class Size(NamedTuple):
  steps: int
  rows: int
  length: int
  dtype: str
  optimizer: str
  learning_rate: float
  eval_bytes: int


ON_CPU = Size(1000, 8, 128, 'float32', 'adamw', 3e-3, 100_000)  # 1.0M tokens
ON_GPU = Size(1000, 16, 256, 'bfloat16', 'adamw', 2e-3, 300_000)  # 4.1M tokens
# Where it was tried it ended where 1000 steps of AdamW did, in three fifths of
# the time: there is time for two seeds more, which halves an interval.
BY_MUON = ON_CPU._replace(steps=400, optimizer='muon', learning_rate=1e-2)


def base(
  size: Size, text: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """A pre-norm decoder with top-8 of 32 experts and one that all see.

  Args:
    text: its data, `novels` or `sums`.
  """
  c = config.default()
  c.steps, c.batch_size, c.seq_len = size.steps, size.rows, size.length
  c.eval_every = size.steps // 4
  c.checkpoint_every = size.steps // 2
  c.data = text
  c.data.eval_bytes = size.eval_bytes
  c.model.update(N=2, D=128, H=4, E=31, expert_F=64, shared_F=64)
  c.model.dtype = size.dtype
  c.model.router = config.router('topk', k=8, renormalise=False)
  c.optimizer.update(name=size.optimizer, warmup=0.1)
  c.optimizer.learning_rate = size.learning_rate
  return c


def novels(data: pathlib.Path) -> ml_collections.ConfigDict:
  """Trains on novels; evaluates on 1000 paragraphs of another."""
  folder = data / 'eltec-eng'
  held_out = sources.head(folder / 'valid.txt.xz', 1000)
  return _text(folder / 'train.txt.xz', held_out)


def sums(data: pathlib.Path) -> ml_collections.ConfigDict:
  """Trains on grade-school mathematics; evaluates on 600 of the test."""
  folder = data / 'gsm8k'
  held_out = sources.head(folder / 'test.jsonl', 600)
  return _text(folder / 'train.jsonl', held_out, field='question,answer')


def _text(path, eval_path, **options):
  c = config.source('text', path=str(path), eval_path=str(eval_path), **options)
  c.vocab_size = 2048
  return c
