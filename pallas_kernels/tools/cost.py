"""What the compiler's own schedule says of a grouped matmul on a TPU.

  python -m pallas_kernels.tools.cost --chip=v5p --shape=olmoe-up

compiles the kernel for a named chip, with no TPU there, and reads the schedule
that libtpu writes. A step of the grid is modelled as the largest of its
bundles, its multiply-adds at the peak rate and its bytes at the HBM bandwidth;
the modelled time is the sum over the steps. One TensorCore does all the work.
Nothing is executed, stalls are not seen: all times are lower bounds.

  python -m pallas_kernels.tools.cost --chip=h100 --shape=olmoe-up

does the like for an H100, by a model of its own: `hopper`.

Needs the extra `aot` (libtpu, the CUDA plugin of jax and its assembler); the
rival `tokamax` needs the extra `tokamax`.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies

from pallas_kernels import shapes, tiling
from pallas_kernels.tools import command, hopper, rivals, schedule


class Row(NamedTuple):
  """One kernel on one chip for one vector of group sizes."""

  chip: str
  shape: str
  kind: str
  groups: str
  impl: str
  bundles: int  # of the largest hot region, times its runs in a step
  mxu: float  # slots of the matrix units taken in that region
  spills: int
  fills: int
  gigabytes: float
  excess: float  # bytes over those that the tiling cannot avoid
  ms: float
  roofline: float  # of the best time for the shape, whatever the tiling
  libtpu: str


def measure(impl, kind, name, chip_name, groups):
  """Compiles one kernel in this process; yields a `Row` per group sizes.

  The process must have been started with `environment`.
  """
  chip, shape = tiling.CHIPS[chip_name], shapes.find(name)
  devices = topologies.get_topology_desc(chip.topology, 'tpu').devices
  mesh = jax.sharding.Mesh(devices[:1], ('x',))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = rivals.build(impl, kind, shape, chip)
    compiled = jax.jit(program.f, in_shardings=one).lower(*program.args)
    hlo = compiled.compile().as_text()
    if program.kernel:
      found = schedule.kernels(os.environ['MOE_JAX_SCHEDULE'])
      kernel = next(
        k for k in found if k.startswith(tuple(program.kernel.split('|')))
      )
      read = schedule.read(os.environ['MOE_JAX_SCHEDULE'], kernel, chip.unit)
    else:
      read = schedule.Schedule((), 0)
    for group, group_sizes_E in shapes.groups(name, groups).items():
      steps = program.steps(group_sizes_E, hlo)
      yield _row(impl, kind, name, chip, group, read, steps, shape)


def _row(impl, kind, name, chip, group, read, steps, shape):
  cycles = model(read, steps, chip)
  M, A, B, E = shape
  least = max(
    M * A * B / chip.macs, (M * A + E * A * B + M * B) * 2 / chip.bytes
  )
  hot = max(read.hot, default=None, key=lambda r: r.macs)
  return Row(
    chip=chip.name,
    shape=name,
    kind=kind,
    groups=group,
    impl=impl,
    bundles=hot.bundles * steps.trips if hot else 0,
    mxu=round(hot.mxu, 4) if hot else 0.0,
    spills=hot.spills if hot else 0,
    fills=hot.fills if hot else 0,
    gigabytes=round(float(steps.bytes_S.sum()) / 1e9, 4),
    excess=round(float(steps.bytes_S.sum()) / steps.compulsory, 4),
    ms=round(cycles / chip.hz * 1e3, 4),
    roofline=round(least / cycles, 4),
    libtpu=_libtpu(),
  )


def model(read, steps, chip):
  """Cycles: the sum over steps of the largest of the three bounds."""
  bundles_SxP = np.zeros(steps.macs_SxP.shape)
  for macs in np.unique(steps.macs_SxP):
    if macs and read.hot:
      # The region whose products are those of the part. Of several equal
      # ones, for the first or the last step of a sum, the longest.
      near = min(abs(r.macs - macs / steps.trips) for r in read.hot)
      run = max(
        r.bundles for r in read.hot if abs(r.macs - macs / steps.trips) == near
      )
      bundles_SxP[steps.macs_SxP == macs] = steps.trips * run
  macs_S = steps.macs_SxP.sum(axis=1)
  bundles_S = bundles_SxP.sum(axis=1) + read.overhead * (macs_S > 0)
  bounds = bundles_S, macs_S / chip.macs, steps.bytes_S / chip.bytes
  return float(np.maximum.reduce(bounds).sum())


def environment(folder):
  """Variables with which libtpu compiles without a TPU, many at a time."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'LIBTPU_INIT_ARGS': schedule.flags(folder),
    'MOE_JAX_SCHEDULE': str(folder),
  }


def in_process(impl, kind, name, chip, groups):
  """Rows of one kernel, compiled in a process of its own, or why not."""
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [sys.executable, '-c', _WORKER, impl, kind, name, chip, *groups],
      env=environment(folder),
      capture_output=True,
      text=True,
      check=False,
    )
  if done.returncode:
    errors = re.findall(r'^[\w.]*(?:Error|Exit\w*|OOM)\b.*', done.stderr, re.M)
    last = [*done.stderr.strip().splitlines()[-1:], *errors][-1:]
    return f'{chip} {name} {kind} {impl}: {"".join(last)[:200]}'
  return [Row(*json.loads(line)) for line in done.stdout.splitlines()]


_WORKER = """
import json, sys
from pallas_kernels.tools import cost
impl, kind, name, chip, *groups = sys.argv[1:]
for row in cost.measure(impl, kind, name, chip, groups):
  print(json.dumps(row))
"""


def table(rows):
  """The rows as aligned text, under a heading."""
  head = (
    'chip  shape         pass groups impl      bundles  mxu %  spills/fills'
    '      GB  excess      ms  roofline %'
  )
  lines = [head]
  for r in rows:
    spills = f'{r.spills}/{r.fills}'
    lines.append(
      f'{r.chip:5} {r.shape:13} {r.kind:4} {r.groups:6} {r.impl:8}'
      f'{r.bundles or "-":>9} {100 * r.mxu:6.1f} {spills:>13}'
      f'{r.gigabytes:8.2f} {r.excess:7.2f} {r.ms:7.3f}'
      f'{100 * r.roofline:11.1f}'
    )
  return '\n'.join(lines)


def _libtpu():
  return importlib.metadata.version('libtpu')


def _define():
  """The flags; other programs that import this have their own."""
  flags.DEFINE_list('chip', ['v5p'], f'Chips: {", ".join(_IMPLS)}.')
  flags.DEFINE_list('shape', ['olmoe-up'], 'Names in shapes, or MxAxBxE.')
  flags.DEFINE_list('pass', list(rivals.PASSES), 'Passes to compile.')
  flags.DEFINE_list(
    'impl', None, 'Implementations to compile; by default all of the chip.'
  )
  flags.DEFINE_list(
    'groups', list(shapes.GROUPS), 'Group sizes to walk the grid with.'
  )
  flags.DEFINE_string('json', None, 'Also write one line per row here.')
  flags.DEFINE_integer('jobs', 2, 'Compilers at a time.', lower_bound=1)


def _check():
  """One clear line for a flag that names nothing."""
  impls = [
    impl for chip in flags.FLAGS['chip'].value for impl in _IMPLS.get(chip, ())
  ]
  for name, known in (
    ('chip', _IMPLS),
    ('pass', rivals.PASSES),
    ('impl', impls),
    ('groups', shapes.GROUPS),
  ):
    for value in flags.FLAGS[name].value or ():
      if value not in known:
        raise ValueError(
          f'--{name} has {value!r}; there are {", ".join(dict.fromkeys(known))}'
        )
  for name in flags.FLAGS['shape'].value:
    shapes.find(name)


def _one(impl, kind, name, chip, groups):
  """Rows of one kernel, or why not."""
  if chip == hopper.H100.name:
    return hopper.rows(impl, kind, name, groups)
  return in_process(impl, kind, name, chip, groups)


def main(argv):
  del argv
  try:
    _check()
    if set(flags.FLAGS['chip'].value) & set(tiling.CHIPS):
      _libtpu()
    if hopper.H100.name in flags.FLAGS['chip'].value:
      hopper.check()
  except (ValueError, FileNotFoundError) as error:
    command.stop(error)
  except ImportError:
    command.stop("libtpu is missing: pip install -e '.[aot]'")
  jobs = [
    (impl, kind, name, chip, flags.FLAGS['groups'].value)
    for chip in flags.FLAGS['chip'].value
    for name in flags.FLAGS['shape'].value
    for kind in flags.FLAGS['pass'].value
    for impl in flags.FLAGS['impl'].value or _IMPLS[chip]
    if impl in _IMPLS[chip]
  ]
  path, jobs_at_once = flags.FLAGS['json'].value, flags.FLAGS['jobs'].value
  rows, failed = [], []
  with concurrent.futures.ThreadPoolExecutor(jobs_at_once) as pool:
    for result in pool.map(lambda job: _one(*job), jobs):
      if isinstance(result, str):
        failed.append(result)
        continue
      rows.extend(result)
      if path:  # as they come: a long list may be cut short
        with open(path, 'a') as file:
          file.writelines(json.dumps(r._asdict()) + '\n' for r in result)
  rows.sort(
    key=lambda r: (r.chip, r.shape, rivals.PASSES.index(r.kind), r.groups)
  )
  for module, kind in (sys.modules[__name__], Row), (hopper, hopper.Row):
    found = [r for r in rows if isinstance(r, kind)]
    if found:
      print(module.table(found))
  for line in failed:
    print(f'not compiled: {line}')
  return 1 if failed else 0


_IMPLS = {
  **dict.fromkeys(tiling.CHIPS, rivals.IMPLS),
  hopper.H100.name: hopper.IMPLS,
}

if __name__ == '__main__':
  _define()
  command.run(main)
