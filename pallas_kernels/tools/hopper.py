"""What the compiler, and a small model, say of grouped matmuls on an H100.

The part of `cost` for GPUs. A kernel is compiled for an H100 that is not there;
its registers, spills and instructions are those of its PTX. Its blocks are
walked in the order in which they are dealt out, and modelled alike for all:

  - a block takes the longer of its multiply-adds, rows and columns of padding
    too, at the peak rate of a multiprocessor, and its bytes from and to the
    L2 at an even share of the L2's bandwidth;
  - a multiprocessor does its blocks one after the other; those of a kernel that
    does not deal out itself go to the one that is free first;
  - a strip of x, dy or w comes from HBM unless it is in the L2, which keeps
    what was used last, and what XLA copies around the kernel comes on top;
  - the kernel takes the longest multiprocessor's time, or that of HBM's bytes.

Nothing else is counted: no latency, no start and end of a block, no work of the
other units. All times are lower bounds. Nothing has been timed.
"""

import collections
import functools
import heapq
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu, shapes
from pallas_kernels.tools import ptx, rivals

_BYTES = 2
TARGET = pathlib.Path(__file__).parent / 'h100.txtpb'


class Chip(NamedTuple):
  """A GPU; cycles are those of its clock."""

  name: str
  sms: int
  macs: int  # bfloat16 multiply-adds per cycle of a multiprocessor
  hz: float
  bandwidth: float  # bytes per second from HBM
  l2_bytes: int  # what it keeps
  l2_bandwidth: float  # bytes per cycle, of all multiprocessors


# 989.4 TFLOP/s and 3.35 TB/s are the data sheet's for SXM5; the clock is that
# at which 132 multiprocessors of 4096 FLOP per cycle make that peak. The L2 has
# 50 MiB in two halves, each of which keeps what its multiprocessors read. Its
# bandwidth is not published; by this model the times that tokamax's authors
# recorded on an H100 need 5965 bytes per cycle, so it is no less.
H100 = Chip('h100', 132, 2048, 1.83e9, 3.35e12, 25 << 20, 6144)


class Walk(NamedTuple):
  """The blocks of a kernel, in the order in which they begin."""

  macs_V: np.ndarray  # those of masked and padding rows too
  reads: tuple[tuple[np.ndarray, np.ndarray], ...]  # (strip, bytes) per operand
  writes_V: np.ndarray  # bytes
  sm_V: np.ndarray | None  # whose each is; None for whoever is free first


class Program(NamedTuple):
  f: Callable
  args: tuple
  tile: tuple[int, int, int]  # rows, columns and depth of a step
  stages: int
  walk: Callable  # group_sizes_E -> Walk


class Row(NamedTuple):
  """One kernel on one chip for one vector of group sizes."""

  chip: str
  shape: str
  kind: str
  groups: str
  impl: str
  tile: str
  stages: int
  registers: int
  spills: int  # bytes
  fills: int
  shared: int  # bytes
  wgmmas: int
  loads: int
  stores: int
  padding: float  # multiply-adds over those that are needed
  tile_gigabytes: float  # between the L2 and shared memory
  gigabytes: float  # from and to HBM
  ms: float
  roofline: float  # of the best time for the shape, whatever the tiling
  jax: str


def check():
  """ValueError or FileNotFoundError where what compiles is missing."""
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    raise ValueError("jax_cuda13_plugin is missing: pip install -e '.[aot]'")
  ptx.assembler()


def rows(impl, kind, name, groups):
  """[Row] of one kernel, compiled in a process of its own; or why not."""
  with tempfile.TemporaryDirectory() as folder:
    hlo = os.path.join(folder, 'hlo')
    done = subprocess.run(
      [sys.executable, '-c', _WORKER, impl, kind, name, hlo],
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | ptx.VARIABLES,
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      last = [*done.stderr.strip().splitlines(), ''][-1]
      errors = re.findall(r'^[\w.]*(?:Error|Exit\w*)\b.*', done.stderr, re.M)
      return f'h100 {name} {kind} {impl}: {[last, *errors][-1][:200]}'
    # What is inside a fusion stands there again.
    entry = pathlib.Path(hlo).read_text().partition('ENTRY')[2]
  (kernel,) = ptx.read(done.stdout)
  shape = shapes.find(name)
  program = build(impl, kind, shape)
  copied = rivals.copied(entry)
  return [
    _row(impl, kind, name, group, kernel, program, copied, group_sizes_E)
    for group, group_sizes_E in shapes.groups(name, groups).items()
  ]


_WORKER = """
import sys
from pallas_kernels import shapes
from pallas_kernels.tools import hopper
impl, kind, name, path = sys.argv[1:]
text = hopper.compile(hopper.build(impl, kind, shapes.find(name)))
open(path, 'w').write(text)
"""


def compile(program):
  """The program that XLA makes for an H100, as text."""
  topology = topologies.get_topology_desc(
    '', 'cuda', topology='1x1x1', target_config=TARGET.read_text()
  )
  mesh = jax.sharding.Mesh(topology.devices[:1], ('x',))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    # Rivals ask the device at hand for its multiprocessors.
    here = mock.Mock(core_count=H100.sms, platform='gpu')
    with (
      mock.patch.object(jax, 'devices', lambda *_: [here]),
      mock.patch('jax.extend.backend.get_default_device', lambda: here),
    ):
      lowered = jax.jit(program.f, in_shardings=one).lower(*program.args)
    return lowered.compile().as_text()


def model(walk, copied, chip=H100):
  """(cycles, bytes between L2 and shared memory, bytes from and to HBM)."""
  moved_V = walk.writes_V + sum(bytes_V for _, bytes_V in walk.reads)
  share = chip.l2_bandwidth / chip.sms
  cycles_V = np.maximum(walk.macs_V / chip.macs, moved_V / share)
  if walk.sm_V is None:
    free = [0.0] * chip.sms
    for cycles in cycles_V:
      heapq.heapreplace(free, free[0] + cycles)
    longest = max(free)
  else:
    longest = np.bincount(walk.sm_V, cycles_V, chip.sms).max()
  far = _missed(walk.reads, chip.l2_bytes) + int(walk.writes_V.sum())
  per_byte = chip.hz / chip.bandwidth
  # What is copied is copied before or after.
  cycles = max(float(longest), far * per_byte) + copied * per_byte
  return cycles, int(moved_V.sum()), far + copied


def _missed(reads, kept):
  """Bytes of the strips that are not among those used last."""
  held, size, missed = collections.OrderedDict(), 0, 0
  pairs = [
    zip(strip_V.tolist(), bytes_V.tolist(), strict=True)
    for strip_V, bytes_V in reads
  ]
  for block in zip(*pairs, strict=True):
    for operand, (strip, bytes_) in enumerate(block):
      key = operand, strip
      if key in held:
        held.move_to_end(key)
        continue
      held[key] = bytes_
      size, missed = size + bytes_, missed + bytes_
      while size > kept:
        size -= held.popitem(last=False)[1]
  return missed


def _row(impl, kind, name, group, kernel, program, copied, group_sizes_E):
  chip, (M, A, B, E) = H100, shapes.find(name)
  walk = program.walk(group_sizes_E)
  cycles, near, far = model(walk, copied)
  macs = int(group_sizes_E.sum()) * A * B
  least = max(
    M * A * B / chip.macs / chip.sms,
    (M * A + E * A * B + M * B) * _BYTES / chip.bandwidth * chip.hz,
  )
  return Row(
    chip=chip.name,
    shape=name,
    kind=kind,
    groups=group,
    impl=impl,
    tile='x'.join(map(str, program.tile)),
    stages=program.stages,
    registers=kernel.registers,
    spills=kernel.spills,
    fills=kernel.fills,
    shared=kernel.shared,
    wgmmas=kernel.wgmmas,
    loads=kernel.loads,
    stores=kernel.stores,
    padding=round(int(walk.macs_V.sum()) / macs, 4),
    tile_gigabytes=round(near / 1e9, 4),
    gigabytes=round(far / 1e9, 4),
    ms=round(cycles / chip.hz * 1e3, 4),
    roofline=round(least / cycles, 4),
    jax=jax.__version__,
  )


def build(impl, kind, shape):
  """The `Program` of one implementation; ImportError where it is missing."""
  return _BUILD[impl](kind, shape)


def _ours(kind, shape):
  M, A, B, _ = shape
  tile = getattr(gpu.choose(A, B), kind)
  sms = H100.sms
  f = {
    'fwd': functools.partial(gpu.product, tile=tile, sms=sms),
    'dlhs': functools.partial(gpu.product, tile=tile, sms=sms, transpose=True),
    'drhs': functools.partial(gpu.drhs, tile=tile, sms=sms),
  }[kind]

  def deal(total):
    turn, sm = np.divmod(np.arange(total), sms)
    return np.where(turn % 2, sms - 1 - sm, sm)

  def product(group_sizes_E):
    visits = gpu.visits(jnp.asarray(group_sizes_E), tile.rows, M)
    depth, width = (B, A) if kind == 'dlhs' else (A, B)
    blocks = -(-width // tile.cols)
    count = int(visits.count[0])
    position = np.arange(count * blocks, dtype=np.int32)
    j, v = map(np.asarray, gpu.in_bands(position, count, blocks, tile.band))
    e_V, start_V, low_V, high_V = (np.asarray(a)[v] for a in visits[1:])
    strips_V = sum(
      (low_V < edge + 64) & (high_V > edge) for edge in range(0, tile.rows, 64)
    )
    cols_V = np.minimum(width - j * tile.cols, tile.cols)
    rows_V = np.minimum(M - start_V, tile.rows)
    return Walk(
      strips_V * 64 * tile.cols * depth,
      (
        (v, rows_V * depth * _BYTES),
        (e_V * blocks + j, cols_V * depth * _BYTES),
      ),
      (high_V - low_V) * cols_V * _BYTES,
      deal(len(j)),
    )

  def drhs(group_sizes_E):
    down, across = -(-A // tile.rows), -(-B // tile.cols)
    each, E = down * across, len(group_sizes_E)
    end_E = np.cumsum(group_sizes_E)
    start_E = (end_E - group_sizes_E) // 8 * 8
    steps_E = np.where(
      group_sizes_E > 0, -(-(end_E - start_E) // tile.depth), 0
    )
    position = np.arange(E * each, dtype=np.int32)
    e_V = np.asarray(jnp.argsort(group_sizes_E, descending=True))[
      position // each
    ]
    j, i = map(
      np.asarray, gpu.in_bands(position % each, down, across, tile.band)
    )
    return _drhs_walk(
      (tile.rows, tile.cols), shape, e_V, i, j, steps_E[e_V] * tile.depth,
      deal(len(e_V)),
    )  # fmt: skip

  return Program(
    f,
    rivals.operands(kind, shape),
    (tile.rows, tile.cols, tile.depth),
    tile.stages,
    drhs if kind == 'drhs' else product,
  )


def _drhs_walk(tile, shape, e_V, i, j, deep_V, sm_V):
  """Of blocks (i, j) of each expert's dw that contract deep_V rows."""
  (rows, cols), (_, A, B, _) = tile, shape
  high_V = np.minimum(A - i * rows, rows)
  wide_V = np.minimum(B - j * cols, cols)
  down, across = -(-A // rows), -(-B // cols)
  return Walk(
    deep_V * rows * cols,
    (
      (e_V * down + i, deep_V * high_V * _BYTES),
      (e_V * across + j, deep_V * wide_V * _BYTES),
    ),
    high_V * wide_V * _BYTES,
    sm_V,
  )


def _snake(length, blocks, band, minor):
  """(block of rows, of columns) in the order of `plgpu.planar_snake`."""
  place = functools.partial(
    plgpu.planar_snake,
    shape=(length, blocks),
    minor_dim=minor,
    tile_width=band,
  )
  position = jnp.arange(length * blocks, dtype=jnp.int32)
  return map(np.asarray, jax.jit(jax.vmap(place))(position))


def _mgpu(kind, shape):
  """jax's own examples for Hopper, with blocks of 128 x 128 x 64."""
  M, A, B, E = shape
  rows, cols, deep, stages = 128, 128, 64, 4
  depth, width = (B, A) if kind == 'dlhs' else (A, B)
  blocks = -(-width // cols)
  band = next(b for b in (8, 4, 2, 1) if blocks % b == 0)
  options = {
    'block_m': rows, 'block_n': cols, 'block_k': deep,
    'max_concurrent_steps': stages, 'grid_block_n': band,
  }  # fmt: skip
  ops = 'jax.experimental.pallas.ops.gpu'
  if kind == 'drhs':
    library = importlib.import_module(f'{ops}.transposed_ragged_dot_mgpu')

    def f(x_MxA, dy_MxB, group_sizes_E):
      return library.transposed_ragged_dot(
        x_MxA, dy_MxB, group_sizes=group_sizes_E, **options
      )
  else:
    library = importlib.import_module(f'{ops}.ragged_dot_mgpu')

    def f(x_MxA, w_ExAxB, group_sizes_E):
      return library.ragged_dot(
        x_MxA,
        w_ExAxB,
        group_sizes=group_sizes_E,
        transpose_rhs=kind == 'dlhs',
        **options,
      )

  def product(group_sizes_E):
    # Every place is multiplied, also the last ones, which no expert has.
    length = -(-M // rows) + E - 1
    end_E = np.cumsum(group_sizes_E)
    start_E = end_E - group_sizes_E
    first_E, last_E = start_E // rows, (end_E - 1) // rows
    begin_E = first_E + np.arange(E)
    tile_T, e_T, own_T = (np.zeros(length, np.int64) for _ in range(3))
    for e in range(E):
      here = np.arange(begin_E[e], last_E[e] + 1 + e)
      tile = here - e
      tile_T[here], e_T[here] = tile, e
      own_T[here] = np.minimum(end_E[e], (tile + 1) * rows) - np.maximum(
        start_E[e], tile * rows
      )
    v, j = _snake(length, blocks, band, 1)
    cols_V = np.minimum(width - j * cols, cols)
    rows_V = np.minimum(M - tile_T[v] * rows, rows)
    return Walk(
      np.full(len(v), rows * cols * depth),
      (
        (tile_T[v], rows_V * depth * _BYTES),
        (e_T[v] * blocks + j, cols_V * depth * _BYTES),
      ),
      np.maximum(own_T[v], 0) * cols_V * _BYTES,
      np.arange(len(v)) % H100.sms,
    )

  def drhs(group_sizes_E):
    end_E = np.cumsum(group_sizes_E)
    start_E = (end_E - group_sizes_E) // deep
    steps_E = np.where(group_sizes_E > 0, -(-end_E // deep) - start_E, 0)
    i, j = _snake(-(-A // rows), blocks, band, 1)
    e_V = np.repeat(np.arange(E), len(i))
    i, j = np.tile(i, E), np.tile(j, E)
    return _drhs_walk(
      (rows, cols), shape, e_V, i, j, steps_E[e_V] * deep,
      np.arange(len(i)) % H100.sms,
    )  # fmt: skip

  return Program(
    f,
    rivals.operands(kind, shape),
    (rows, cols, deep),
    stages,
    drhs if kind == 'drhs' else product,
  )


def _tokamax(kind, shape):
  """tokamax's sm90 kernels, in the configuration that its H100 tables favour.

  Of large shapes they have blocks of 128 x 64 x 128 in all passes. As in its
  own operator, dlhs transposes w before and drhs x.
  """
  M, A, B, E = shape
  library = importlib.import_module(
    'tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_kernel_sm90'
  )
  common = importlib.import_module(
    'tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common'
  )
  rows, cols, deep, band = 128, 64, 128, 8
  stages = 2 if kind == 'drhs' else 4
  config = common.Config(
    block_m=rows, block_n=cols, block_k=deep, num_stages=stages, split_k=1,
    persistent=True, grid_minor_dim=1, grid_tile_width=band,
  )  # fmt: skip

  def f(left, right, group_sizes_E):
    if kind == 'drhs':
      kernel = library.ragged_contracting_dim_dot_kernel
    else:
      kernel = library.ragged_dot_kernel
    right = right.mT if kind == 'dlhs' else right
    return kernel(left, right, group_sizes_E, left.dtype, config)

  def product(group_sizes_E):
    depth, width = (B, A) if kind == 'dlhs' else (A, B)
    blocks, whole = -(-width // cols), -(-M // rows)
    length = whole + E - 1
    end_E = np.cumsum(group_sizes_E)
    start_E = (end_E - group_sizes_E) // 8 * 8
    count_E = np.where(group_sizes_E > 0, -(-(end_E - start_E) // rows), 0)
    e_T = np.repeat(np.arange(E), count_E)
    within_T = np.arange(len(e_T)) - (np.cumsum(count_E) - count_E)[e_T]
    start_T = start_E[e_T] + within_T * rows
    own_T = np.minimum(end_E[e_T], start_T + rows) - np.maximum(
      (end_E - group_sizes_E)[e_T], start_T
    )
    # First what surely has rows, then the rest, which may have none.
    v, j = _snake(whole, blocks, band, 1)
    later_v, later_j = _snake(E - 1, blocks, band, 1)
    sm_V = np.concatenate(
      [np.arange(n) % H100.sms for n in (len(v), len(later_v))]
    )
    v, j = np.append(v, whole + later_v), np.append(j, later_j)
    there = v < len(e_T)
    v, j, sm_V = v[there], j[there], sm_V[there]
    assert length >= len(e_T)
    cols_V = np.minimum(width - j * cols, cols)
    rows_V = np.minimum(M - start_T[v], rows)
    return Walk(
      np.full(len(v), rows * cols * depth),
      (
        (v, rows_V * depth * _BYTES),
        (e_T[v] * blocks + j, cols_V * depth * _BYTES),
      ),
      own_T[v] * cols_V * _BYTES,
      sm_V,
    )

  def drhs(group_sizes_E):
    end_E = np.cumsum(group_sizes_E)
    start_E = (end_E - group_sizes_E) // deep
    steps_E = np.where(group_sizes_E > 0, -(-end_E // deep) - start_E, 0)
    i, j, e_V = (
      a.ravel()
      for a in np.meshgrid(
        np.arange(-(-A // rows)),
        np.arange(-(-B // cols)),
        np.arange(E),
        indexing='ij',
      )
    )
    return _drhs_walk(
      (rows, cols), shape, e_V, i, j, steps_E[e_V] * deep, None
    )  # fmt: skip

  return Program(
    f,
    rivals.operands(kind, shape),
    (rows, cols, deep),
    stages,
    drhs if kind == 'drhs' else product,
  )


_BUILD = {'gpu': _ours, 'mgpu': _mgpu, 'tokamax': _tokamax}
IMPLS = tuple(_BUILD)


def table(rows):
  """The rows as aligned text, under a heading."""
  lines = [
    'chip shape         pass groups impl    tile        stages regs'
    ' spills/fills   KiB wgmma  TMA padding tile GB     GB      ms  roofline %'
  ]
  for r in rows:
    lines.append(
      f'{r.chip} {r.shape:13} {r.kind:4} {r.groups:6} {r.impl:7} {r.tile:12}'
      f'{r.stages:5}{r.registers:5}{f"{r.spills}/{r.fills}":>13}'
      f'{r.shared / 1024:6.0f}{r.wgmmas:6}{r.loads + r.stores:5}'
      f'{r.padding:8.2f}{r.tile_gigabytes:8.2f}{r.gigabytes:7.2f}'
      f'{r.ms:8.3f}{100 * r.roofline:12.1f}'
    )
  return '\n'.join(lines)
