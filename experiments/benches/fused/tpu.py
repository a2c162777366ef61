"""One routed layer compiled for a TPU that is not there: memory and time.

`measure` is for a process with the variables of `cost.environment`, the parent
(`python -m experiments.benches.fused --what=tpu`) makes one for each program.
What is compiled is the gradient of half the sum of squares of the layer's
answer, to x, gates and all weights, so that nothing of the backward pass can
be done before the forward pass.

The modelled time of a program is that of its kernels
(`pallas_kernels.tools.cost`: each step of a grid the largest of bundles,
multiply-adds and bytes) and of all else that XLA put around them, by bytes at
the HBM bandwidth: each instruction reads its operands and writes its results
once, a gather reads as much as it writes. One thing after the other: what
SparseCores could do beside the TensorCore is not credited to anyone.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from experiments.benches.fused import layers
from pallas_kernels import shapes, tiling
from pallas_kernels.tools import cost, rivals, schedule, traffic

_BYTES = {'bf16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'pred': 1}
# Instructions that move nothing, or whose work is told by another one.
_FREE = (
  'parameter', 'constant', 'bitcast', 'get-tuple-element', 'tuple', 'iota',
  'call-start', 'call-update', 'copy-start', 'opt-barrier', 'after-all',
)  # fmt: skip


class Instruction(NamedTuple):
  """A line of a program's entry, with bytes in HBM, tiles padded."""

  name: str
  kind: str
  outs: tuple[str, ...]  # dims of each result
  written: int
  operands: tuple[str, ...]
  gathers: bool


def slopes(f):
  """The gradients of half the sum of squares of f(*arguments)."""

  def run(weights, x_TxD, gate_TxK, expert_TxK):
    def loss(weights, x_TxD, gate_TxK):
      y_TxD = f(weights, x_TxD, gate_TxK, expert_TxK)
      return 0.5 * jnp.sum(jnp.square(y_TxD.astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2))(weights, x_TxD, gate_TxK)

  return run


def measure(chip_name: str, model: str, strategy: str) -> list[dict]:
  """What is told of one program; modelled for groups that are even and Zipf."""
  chip, size = tiling.CHIPS[chip_name], layers.MODELS[model]
  f = slopes(layers.layer(size, strategy, gmm='tpu'))
  args = layers.arguments(size, 'bfloat16')
  devices = topologies.get_topology_desc(chip.topology, 'tpu').devices
  mesh = jax.sharding.Mesh(devices[:1], ('x',))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(f, in_shardings=one).lower(*args).compile()
    memory = compiled.memory_analysis()
    line = {
      'what': 'tpu', 'chip': chip_name, 'layer': model, **size._asdict(),
      'row': strategy, 'libtpu': cost._libtpu(),
      'peak_bytes': memory.peak_memory_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes,
      'output_bytes': memory.output_size_in_bytes,
    }  # fmt: skip
    if strategy == 'plain':  # its kernels are XLA's own
      return [line]
    entry = parse(compiled.as_text())
    rest = sum(others(entry).values())
    lines = []
    for name, group in shapes.GROUPS.items():
      group_sizes_E = group(size.T * size.K, size.E)
      expert_N = np.repeat(np.arange(size.E, dtype=np.int32), group_sizes_E)
      known = *args[:3], expert_N.reshape(size.T, size.K)
      found = kernels(f, known, entry, chip)
      ms = {k: round(cycles / chip.hz * 1e3, 4) for k, cycles in found.items()}
      other = rest / chip.bandwidth * 1e3
      lines.append({
        **line, 'groups': name, 'ms': round(sum(ms.values()) + other, 4),
        'kernels_ms': ms, 'rest_ms': round(other, 4), 'rest_bytes': rest,
      })  # fmt: skip
    return lines


def beyond(line: dict) -> int:
  """Bytes of a program's peak that are no weights, inputs or gradients."""
  return line['peak_bytes'] - line['argument_bytes'] - line['output_bytes']


# --- kernels ------------------------------------------------------------------


def kernels(f, args, entry, chip):
  """{name in the program: modelled cycles} of all Mosaic kernels of f."""
  folder = os.environ['MOE_JAX_SCHEDULE']
  listed = set(schedule.kernels(folder))
  calls = {}  # names of the program, by what they are
  for i in entry:
    if i.kind == 'custom-call':
      calls.setdefault((_stem(i.name), i.outs), []).append(i.name)
  alike = {what: list(names) for what, names in calls.items()}
  found = {}
  for walk in traffic.walks(f, *args):
    what = walk.name, tuple(','.join(map(str, dims)) for dims in walk.outs)
    # Of equal kernels the compiler lists one.
    name = next(name for name in alike[what] if name in listed)
    read = schedule.read(folder, name, chip.unit)
    kernel, shape = _kernel(walk)
    tile = tiling.best(kernel, *shape, 2, chip)
    steps = rivals.ours(walk, tile, kernel.kind, ws=kernel.ws)
    cycles = cost.model(read, steps, chip)
    found[calls[what].pop(0)] = cycles
  return found


def _kernel(walk):
  """Which of tiling's kernels a call is, and its (M, A, B, E)."""
  M = walk.shapes[0][0]
  weights = [shape for shape in walk.shapes if len(shape) == 3]
  match walk.name:
    case 'drhs':
      E, A, B = walk.outs[0]
      return tiling.DRHS, (M, A, B, E)
    case 'into':
      kernel = tiling.into(len(weights))
    case 'slope':
      kernel = tiling.slope(len(walk.outs) - 2)
    case 'dlhs':
      kernel = tiling.dlhs(len(weights))
    case _:
      kernel = tiling.FWD
  E, A, B = weights[0]
  return kernel, (M, A, B, E)


def _stem(name):
  return re.sub(r'[.\d]*$', '', name)


# --- what XLA does around them ------------------------------------------------


def others(entry) -> dict[str, int]:
  """{instruction: bytes moved} of those that are no kernels of ours."""
  size = {i.name: i.written for i in entry}
  moved = {}
  for i in entry:
    if i.kind in _FREE or i.kind == 'custom-call':
      continue
    if i.kind == 'call-done':  # a SparseCore's gather
      moved[i.name] = 2 * i.written
    else:
      read = sum(
        min(size.get(o, 0), i.written) if i.gathers else size.get(o, 0)
        for o in i.operands
      )
      moved[i.name] = read + i.written
  return moved


def parse(text: str) -> list[Instruction]:
  """The instructions of a compiled program's entry."""
  computation = r'^%([\w.\-]+) [^\n]*\{\n(.*?)^\}'
  bodies = dict(re.findall(computation, text, re.M | re.S))
  entry = text[re.search(r'^ENTRY', text, re.M).start() :]
  found = []
  for line in entry.splitlines():
    match = re.match(
      r'\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)[,\s]',
      line + ' ',
    )
    if not match:
      continue
    name, types, kind, operands = match.groups()
    arrays = re.findall(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?', types)
    called = re.findall(r'calls=%([\w.\-]+)', line)
    found.append(
      Instruction(
        name,
        kind,
        tuple(dims for _, dims, _ in arrays),
        sum(_bytes(*array) for array in arrays),
        tuple(re.findall(r'%([\w.\-]+)', operands)),
        any(' gather(' in bodies.get(c, '') for c in called),
      )
    )
  return found


def _bytes(dtype, dims, layout):
  """What an array takes in HBM: tiles of its layout are whole."""
  if 'S(' in layout or dtype not in _BYTES:  # in VMEM, or a token
    return 0
  dims = [int(d) for d in dims.split(',') if d]
  order = [int(d) for d in layout.split(':')[0].split(',') if d]
  tile = re.search(r'T\(([\d,]+)\)', layout)
  tile = [int(t) for t in tile[1].split(',')][::-1] if tile else []
  for axis, t in zip(order, tile, strict=False):
    dims[axis] = -(-dims[axis] // t) * t
  return math.prod(dims) * _BYTES[dtype]


# --- one process for each -----------------------------------------------------


def in_process(chip: str, model: str, strategy: str) -> list[dict]:
  """`measure` in a process of its own; ValueError says why not."""
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'experiments.benches.fused.tpu',
        chip,
        model,
        strategy,
      ],
      env=cost.environment(folder),
      capture_output=True,
      text=True,
      check=False,
    )
  if done.returncode:
    raise ValueError(f'{chip} {model} {strategy}: {done.stderr[-1000:]}')
  return [json.loads(line) for line in done.stdout.splitlines()]


def report(write, chips, models):
  print('of plain: peak memory, and without weights and gradients;')
  print('modelled ms of forward and backward pass, even groups and Zipf')
  for chip in chips:
    for name in models:
      found = {
        strategy: in_process(chip, name, strategy)
        for strategy in ('plain', *layers.STRATEGIES)
      }
      for line in itertools.chain(*found.values()):
        write(line)
      plain = found['plain'][0]
      for strategy in layers.STRATEGIES:
        line, zipf = found[strategy]
        peak = line['peak_bytes'] / plain['peak_bytes']
        over = beyond(line) / beyond(plain)
        ms = [
          f'{a["ms"]:9.3f} {a["ms"] / b["ms"]:.2f}'
          for a, b in zip((line, zipf), found['local'], strict=True)
        ]
        print(
          f'{chip:5} {name:10}{strategy:8}{peak:8.2f}{over:8.2f}{"".join(ms)}',
          flush=True,
        )


if __name__ == '__main__':
  for line in measure(*sys.argv[1:]):
    print(json.dumps(line))
