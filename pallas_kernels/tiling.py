"""What a TPU can do, and the tiles that suit it: a small analytical model.

The model follows what the compiler's own schedules show (`cost`): a visit
costs a fill of the matrix units, a push of each weight tile and its products,
or the bytes that it moves, whichever is more. Nothing is timed.
"""

import functools
from typing import NamedTuple

import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import shapes

_MB = 1 << 20
# Bundles of a visit that are not its products'.
_VISIT = 200
# Bytes of a row of float32 that is one number.
_THIN = 4 * 128
# A window of rows starts at a multiple of this: the sublanes of a packed tile.
ALIGN = 16


class Chip(NamedTuple):
  """One TensorCore of a chip; cycles are those of its clock."""

  name: str
  topology: str  # the smallest that can be compiled for
  unit: int  # rows and columns of a matrix unit
  macs: int  # bfloat16 multiply-adds per cycle, all units
  hz: float
  bandwidth: float  # bytes per second from HBM
  vmem: int  # bytes
  cores: int  # TensorCores that share the parallel axis of one program
  fill: int  # bundles to fill the pipeline at a run's start and to drain it
  pace: tuple[float, float]  # bundles per peak cycle of a product, of a drhs
  region: float  # multiply-adds of one straight run of code, at most

  @property
  def bytes(self):
    """HBM bytes per cycle."""
    return self.bandwidth / self.hz


# Peaks, bandwidths and VMEM are those of `pltpu.get_tpu_info`. `macs` is what
# the compiler schedules: a 16-row product every 16, 8 and 4 cycles on a unit of
# v5, v6e and tpu7x; `hz` follows from it and the peak. `fill` and `pace` are
# read off schedules of this package's kernels.
CHIPS = {
  'v5e': Chip(
    'v5e', 'v5e:2x2', 128, 1 << 16, 1.50e9, 0.82e12, 128 * _MB, 1,
    fill=80, pace=(0.87, 0.95), region=0.6e9,
  ),
  'v5p': Chip(
    'v5p', 'v5p:2x2x1', 128, 1 << 16, 1.75e9, 1.23e12, 64 * _MB, 2,
    fill=80, pace=(0.87, 0.95), region=0.6e9,
  ),
  'v6e': Chip(
    'v6e', 'v6e:2x2', 256, 1 << 18, 1.75e9, 1.64e12, 128 * _MB, 1,
    fill=230, pace=(1.0, 1.08), region=2.2e9,
  ),
  'tpu7x': Chip(
    'tpu7x', 'tpu7x:2x2x1', 256, 1 << 19, 1.10e9, 3.70e12, 64 * _MB, 1,
    fill=400, pace=(1.0, 1.85), region=2.2e9,
  ),
}  # fmt: skip
_VERSIONS = {'v5e': 'v5e', 'v5p': 'v5p', 'v6e': 'v6e', '7x': 'tpu7x'}


class Tile(NamedTuple):
  """One kernel's blocks.

  Products (gmm, dlhs): a visit multiplies [rows, depth] of x by [depth, cols],
  depth being the whole contracted axis, `run` columns of the result at a time.
  drhs: it adds [rows, depth]^T [rows, cols], `run` rows of the result at a
  time. The rows are those that the visit owns, rounded up to a multiple of
  `step`, which is `rows` over a power of two.
  """

  rows: int
  depth: int
  cols: int
  run: int
  step: int
  vmem_bytes: int  # the limit given to the compiler


class Tiles(NamedTuple):
  fwd: Tile
  dlhs: Tile
  drhs: Tile


class Kernel(NamedTuple):
  """What a kernel of x [M, A] and w [E, A, B] holds beside one array of each.

  kind: 'fwd' contracts A, 'dlhs' contracts B, 'drhs' contracts M.
  """

  kind: str
  xs: int = 1  # arrays of rows that are contracted
  ws: int = 1
  ys: int = 1  # arrays of rows as wide as the result, read or written
  thin: int = 0  # float32 arrays of rows that are one number, in 128 lanes


FWD, DLHS, DRHS = Kernel('fwd'), Kernel('dlhs'), Kernel('drhs')


def into(n):
  """The kernel of n matrices and what their products become, see tpu.into."""
  return Kernel('fwd', ws=n, ys=n + 1)


def slope(n):
  """The kernel that goes back through n pre-activations, see tpu.slope."""
  return Kernel('dlhs', ys=2 * n + 1, thin=2)


def dlhs(n):
  """The sum of n products, see tpu.dlhs."""
  return Kernel('dlhs', xs=n, ws=n)


def this_chip(interpret=False):
  """The chip that is being compiled for; interpreters get v5e's tiles.

  Raises NotImplementedError for one without an entry in CHIPS.
  """
  if interpret:
    return CHIPS['v5e']
  version = pltpu.get_tpu_info().chip_version.value
  if version not in _VERSIONS:
    raise NotImplementedError(
      f'gmm on tpu knows {", ".join(_VERSIONS)}, not {version}'
    )
  return CHIPS[_VERSIONS[version]]


def choose(M, A, B, E, itemsize, chip):
  """`Tiles` for x [M, A], w [E, A, B], see `best`."""
  shape = M, A, B, E, itemsize, chip
  return Tiles(best(FWD, *shape), best(DLHS, *shape), best(DRHS, *shape))


@functools.cache
def best(kernel, M, A, B, E, itemsize, chip):
  """The `Tile` of least modelled time for x [M, A], w [E, A, B].

  Group sizes are not known when a kernel is compiled, so the time is that of
  even and of Zipf groups together.

  Raises NotImplementedError where no tile fits the chip's memory.
  """
  groups = shapes.even(M, E), shapes.zipf(M, E)
  depth, width = (B, A) if kernel.kind == 'dlhs' else (A, B)
  candidates = (
    _tile(kernel, rows, d, cols, itemsize, chip)
    for rows in _heights(M)
    for d in (_widths(depth, chip) if kernel.kind == 'drhs' else [depth])
    for cols in _widths(width, chip)
  )
  limit = chip.vmem * 15 // 16
  tiles = [t for t in candidates if t.vmem_bytes <= limit]
  if not tiles:
    raise NotImplementedError(
      f'gmm on tpu: no tile of {kernel.kind} with {depth} x {width} weights '
      f'fits the {chip.vmem >> 20} MiB of {chip.name}'
    )
  time = {
    t: sum(_cycles(kernel, t, width, depth, itemsize, g, chip) for g in groups)
    for t in tiles
  }
  return min(tiles, key=time.get)._replace(vmem_bytes=limit)


def windows(tile):
  """Heights of the windows that cover a visit, the tile's own first.

  Each is half of the one before, down to `step`, and each is code of its own.
  """
  sizes = [tile.rows]
  while sizes[-1] > tile.step:
    sizes.append(sizes[-1] // 2)
  return sizes


def visit(group_sizes_E, tile):
  """Which tile meets which expert, and how many rows are computed.

  Returns int arrays (expert_V, tile_V, window_V); an expert without rows has no
  visit.
  """
  rows = tile.rows
  end_E = np.cumsum(group_sizes_E)
  first_E = (end_E - group_sizes_E) // rows
  visits_E = np.where(group_sizes_E > 0, -(-end_E // rows) - first_E, 0)
  expert_V = np.repeat(np.arange(len(group_sizes_E)), visits_E)
  start_E = np.cumsum(visits_E) - visits_E
  tile_V = first_E[expert_V] + np.arange(len(expert_V)) - start_E[expert_V]
  low_V = np.maximum((end_E - group_sizes_E)[expert_V] - tile_V * rows, 0)
  high_V = np.minimum(end_E[expert_V] - tile_V * rows, rows)
  return expert_V, tile_V, window_of(low_V, high_V, tile)


def window_of(low_V, high_V, tile):
  """Rows that are computed for the own rows [low, high) of a tile."""
  size_V = np.where(high_V > low_V, high_V - low_V // ALIGN * ALIGN, 0)
  return -(-size_V // tile.step) * tile.step


def parts(window_V, tile):
  """[V, windows]: the rows that each window computes in a visit."""
  sizes = np.array(windows(tile))
  return (window_V[:, None] // tile.step & sizes // tile.step) * tile.step


def _cycles(kernel, tile, width, depth, itemsize, group_sizes_E, chip):
  """Modelled cycles of one kernel: each visit the largest of its bounds."""
  kind = kernel.kind
  expert_V, tile_V, window_V = visit(group_sizes_E, tile)
  new_tile_V = np.diff(tile_V, prepend=-1) != 0
  new_expert_V = np.diff(expert_V, prepend=-1) != 0
  held = tile.rows * (kernel.xs * tile.depth + kernel.ys * tile.cols)
  held += tile.rows * kernel.thin * _THIN // itemsize
  weights = kernel.ws * tile.depth * tile.cols
  moved_V = new_tile_V * held + new_expert_V * weights
  runs = (tile.depth if kind == 'drhs' else tile.cols) // tile.run
  peak_V = window_V * (weights / chip.macs)
  pace = chip.pace[kind == 'drhs']
  fills_V = runs * np.count_nonzero(parts(window_V, tile), axis=1) * kernel.ws
  bundles_V = _VISIT + fills_V * chip.fill + pace * peak_V
  compute_V = np.maximum(bundles_V, peak_V)
  visits = np.maximum(compute_V, moved_V * itemsize / chip.bytes).sum()
  across, down = -(-width // tile.cols), -(-depth // tile.depth)
  # The cores of a chip share the first axis of the grid.
  first = down if kind == 'drhs' else across
  idle = -(-first // chip.cores) * chip.cores / first
  return visits * across * down * idle


def _heights(M):
  top = -(-M // 16) * 16
  return sorted({min(rows, top) for rows in (128, 256, 512, 1024)})


def _widths(B, chip):
  """Block sizes that cut B evenly, in whole matrix units where it is wide."""
  if B <= chip.unit:
    return [B]
  units = -(-B // chip.unit)
  return sorted({-(-units // n) * chip.unit for n in range(1, units + 1)})


def _tile(kernel, rows, depth, cols, itemsize, chip):
  """The `Tile` of these blocks; vmem_bytes is what it needs."""
  kind = kernel.kind
  whole, rest = (depth, cols) if kind == 'drhs' else (cols, depth)
  parts = [whole]
  if whole % chip.unit == 0:
    units = whole // chip.unit
    parts = [whole // n for n in range(1, units + 1) if units % n == 0]
  region = chip.region / kernel.ws
  short = [p for p in parts if rows * rest * p <= region]
  run = short[0] if short else parts[-1]
  # Fewer rows than that take as long: a product has to push its weights, and
  # a drhs contracts as many rows as a matrix unit has.
  step = rows
  while step % 32 == 0 and step // 2 >= max(
    chip.unit if kind == 'drhs' else 64, rows // 16
  ):
    step //= 2
  blocks = kernel.xs * rows * depth + kernel.ws * depth * cols
  blocks = 2 * itemsize * (blocks + kernel.ys * rows * cols)
  blocks += 2 * kernel.thin * rows * _THIN
  sums = 4 * depth * cols if kind == 'drhs' else 0
  result = 4 * run * (cols if kind == 'drhs' else rows)
  if kernel.ys > 1:  # so much is there beside them, by compiled programs
    result *= 5 * kernel.ys + kernel.ws
  return Tile(rows, depth, cols, run, step, blocks + sums + result)
