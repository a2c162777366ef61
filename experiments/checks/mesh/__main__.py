"""Every system on every mesh by every strategy, beside one device.

  python -m experiments.checks.mesh

Adds a line a cell to cells.jsonl; the table goes into README.md at the end.
A cell that stands in cells.jsonl is not run again, unless it failed: move the
file away to measure another version.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
from importlib import metadata

from absl import app, flags

# For this process' children; jax reads them when it first asks for devices.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8'
  ' --xla_backend_optimization_level=0'
  ' --xla_cpu_parallel_codegen_split_count=1'
)
if metadata.version('jaxlib').startswith('0.10.'):
  # The emitters that later versions have not got compile twice as fast.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

from experiments.checks.mesh import cells
from experiments.harness import pages
from moe_jax import parallel

_WORKERS = flags.DEFINE_integer('workers', 2, 'Processes.', lower_bound=1)

HERE = pathlib.Path(__file__).parent
DONE = HERE / 'cells.jsonl'
README = HERE / 'README.md'
RENAMED = {'gather': 'all_gather'}  # names in lines that are older
SYSTEMS = [name for name in cells.SYSTEMS if name != 'decoding THOR']


def grid() -> list[cells.Cell]:
  """All that is possible, cells of one reference together.

  Where experts are not cut the strategies that exchange rows have nobody to
  exchange them with, and run once for a system and dtype; so do all where the
  experts' hidden width is cut.
  """
  every = itertools.product(
    *(SYSTEMS, cells.BOUNDS, (1, 4)),
    *(cells.MESHES, parallel.STRATEGIES, (False, True)),
  )

  def wanted(cell):
    *_, expert, tensor = cells.MESHES[cell.mesh]
    alone = expert == 1 and cell.strategy != 'local'
    once = cell.accumulate == 1 and not cell.remat
    return cell.possible() and (once or not (alone or tensor > 1))

  return list(filter(wanted, itertools.starmap(cells.Cell, every)))


def done() -> dict[cells.Cell, dict]:
  """The lines of the cells that have been measured."""
  if not DONE.exists():
    return {}
  names = [field.name for field in dataclasses.fields(cells.Cell)]
  found = {}
  for line in map(json.loads, DONE.read_text().splitlines()):
    values = [RENAMED.get(line[name], line[name]) for name in names]
    if 'error' not in line:
      found[cells.Cell(*values)] = line
  return found


def table(lines: list[dict], total: int) -> str:
  """The largest differences by system and mesh, in Markdown."""
  bad = sum(not line['within'] for line in lines)
  text = f'{len(lines)} of {total} cells, {bad} beyond their bounds.\n'
  shown = {
    'float64, all steps and the gradient': (
      'float64', lambda line: max(line['all'], line['gradient']),
    ),
    'float32, the first step and its gradient': (
      'float32', lambda line: max(line['first'], line['gradient']),
    ),
    'float32, all steps': ('float32', lambda line: line['all']),
  }  # fmt: skip
  for title, (dtype, value) in shown.items():
    text += f'\n| {title} | {" | ".join(cells.MESHES)} |\n'
    text += '|---' * (1 + len(cells.MESHES)) + '|\n'
    for system in SYSTEMS:
      row = [system]
      for mesh in cells.MESHES:
        key = (system, mesh, dtype)
        of = lambda line: (line['system'], line['mesh'], line['dtype'])
        found = [value(line) for line in lines if of(line) == key]
        row.append(f'{max(found):.0e}' if found else '')
      text += f'| {" | ".join(row)} |\n'
  return text


def main(argv: list[str]) -> None:
  del argv
  everything = grid()
  left = [cell for cell in everything if cell not in done()]
  spawn = multiprocessing.get_context('spawn')
  # A process that has compiled for long has grown.
  with spawn.Pool(_WORKERS.value, maxtasksperchild=100) as pool:
    for i, line in enumerate(pool.imap_unordered(cells.measure, left), start=1):
      with DONE.open('a') as file:
        file.write(json.dumps(line) + '\n')
      cell = '-'.join(str(line[k]) for k in dataclasses.asdict(left[0]))
      verdict = line.get('error', 'within' if line['within'] else 'BEYOND')
      print(
        f'{i} of {len(left)}: {cell} {line["seconds"]} s {verdict}', flush=True
      )
  lines = [line for cell, line in done().items() if cell in everything]
  pages.put(
    README, 'python -m experiments.checks.mesh', table(lines, len(everything))
  )


if __name__ == '__main__':
  app.run(main)
