"""The config of a run so small that a test can make it, and what one says."""

import json
import pathlib
import subprocess
import sys

from moe_jax import config

ROOT = pathlib.Path(__file__).parents[2]


def small_config(corpus, **changes):
  """`model__E=8` sets model.E."""
  c = config.default()
  c.steps, c.batch_size, c.seq_len = 6, 8, 16
  c.log_every = 1
  c.data.update(
    source='text', path=str(corpus), tokenizer='bytes', eval_fraction=0.2
  )
  c.model.update(N=2, D=16, H=2, E=4, expert_F=16, F=32)
  c.model.attention.num_kv_heads = 1
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


def lines_of(workdir):
  """Those of metrics.jsonl, as dicts."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def without_clocks(lines):
  """The same, but for what time changes."""
  return [
    {k: v for k, v in line.items() if k != 'tokens_per_second'}
    for line in lines
  ]


def command(name, *arguments):
  """What moe-<name> does, in a process of its own."""
  return subprocess.run(
    [sys.executable, '-m', f'moe_jax.commands.{name}', *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
