"""The grouped matmuls that `cost` sets side by side, and the steps they take.

Each is a `Program`: what to compile, which of the compiled kernels to read,
and how its grid meets given group sizes. bfloat16 throughout. Passes: fwd is
x w, dlhs is dy w^T, drhs is x^T dy.
"""

import base64
import functools
import importlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiling, tpu
from pallas_kernels.tools import traffic

PASSES = ('fwd', 'dlhs', 'drhs')
_BYTES = 2


class Steps(NamedTuple):
  """What the grid does, S steps in order."""

  bytes_S: np.ndarray  # moved to and from HBM
  macs_SxP: np.ndarray  # of each part of a step, masked and padding rows too
  trips: int  # runs of the hot region in a step
  compulsory: int  # bytes that this tiling cannot avoid


class Program(NamedTuple):
  f: Callable
  args: tuple
  kernel: str  # a name in the schedule; '' if this is no kernel of its own
  steps: Callable  # (group_sizes_E, hlo text) -> Steps


def build(impl, kind, shape, chip):
  """The `Program` of one implementation; ImportError where it is missing."""
  return _BUILD[impl](kind, shape, chip)


def operands(kind, shape):
  """ShapeDtypeStructs of the two arrays of a pass, and of group_sizes_E."""
  M, A, B, E = shape
  x, dy, w = (M, A), (M, B), (E, A, B)
  pair = {'fwd': (x, w), 'dlhs': (dy, w), 'drhs': (x, dy)}[kind]
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in pair]
  return (*arrays, jax.ShapeDtypeStruct((E,), jnp.int32))


def _ours(kind, shape, chip):
  M, A, B, E = shape
  tile = getattr(tiling.choose(M, A, B, E, _BYTES, chip), kind)
  f = {
    'fwd': functools.partial(tpu.product, tile=tile),
    'dlhs': functools.partial(tpu.product, tile=tile, transpose=True),
    'drhs': functools.partial(tpu.drhs, tile=tile),
  }[kind]
  args = operands(kind, shape)

  def steps(group_sizes_E, hlo):
    walk = traffic.walk(f, *args[:2], group_sizes_E)
    compulsory = _compulsory(kind, shape, tile.depth, tile.cols, group_sizes_E)
    return _with_copies(ours(walk, tile, kind, compulsory=compulsory), hlo)

  return Program(f, args, {'fwd': 'gmm'}.get(kind, kind), steps)


def ours(walk, tile, kind, *, ws=1, compulsory=0):
  """The `Steps` of one of our kernels for TPUs.

  Args:
    walk: a `traffic.Walk` of it.
    tile: its `tiling.Tile`.
    kind: 'fwd', 'dlhs' or 'drhs'.
    ws: products that it makes of each block.
    compulsory: bytes that its tiling cannot avoid.
  """
  edge_E, expert_V, tile_V = walk.scalars
  v_S = walk.grid_SxG[:, -1]
  expert_S, row_S = expert_V[v_S], tile_V[v_S] * tile.rows
  low_S = np.maximum(edge_E[expert_S] - row_S, 0)
  high_S = np.minimum(edge_E[expert_S + 1] - row_S, tile.rows)
  window_S = tiling.window_of(low_S, high_S, tile)
  whole = tile.depth if kind == 'drhs' else tile.cols
  macs_SxP = tiling.parts(window_S, tile) * tile.depth * tile.cols * ws
  return Steps(walk.bytes_S, macs_SxP, whole // tile.run, compulsory)


def _megablox(kind, shape, chip):
  del chip
  M, A, B = shape[:3]
  library = importlib.import_module(
    'jax.experimental.pallas.ops.tpu.megablox.gmm'
  )
  depth, cols = (B, A) if kind == 'dlhs' else (A, B)
  tile = (min(512, M), min(1024, depth), min(1024, cols))
  options = {'preferred_element_type': jnp.bfloat16, 'tiling': tile}
  if kind == 'drhs':

    def f(x_MxA, dy_MxB, group_sizes_E):
      return library.tgmm(x_MxA.T, dy_MxB, group_sizes_E, **options)
  else:
    f = functools.partial(library.gmm, transpose_rhs=kind == 'dlhs', **options)
  args = operands(kind, shape)

  def steps(group_sizes_E, hlo):
    walk = traffic.walk(f, *args[:2], group_sizes_E)
    macs_SxP = np.full((len(walk.grid_SxG), 1), np.prod(tile, dtype=np.int64))
    compulsory = _compulsory(kind, shape, tile[1], tile[2], group_sizes_E)
    return _with_copies(Steps(walk.bytes_S, macs_SxP, 1, compulsory), hlo)

  return Program(f, args, 'tgmm' if kind == 'drhs' else 'gmm', steps)


def _xla(kind, shape, chip):
  """`jax.lax.ragged_dot`: a Mosaic kernel inside libtpu, or a dense product.

  The kernel visits tiles as megablox does; its grid and its blocks stand in
  the compiled program. Its drhs is one product over all rows per expert.
  """
  del chip
  M, A, B, E = shape

  def f(left, right, group_sizes_E):
    if kind == 'fwd':
      return jax.lax.ragged_dot(left, right, group_sizes_E)
    x = jnp.zeros((M, A), left.dtype) if kind == 'dlhs' else left
    w = right if kind == 'dlhs' else jnp.zeros((E, A, B), left.dtype)
    _, back = jax.vjp(
      lambda x, w: jax.lax.ragged_dot(x, w, group_sizes_E), x, w
    )
    dx, dw = back(left if kind == 'dlhs' else right)
    return dx if kind == 'dlhs' else dw

  def steps(group_sizes_E, hlo):
    if kind == 'drhs':
      least = (M * A + M * B + E * A * B) * _BYTES
      macs = np.array([[M * A * B * E]])
      return Steps(np.array([least]), macs, 1, least)
    blocks = re.findall(r'window_bounds = array<i64: ([\d, ]+)>', _mosaic(hlo))
    (rows, depth), _, (_, cols) = (
      tuple(map(int, b.split(','))) for b in blocks
    )
    whole, width = (B, A) if kind == 'dlhs' else (A, B)
    expert_V, tile_V, _ = tiling.visit(group_sizes_E, _whole(rows))
    j, v, k = np.meshgrid(
      np.arange(-(-width // cols)),
      np.arange(len(expert_V)),
      np.arange(-(-whole // depth)),
      indexing='ij',
    )
    j, v, k = (a.ravel() for a in (j, v, k))

    def size(*axes):
      return (
        np.prod([np.minimum(n - i * b, b) for i, b, n in axes], axis=0) * _BYTES
      )

    x_axes = (tile_V[v], rows, M), (k, depth, whole)
    y_axes = (tile_V[v], rows, M), (j, cols, width)
    w_axes = (k, depth, whole), (j, cols, width)
    bytes_S = traffic.count(
      [
        (np.stack([tile_V[v], k], 1), size(*x_axes), False),
        (np.stack([expert_V[v], k, j], 1), size(*w_axes), False),
        (np.stack([tile_V[v], j], 1), size(*y_axes), True),
      ]
    )
    macs_SxP = np.full((len(v), 1), rows * depth * cols)
    compulsory = _compulsory(kind, shape, depth, cols, group_sizes_E)
    return _with_copies(Steps(bytes_S, macs_SxP, 1, compulsory), hlo)

  name = '' if kind == 'drhs' else 'ragged-dot-none'
  return Program(f, operands(kind, shape), name, steps)


def _tokamax(kind, shape, chip):
  """tokamax's mosaic_tpu_v2: tiles start where an expert starts."""
  del chip
  E = shape.E
  module = 'tgmm_v2' if kind == 'drhs' else 'gmm_v2'
  library = importlib.import_module(f'tokamax._src.ops.gmm_v2.{module}')
  choose = (
    library.calculate_tgmm_tiling
    if kind == 'drhs'
    else library.calculate_tiling
  )
  chosen = []

  def tiles(*args, **kwargs):
    chosen.append((choose(*args, **kwargs), args[0].size_lhs_sublane))
    return chosen[-1][0]

  def f(left, right, group_sizes_E):
    if kind == 'drhs':
      return library.tgmm_v2(
        left,
        right,
        group_sizes_E,
        E,
        tile_info=tiles,
        preferred_element_type=left.dtype,
      )
    return library.gmm_v2(
      left, right, group_sizes_E, tile_info=tiles, transpose_rhs=kind == 'dlhs'
    )

  def steps(group_sizes_E, hlo):
    tile, align = chosen[-1]
    low_V, high_V, expert_V = [], [], []
    row = 0
    for e, size in enumerate(group_sizes_E):
      end = row + size
      while row < end:
        high = min(row - row % align + tile.tile_m, end)
        low_V.append(row)
        high_V.append(high)
        expert_V.append(e)
        row = high
    low_V, high_V, expert_V = map(np.array, (low_V, high_V, expert_V))
    first_V, last_V = low_V // align, -(-high_V // align)
    held = high_V - low_V // align * align
    base, most = tile.bucket_base, tile.tile_m // tile.bucket_base
    # The forward rounds a full bucket up to the next one.
    bucket_V = (held - (kind == 'drhs')) // base
    rows_V = base * (np.minimum(bucket_V, most - 1) + 1)
    left = operands(kind, shape)[0]
    depth_all = left.shape[1]
    width_all = shape.A if kind == 'dlhs' else shape.B
    n, k = -(-width_all // tile.tile_n), -(-depth_all // tile.tile_k)
    order = (n, k, len(low_V)) if kind == 'drhs' else (n, len(low_V), k)
    grid = np.stack(
      [a.ravel() for a in np.meshgrid(*map(np.arange, order), indexing='ij')]
    )
    j, (i, v) = grid[0], grid[1:] if kind == 'drhs' else grid[:0:-1]
    rows_S = (last_V - first_V)[v] * align
    written_S = (
      rows_S if kind == 'drhs' else (high_V // align - first_V)[v] * align
    )
    wide = np.minimum(width_all - j * tile.tile_n, tile.tile_n)
    deep = np.minimum(depth_all - i * tile.tile_k, tile.tile_k)
    x = (np.stack([first_V[v], i], 1), rows_S * deep * _BYTES, False)
    if kind == 'drhs':
      dy = (np.stack([first_V[v], j], 1), rows_S * wide * _BYTES, False)
      dw = (np.stack([expert_V[v], i, j], 1), deep * wide * _BYTES, True)
      blocks = [x, dy, dw]
    else:
      w = (np.stack([expert_V[v], i, j], 1), deep * wide * _BYTES, False)
      y = (np.stack([first_V[v], j], 1), written_S * wide * _BYTES, True)
      blocks = [x, w, y]
    macs_SxP = rows_V[v, None].astype(np.int64) * tile.tile_k * tile.tile_n
    compulsory = _compulsory(
      kind, shape, tile.tile_k, tile.tile_n, group_sizes_E
    )
    return _with_copies(
      Steps(traffic.count(blocks), macs_SxP, 1, compulsory), hlo
    )

  return Program(f, operands(kind, shape), 'gmm_v2|tgmm', steps)


_BUILD = {
  'tpu': _ours,
  'xla': _xla,
  'megablox': _megablox,
  'tokamax': _tokamax,
}
IMPLS = tuple(_BUILD)


def _compulsory(kind, shape, depth, cols, group_sizes_E):
  """Bytes if every block is moved once for each block it must meet."""
  M, A, B, E = shape
  if kind == 'dlhs':
    A, B = B, A
  wide, deep = -(-B // cols), -(-A // depth)
  if kind == 'drhs':
    return (wide * M * A + deep * M * B + E * A * B) * _BYTES
  weights = int(np.count_nonzero(group_sizes_E)) * A * B
  return (wide * M * A + weights + M * B) * _BYTES


def _whole(rows):
  """A tile of which every visit computes all rows."""
  return tiling.Tile(rows, 0, 0, 0, step=rows, vmem_bytes=0)


def _with_copies(steps, hlo):
  """Adds a step for the arrays that the program copies around its kernel."""
  bytes_ = copied(hlo)
  if not bytes_:
    return steps
  return steps._replace(
    bytes_S=np.append(steps.bytes_S, bytes_),
    macs_SxP=np.pad(steps.macs_SxP, ((0, 1), (0, 0))),
  )


def copied(hlo):
  """Bytes of the large bfloat16 arrays that a program copies, both ways."""
  bytes_ = 0
  for dims in re.findall(
    r'= bf16\[([\d,]+)\][^ ]* (?:copy|transpose|fusion|copy-done)\(', hlo
  ):
    size = np.prod([int(d) for d in dims.split(',')], dtype=np.int64)
    bytes_ += 2 * _BYTES * size if size >= 1 << 19 else 0
  return int(bytes_)


def _mosaic(hlo):
  """The Mosaic module of the product that XLA put into its program."""
  bodies = re.findall(r'"body":"([^"]*)"', hlo)
  texts = [base64.b64decode(b).decode('utf8', 'replace') for b in bodies]
  return next(t for t in texts if 'tpu.matmul' in t)
