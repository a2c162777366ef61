"""Training steps of published sizes, compiled for pods that are not here.

  python -m experiments.checks.scale

Needs the extra `aot`, and about 4 GiB of memory for each of its processes. Adds
a line a cell to cells.jsonl; at the end the table goes into README.md, here and
above. A cell that stands in cells.jsonl is not compiled again: move the file
away to measure another version.
"""

import json
import multiprocessing.pool
import pathlib
import runpy
from importlib import metadata
from typing import Any, NamedTuple

from absl import app, flags

from experiments.harness import pages
from moe_jax import config
from moe_jax.sizing import aot, estimate

_WORKERS = flags.DEFINE_integer('workers', 2, 'Processes.', lower_bound=1)

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
DONE = HERE / 'cells.jsonl'
TABLES = HERE / 'README.md', ROOT / 'README.md'
H100 = ROOT / 'pallas_kernels/tools/h100.txtpb'
NAMES = {'deepseek_v3': 'DeepSeek-V3', 'qwen3_30b': 'Qwen3-30B-A3B'}
KINDS = {
  'all-gather': 'gather',
  'reduce-scatter': 'scatter',
  'all-reduce': 'reduce',
  'ragged-all-to-all': 'ragged',
  'all-to-all': 'to all',
  'collective-permute': 'permute',
}


class Cell(NamedTuple):
  """A config of configs/scale on a topology, a row of tokens on each device."""

  config: str
  topology: str
  mesh: tuple[int, int, int]  # data, fsdp, expert
  moments: str = 'bfloat16'

  @property
  def name(self) -> str:
    return f'{self.config} {self.topology}'

  def resolved(self) -> dict[str, Any]:
    c = runpy.run_path(str(ROOT / f'configs/scale/{self.config}.py'))
    c = c['get_config']()
    data, fsdp, expert = self.mesh
    c.mesh.update(data=data, fsdp=fsdp, expert=expert, tensor=1)
    c.batch_size = data * fsdp * expert
    c.optimizer.moments = self.moments
    return config.resolve(c)


# The longest first.
CELLS = (
  Cell('deepseek_v3', 'v5p:8x8x8', (1, 8, 64), 'params'),
  Cell('qwen3_30b', 'v5p:8x8x8', (1, 8, 64), 'params'),
  Cell('qwen3_30b', '2xv5p:4x4x4', (2, 4, 16)),
  Cell('qwen3_30b', 'v6e:16x16', (1, 16, 16)),
  Cell('qwen3_30b', 'tpu7x:4x4x4', (1, 8, 16)),
  Cell('deepseek_v3', 'v6e:16x16', (1, 4, 64)),
  Cell('deepseek_v3', 'tpu7x:4x4x4', (1, 2, 64)),
  Cell('deepseek_v3', '2xv5p:4x4x4', (2, 1, 64)),
  Cell('qwen3_30b', 'h100:8', (1, 1, 8)),
)


def measure(cell: Cell) -> dict[str, Any]:
  """What the compiler says, or the error with which it ended."""
  c, gpu = cell.resolved(), cell.topology.startswith('h100')
  try:
    found = aot.in_process(c, cell.topology, gpu=str(H100) if gpu else '')
  except RuntimeError as error:
    found = {'error': str(error)}
  versions = {name: metadata.version(name) for name in ('jax', 'libtpu')}
  return {'cell': cell.name, **versions, **found}


def done() -> dict[str, dict[str, Any]]:
  """The lines of the cells that have been compiled."""
  if not DONE.exists():
    return {}
  lines = map(json.loads, DONE.read_text().splitlines())
  return {line['cell']: line for line in lines if 'error' not in line}


def row(cell: Cell, found: dict[str, Any]) -> str:
  c, gib = cell.resolved(), estimate.GIB
  plan = estimate.plan(c, cell.topology)
  there = plan.there
  error = plan.peak / found['peak'] - 1
  over = found.get('exceeds', max(0, found['peak'] - there.chip.memory))
  moved = found.get('collectives', {})
  strategy, factor = found['strategy'], c['parallel']['buffer_factor']
  said = [
    NAMES[cell.config],
    f'{cell.topology}, {" x ".join(map(str, cell.mesh))}',
    f'f32, f32, {"f32" if cell.moments == "params" else "bf16"}',
    'layers' if c['model']['remat'] else 'none',
    f'{strategy}, {factor or "worst case"}',
    f'{found["peak"] / gib:.1f} of {there.chip.memory / gib:.1f}',
    f'{plan.peak / gib:.1f}, {error:+.0%}',
    f'does not fit by {over / gib:.1f}' if over else 'fits',
    ', '.join(
      f'{short} {moved[kind] / gib:.1f}'
      for kind, short in KINDS.items()
      if moved.get(kind, 0) > 0.05 * gib
    )
    or 'not known',
    f'{found["seconds"]:.0f}',
  ]
  return f'| {" | ".join(said)} |\n'


def table() -> str:
  """A row a cell, in Markdown."""
  heads = (
    'model',
    'devices, data x fsdp x expert',
    'weights, gradients, moments',
    'recomputed',
    'strategy, buffer factor',
    'peak GiB',
    'planned GiB, error',
    'verdict',
    'GiB given to collectives in a step',
    'compile s',
  )
  text = f'| {" | ".join(heads)} |\n' + '|---' * len(heads) + '|\n'
  found = done()
  return text + ''.join(
    row(cell, found[cell.name]) for cell in CELLS if cell.name in found
  )


def write() -> None:
  """The table of what is done, into both READMEs."""
  for path in TABLES:
    pages.put(path, 'python -m experiments.checks.scale', table())


def main(argv: list[str]) -> None:
  del argv
  left = [cell for cell in CELLS if cell.name not in done()]
  # Threads that wait for a process each.
  with multiprocessing.pool.ThreadPool(_WORKERS.value) as pool:
    for line in pool.imap_unordered(measure, left):
      with DONE.open('a') as file:
        file.write(json.dumps(line) + '\n')
      print(json.dumps(line), flush=True)
  write()
  print(table())


if __name__ == '__main__':
  app.run(main)
