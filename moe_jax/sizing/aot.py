"""A training step compiled for chips that are not here, and what that says.

Nothing is executed. A compilation has a process of its own: libtpu reads its
settings once, and keeps what it took.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from moe_jax import parallel, paths
from moe_jax.sizing import estimate
from moe_jax.training import train_step
from moe_jax.training.jobs import assemble, Job

# With these libtpu compiles without a TPU, in many processes at a time.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def in_process(
  c: dict[str, Any],
  topology: str,
  *,
  hlo: str = '',
  gpu: str = '',
) -> dict[str, Any]:
  """What `compile_step` finds, in a process of its own.

  Raises:
    RuntimeError: it ended with an error, the last line of which is said.
  """
  request = json.dumps(dict(c=c, topology=topology, hlo=hlo, gpu=gpu))
  done = subprocess.run(
    [sys.executable, '-m', __name__],
    input=request,
    env=os.environ | ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f'exit {done.returncode}']
    raise RuntimeError(f'compiling for {topology}: {lines[-1]}')
  return json.loads(done.stdout.splitlines()[-1])


def compile_step(
  c: dict[str, Any],
  topology: str,
  *,
  hlo: str = '',
  gpu: str = '',
) -> dict[str, Any]:
  """What the compiler says of the training step of a resolved config.

  Args:
    topology: see `planner.topology`.
    hlo: a file that gets the program's text; '' is none.
    gpu: a file with XLA's description of the GPU, where it is for one.

  Returns:
    strategy; seconds; bytes on one device: `arguments`, `peak`, which is all
    that the program takes, gaps between arrays included, and `collectives`, see
    there. Of a step that does not fit `peak` is what it needs and `exceeds` by
    how much that is too much; the others are not known.
  """
  there = estimate.topology(topology)
  c = {**c, 'mesh': parallel.filled(c['mesh'], there.devices)}
  estimate.mesh(c, there)  # do they go together?
  mesh = parallel.mesh(c['mesh'], _devices(there, gpu))
  lowered, said = lower(c, mesh)
  began, found = time.monotonic(), {'strategy': said}
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found |= too_large(str(error))
  else:
    text, memory = program.as_text(), program.memory_analysis()
    if hlo:
      paths.absolute(hlo).write_text(text)
    found |= {
      'arguments': memory.argument_size_in_bytes,
      'peak': taken(memory),
      'collectives': collectives(text),
    }
  return {**found, 'seconds': time.monotonic() - began}


def taken(memory: Any) -> int:
  """Bytes of a device that a program needs, from its memory_analysis."""
  if hasattr(memory, 'total_allocation_bytes'):
    return memory.total_allocation_bytes
  # jax 0.10 has the parts; its temporaries count a TPU's VMEM too.
  given = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return given - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def lower(
  c: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, str]:
  """The training step before it is compiled, and what a log says of it."""
  layout, said = parallel.layout(
    mesh, c['model']['router'].get('k', 1), **c['parallel']
  )
  there = job_on(mesh, c, layout)
  on_mesh = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  with train_step.precision(there), on_mesh:
    return train_step.make_step(there).lower(*_arguments(there)), said


def _devices(there, gpu):
  if there.chip.platform == 'gpu':
    if not gpu:
      raise ValueError('for a GPU, --gpu=FILE has to describe it')
    description = paths.absolute(gpu).read_text()
    return topologies.get_topology_desc(
      '', 'cuda', topology=f'1x1x{there.devices}', target_config=description
    ).devices
  several = {} if there.slices == 1 else {'num_slices': there.slices}
  return topologies.get_topology_desc(there.shape, 'tpu', **several).devices


def job_on(
  mesh: jax.sharding.Mesh, c: dict[str, Any], layout: parallel.Layout
) -> Job:
  """What job.prepare returns, without data; the devices may not be here."""
  init = estimate.model(c, layout, mesh.devices.flat[0].platform)
  return assemble(
    c,
    workdir=None,
    mesh=mesh,
    init=init,
    implementation={},
    dataset=types.SimpleNamespace(streams=False),
  )


def _arguments(abstract):
  """Shapes of the train state and of a batch, where they lie."""
  rows = jax.NamedSharding(abstract.mesh, parallel.ROWS)
  batch = estimate.batch(abstract.config)
  return (
    train_step.abstract_state(abstract),
    {
      name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows)
      for name, a in batch.items()
    },
  )


# --- what a compiler says -----------------------------------------------------


def too_large(error: str) -> dict[str, int]:
  """`peak` and `exceeds`, bytes, of libtpu's error; raises it if it is another.

  Its numbers are rounded to a hundredth of their unit.
  """
  found = re.search(
    r'memory required for HLO temporaries \(([\d.]+)([KMG])\) exceeds'
    r' available HBM \(([\d.]+)([KMG])\)',
    error,
  )
  if not found:
    raise RuntimeError(' '.join(error.split())[:500])
  number, unit, available, other = found.groups()
  size = lambda n, unit: round(float(n) * 1024 ** ' KMG'.index(unit))
  needs = size(number, unit)
  return {'peak': needs, 'exceeds': needs - size(available, other)}


COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
)


class _Line(NamedTuple):
  """An instruction of a program: %name = shape op(rest."""

  name: str
  shape: str
  op: str
  rest: str


def collectives(text: str) -> dict[str, int]:
  """Bytes by kind that one device gives to collectives in one step.

  Of a gather what comes out counts, of all others what goes in; of a ragged
  exchange the smaller of its two buffers, because rows fill no more. What is
  inside a loop counts as often as the loop runs.

  Args:
    text: an optimised program, as XLA prints it.
  """
  computations, entry = _computations(text)
  total = collections.Counter()

  def walk(name, times):
    lines = computations[name]
    shapes = {line.name: line.shape for line in lines}
    for line in lines:
      kind = line.op.removesuffix('-start')
      if kind in COLLECTIVES:
        # libtpu fuses a reduction with the cut that makes it a scatter.
        scatters = name.startswith('all-reduce-scatter')
        kind = 'reduce-scatter' if scatters else kind
        total[kind] += times * _moved(kind, line, shapes)
      elif line.op == 'while':
        body, condition = (
          re.search(rf'{key}=%([^ ,)]+)', line.rest)[1]
          for key in ('body', 'condition')
        )
        walk(body, times * _trips(line, computations[condition]))
      else:
        for called in _CALLED.findall(line.rest):
          walk(called, times)

  walk(entry, 1)
  return dict(total)


_HEAD = re.compile(r'(ENTRY )?%([^ ]+) \(.*\) -> .* \{')
_LINE = re.compile(r'\s+(?:ROOT )?%([^ ]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)')
_CALLED = re.compile(
  r'(?:calls|to_apply|true_computation|false_computation)=%([^ ,)]+)'
)
_SHAPE = re.compile(r'([a-z]+)(\d*)(?:e\w+)?\[([\d,]*)\]')


def _computations(text):
  """{name: its lines}, and the name of the one that is run."""
  found, entry, lines = {}, None, []
  for row in text.splitlines():
    if head := _HEAD.match(row):
      lines = found[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line := _LINE.match(row):
      lines.append(_Line(*line.groups()))
  return found, entry


def _trips(loop, condition):
  """How often a loop runs that counts up to a constant; else once."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known[1])
  bounds = [
    line.rest.partition(')')[0]
    for line in condition
    if line.op == 'constant' and line.shape.startswith('s32[]')
  ]
  return int(bounds[0]) if len(bounds) == 1 else 1


def _moved(kind, line, shapes):
  if kind == 'all-gather':
    return max(_bytes(line.shape), default=0)
  names = re.findall(r'%([^ ,()]+)', line.rest.partition('), ')[0])
  given = [sum(_bytes(shapes[name])) for name in names if name in shapes]
  return min(given[:2]) if kind == 'ragged-all-to-all' else sum(given)


def _bytes(shape):
  """Of each array in the type of a value."""
  return [
    math.prod(int(n) for n in sizes.split(',') if n)
    * (int(bits or 8) // 8 or 1)
    for _, bits, sizes in _SHAPE.findall(shape)
  ]


def text(found: dict[str, Any], plan: estimate.Plan) -> str:
  """What was found, beside the plan."""

  def line(what, here, planned):
    amounts = estimate.amount(here), estimate.amount(planned)
    return f'  {what:36}{amounts[0]:>12}, planned {amounts[1]}'

  seconds, strategy = found['seconds'], found['strategy']
  lines = [f'compiled in {seconds:.0f} s, strategy {strategy}']
  if 'exceeds' in found:
    over = estimate.amount(found['exceeds'])
    lines.append(f'  {"does not fit by":36}{over:>12}')
  else:
    besides = found['peak'] - found['arguments']
    lines.append(line('state', found['arguments'], sum(plan.state.values())))
    lines.append(line('besides', besides, sum(plan.step.values())))
  lines.append(line('peak', found['peak'], plan.peak))
  for kind, moved in found.get('collectives', {}).items():
    lines.append(line(kind, moved, sum(plan.traffic.get(kind, {}).values())))
  return '\n'.join(lines)


if __name__ == '__main__':
  print(json.dumps(compile_step(**json.load(sys.stdin))))
