"""Grouped matrix multiplication on Hopper GPUs, Mosaic GPU kernels.

The blocks of the result are dealt out to as many thread blocks as there are
multiprocessors. In each, one warpgroup only loads: it runs ahead through a
ring of stages in shared memory, past the ends of its blocks. Two multiply, 64
rows of the block each, and write. A block of x begins at its expert's first
row, rounded down to a row that the copy engine can start at, so an expert is
cut at its end alone; a warpgroup whose rows are all another expert's
multiplies nothing.

README.md has its times on an H100.

Axes: M rows, E experts, A contracted, B output, V visits (an expert's rows, cut
into blocks).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import operands

_DTYPES = ('bfloat16',)
_WIDTH = 64  # bfloat16 columns that one swizzled row of shared memory holds
_ALIGN = 8  # rows of a swizzled tile: where the copy engine can start
_STRIP = 64  # rows of one warpgroup's product
_WGS = 2  # warpgroups that multiply; the one after them loads
_H100 = 132  # multiprocessors
# Of the 512 registers that four lanes of a multiprocessor share.
_LOAD_REGISTERS, _MULTIPLY_REGISTERS = 40, 232
# Half of an H100's 50 MiB of L2, less what streams through it.
_KEPT_BYTES = 16 << 20


class Tile(NamedTuple):
  """One kernel's blocks: a step adds [rows, depth] times [depth, cols].

  The result is rows x cols: of y in gmm and dlhs, where depth is a part of the
  contracted axis; of an expert's dw in drhs, where depth counts rows of x.
  """

  rows: int  # 64 for each of two warpgroups
  cols: int  # a multiple of 64, at most 256
  depth: int  # 64
  stages: int  # steps in shared memory at a time
  band: int  # blocks of columns that are done side by side, for the L2


class Tiles(NamedTuple):
  fwd: Tile
  dlhs: Tile
  drhs: Tile


def gmm(x_MxA, w_ExAxB, group_sizes_E, *, tiles=None, sms=None, interpret=None):
  """Multiplies consecutive groups of rows by one matrix each.

  The contract is that of `tpu.gmm`: rows from sum(group_sizes_E) on are
  undefined in y and in the gradient of x, and reach nothing else, NaN included;
  the gradient of an empty expert is exactly zero; under vmap the instances run
  one after the other; reverse mode only.

  Args:
    x_MxA: bfloat16 rows sorted by expert. Where M is no multiple of 8 they are
      padded, which is a copy.
    w_ExAxB: one matrix per expert, bfloat16.
    group_sizes_E: int32 rows per expert, none negative, their sum at most M.
    tiles: `Tiles`; None for those of `choose`.
    sms: thread blocks; None for the multiprocessors of the GPU that this is
      lowered for, an H100's where none is known.
    interpret: `plgpu.InterpretGPUParams` of jax 0.12 or newer runs the kernel
      on any platform.

  Returns:
    y_MxB in bfloat16, accumulated in float32.

  Raises:
    ValueError: the shapes do not fit together.
    NotImplementedError: the dtype is not bfloat16, or A or B is not a multiple
      of 64.
  """
  operands.check(x_MxA, w_ExAxB, group_sizes_E, _DTYPES, 'gpu')
  M, (_, A, B) = x_MxA.shape[0], w_ExAxB.shape
  if A % _WIDTH or B % _WIDTH:
    raise NotImplementedError(
      f'gmm on gpu has matrices of multiples of {_WIDTH}, not {A} x {B}'
    )
  if not M or not A or not B:
    return jnp.zeros((M, B), x_MxA.dtype)
  tiles = tiles or choose(A, B)
  sms = sms or (2 if interpret else _multiprocessors())
  padded_MxA = jnp.pad(x_MxA, ((0, -M % _ALIGN), (0, 0)))
  arrays = operands.same_axes(padded_MxA, w_ExAxB, group_sizes_E)
  return _gmm(*arrays, tiles, _Options(sms, interpret))[:M]


class _Options(NamedTuple):
  sms: int
  interpret: object


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(x_MxA, w_ExAxB, group_sizes_E, tiles, options):
  return product(x_MxA, w_ExAxB, group_sizes_E, tiles.fwd, *options)


def _gmm_fwd(x_MxA, w_ExAxB, group_sizes_E, tiles, options):
  y_MxB = _gmm(x_MxA, w_ExAxB, group_sizes_E, tiles, options)
  return y_MxB, (x_MxA, w_ExAxB, group_sizes_E)


def _gmm_bwd(tiles, options, saved, dy_MxB):
  x_MxA, w_ExAxB, group_sizes_E = saved
  dx_MxA = product(
    dy_MxB, w_ExAxB, group_sizes_E, tiles.dlhs, *options, transpose=True
  )
  dw_ExAxB = drhs(x_MxA, dy_MxB, group_sizes_E, tiles.drhs, *options)
  return dx_MxA, dw_ExAxB, None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


def choose(A, B):
  """`Tiles` for matrices [A, B].

  Blocks are as large as registers allow, 128 x 256: the fewer are the bytes
  that a multiply-add takes from the L2. A band's weights, or an expert's dy in
  drhs, should stay in the L2 while its rows pass.
  """

  def best(width, panel):
    blocks = -(-width // 256)
    cols = -(-width // (blocks * _WIDTH)) * _WIDTH
    bands = -(-blocks // max(1, _KEPT_BYTES // (2 * panel * cols)))
    stages = 4 if cols > 192 else 5
    rows = _WGS * _STRIP
    return Tile(rows, cols, _WIDTH, stages, -(-blocks // bands))

  # Rows of an expert are not known; the largest may have that many.
  return Tiles(best(B, A), best(A, B), best(B, 16384))


def product(
  x_MxA, w_ExAxB, group_sizes_E, tile, sms, interpret=None, *, transpose=False
):
  """Rows times their expert's matrix, or its transpose (dlhs).

  Args:
    x_MxA, w_ExAxB, group_sizes_E: as for `gmm`, M a multiple of 8; with
      transpose, x is [M, B].
    tile: `Tile`.
    sms, interpret: as for `gmm`.
    transpose: contracts the last axis of w instead of the middle one.
  """
  M = x_MxA.shape[0]
  B = w_ExAxB.shape[1 if transpose else 2]
  w_shape = (tile.cols, tile.depth) if transpose else (tile.depth, tile.cols)
  body = functools.partial(
    _product_kernel, tile=tile, sms=sms, transpose=transpose
  )

  @jax.custom_batching.sequential_vmap
  def run(x_MxA, w_ExAxB, group_sizes_E):
    return _kernel(
      body,
      operands.like(x_MxA, (M, B)),
      'dlhs' if transpose else 'gmm',
      (tile.rows, tile.depth),
      w_shape,
      tile,
      sms,
      interpret,
    )(*visits(group_sizes_E, tile.rows, M), x_MxA, w_ExAxB)

  # jax forgets over which mesh axes a kernel's result varies.
  return operands.same_axes(run(x_MxA, w_ExAxB, group_sizes_E), x_MxA)[0]


def _product_kernel(
  count, expert_V, start_V, low_V, high_V, x, w, y, *scratch,
  tile, sms, transpose,
):  # fmt: skip
  blocks, steps = (
    pl.cdiv(y.shape[1], tile.cols),
    pl.cdiv(x.shape[1], tile.depth),
  )
  ring = _Ring(*scratch[:-1])
  strip = scratch[-1]

  def block(position):
    """The visit, and the columns."""
    j, v = in_bands(position, count[0], blocks, tile.band)
    return v, j * tile.cols

  def load(position, seq):
    v, col = block(position)
    e, row = expert_V[v], pl.multiple_of(start_V[v], _ALIGN)
    cols = pl.ds(col, tile.cols)

    def step(k, seq):
      deep = pl.ds(k * tile.depth, tile.depth)
      return ring.fill(
        seq,
        x.at[pl.ds(row, tile.rows), deep],
        w.at[(e, cols, deep) if transpose else (e, deep, cols)],
      )

    return lax.fori_loop(0, steps, step, seq)

  def multiply(position, seq):
    v, col = block(position)
    first = lax.axis_index('wg') * _STRIP
    low = jnp.maximum(low_V[v] - first, 0)
    high = jnp.minimum(high_V[v] - first, _STRIP)

    def sum_(acc):
      def step(k, seq):
        slot = ring.wait(seq)
        right = ring.right.at[slot]
        plgpu.wgmma(
          acc,
          ring.left.at[slot, pl.ds(first, _STRIP)],
          right.transpose((1, 0)) if transpose else right,
        )
        ring.release_before(k, seq)
        return seq + 1

      end = lax.fori_loop(0, steps, step, seq)
      ring.release_last(end)
      write = functools.partial(_write_rows, y, start_V[v] + first, low, high)
      _write(acc, strip, col, write)

    def idle():
      def step(_, seq):
        ring.release(ring.wait(seq))
        return seq + 1

      lax.fori_loop(0, steps, step, seq)

    own = low < high
    lax.cond(
      own,
      lambda: pl.run_scoped(sum_, plgpu.ACC((_STRIP, tile.cols))),
      idle,
    )
    return seq + steps

  _deal(count[0] * blocks, sms, load, multiply)


def drhs(x_MxA, dy_MxB, group_sizes_E, tile, sms, interpret=None):
  """[E, A, B]: each expert's x^T dy, zero where it has no rows.

  Args:
    x_MxA, dy_MxB, group_sizes_E: as for `gmm`, M a multiple of 8.
    tile: `Tile`.
    sms, interpret: as for `gmm`.
  """
  A, B, E = x_MxA.shape[1], dy_MxB.shape[1], group_sizes_E.shape[0]
  body = functools.partial(_drhs_kernel, tile=tile, sms=sms)

  @jax.custom_batching.sequential_vmap
  def run(x_MxA, dy_MxB, group_sizes_E):
    end_E = lax.cumsum(group_sizes_E)
    # Dealt out back and forth by size, all get about as many rows.
    order_E = jnp.argsort(group_sizes_E, descending=True).astype(jnp.int32)
    return _kernel(
      body,
      operands.like(x_MxA, (E, A, B)),
      'drhs',
      (tile.depth, tile.rows),
      (tile.depth, tile.cols),
      tile,
      sms,
      interpret,
    )(order_E, end_E - group_sizes_E, end_E, x_MxA, dy_MxB)

  return operands.same_axes(run(x_MxA, dy_MxB, group_sizes_E), x_MxA)[0]


def _drhs_kernel(order_E, first_E, end_E, x, dy, dw, *scratch, tile, sms):
  E, A, B = dw.shape
  down, across = pl.cdiv(A, tile.rows), pl.cdiv(B, tile.cols)
  ring = _Ring(*scratch[:-2])
  strip, masked = scratch[-2:]

  def block(position):
    """The expert, the row and the column of dw."""
    each = down * across
    e = order_E[lax.div(position, each)]
    j, i = in_bands(lax.rem(position, each), down, across, tile.band)
    return e, i * tile.rows, j * tile.cols

  def rows(e):
    """First row that is loaded, and the steps from there."""
    first, end = first_E[e], end_E[e]
    start = lax.div(first, _ALIGN) * _ALIGN
    steps = lax.div(end - start + tile.depth - 1, tile.depth)
    return start, jnp.where(first < end, steps, 0)

  def load(position, seq):
    e, row, col = block(position)
    start, steps = rows(e)

    def step(k, seq):
      at = pl.ds(pl.multiple_of(start + k * tile.depth, _ALIGN), tile.depth)
      return ring.fill(
        seq, x.at[at, pl.ds(row, tile.rows)], dy.at[at, pl.ds(col, tile.cols)]
      )

    return lax.fori_loop(0, steps, step, seq)

  def multiply(position, seq):
    e, row, col = block(position)
    start, steps = rows(e)
    first = lax.axis_index('wg') * _STRIP

    def sum_(acc):
      def step(k, seq):
        slot = ring.wait(seq)
        # Rows of other experts: zero on both sides, as zero times NaN is NaN.
        low, high = (
          edge - start - k * tile.depth for edge in (first_E[e], end_E[e])
        )

        @pl.when((low > 0) | (high < tile.depth))
        def _():
          pieces = [
            ref.at[slot, :, pl.ds(at, _WIDTH)]
            for ref in (ring.left, ring.right)
            for at in range(0, ref.shape[2], _WIDTH)
          ]
          for n, piece in enumerate(pieces):
            mine = lax.axis_index('wg') == n % _WGS
            pl.when(mine)(functools.partial(_keep_rows, piece, low, high))
          plgpu.commit_smem()
          plgpu.barrier_arrive(masked)
          plgpu.barrier_wait(masked)

        left = ring.left.at[slot, :, pl.ds(first, _STRIP)]
        plgpu.wgmma(acc, left.transpose((1, 0)), ring.right.at[slot])
        ring.release_before(k, seq)
        return seq + 1

      end = lax.fori_loop(0, steps, step, seq)

      @pl.when(steps > 0)
      def _():
        ring.release_last(end)

      def write(strip, cols):
        to = dw.at[e, pl.ds(row + first, _STRIP), cols]

        @pl.when(row + first < A)
        def _():
          plgpu.copy_smem_to_gmem(strip, to, commit_group=False)

      _write(acc, strip, col, write)

    pl.run_scoped(sum_, plgpu.ACC((_STRIP, tile.cols)))
    return seq + steps

  _deal(E * down * across, sms, load, multiply)


class Visits(NamedTuple):
  """An expert's rows, cut into blocks, in the order of the rows."""

  count: jax.Array  # int32 [1]: the visits that exist; the rest is padding
  expert_V: jax.Array  # int32
  start_V: jax.Array  # int32, the first row of the block, a multiple of 8
  low_V: jax.Array  # int32, its first row that is the expert's own
  high_V: jax.Array  # int32, one past the last


def visits(group_sizes_E, rows, M):
  """V is static; an expert without rows has no visit."""
  E = group_sizes_E.shape[0]
  end_E = lax.cumsum(group_sizes_E)
  first_E = end_E - group_sizes_E
  start_E = first_E // _ALIGN * _ALIGN
  visits_E = jnp.where(group_sizes_E > 0, pl.cdiv(end_E - start_E, rows), 0)
  until_E = lax.cumsum(visits_E)
  # Each expert has a part of a block more, at most, than its share of M.
  v_V = lax.iota(jnp.int32, pl.cdiv(M, rows) + E)
  expert_V = jnp.sum(until_E[None, :] <= v_V[:, None], axis=1, dtype=jnp.int32)
  expert_V = jnp.minimum(expert_V, E - 1)
  start_V = start_E[expert_V] + rows * (v_V - (until_E - visits_E)[expert_V])
  return Visits(
    until_E[-1:],
    expert_V,
    start_V,
    jnp.maximum(first_E[expert_V] - start_V, 0),
    jnp.minimum(end_E[expert_V] - start_V, rows),
  )


def in_bands(position, length, blocks, band):
  """(block, place) of a position, among length * blocks.

  A band is `band` blocks side by side; its places follow one another.
  """
  b = lax.div(position, length * band)
  inside = position - b * length * band
  width = jnp.minimum(blocks - b * band, band)
  return b * band + lax.rem(inside, width), lax.div(inside, width)


def _deal(total, sms, load: Callable, multiply: Callable):
  """Deals positions 0..total out, back and forth; runs a role over its own.

  Args:
    total: how many there are.
    sms: thread blocks.
    load, multiply: (position, seq) -> seq, the steps since the kernel began.
  """
  sm = lax.axis_index('sm')
  wg = lax.axis_index('wg')

  def position(turn):
    back = lax.rem(turn, 2) == 1
    return turn * sms + jnp.where(back, sms - 1 - sm, sm)

  whole = lax.div(total, sms)
  turns = whole + (position(whole) < total).astype(jnp.int32)

  def all_(role):
    lax.fori_loop(0, turns, lambda t, seq: role(position(t), seq), jnp.int32(0))

  @pl.when(wg == _WGS)
  def _():
    plgpu.set_max_registers(_LOAD_REGISTERS, action='decrease')
    all_(load)

  @pl.when(wg < _WGS)
  def _():
    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    all_(multiply)
    plgpu.wait_smem_to_gmem(0)


class _Ring(NamedTuple):
  """Stages in shared memory, filled and emptied in turn."""

  left: object  # [stages, ...]
  right: object
  full: object  # barriers: both copies have arrived
  empty: object  # barriers: both warpgroups have multiplied

  @property
  def stages(self):
    return self.left.shape[0]

  def fill(self, seq, left, right):
    slot = lax.rem(seq, self.stages)

    @pl.when(seq >= self.stages)
    def _():
      plgpu.barrier_wait(self.empty.at[slot])

    full = self.full.at[slot]
    plgpu.copy_gmem_to_smem(left, self.left.at[slot], full)
    plgpu.copy_gmem_to_smem(right, self.right.at[slot], full)
    return seq + 1

  def wait(self, seq):
    """The stage of this step, once it is there."""
    slot = lax.rem(seq, self.stages)
    plgpu.barrier_wait(self.full.at[slot])
    return slot

  def release(self, slot):
    plgpu.barrier_arrive(self.empty.at[slot])

  def release_before(self, k, seq):
    """Releases the step before, whose product is done once one is left."""
    plgpu.wgmma_wait(1)

    @pl.when(k > 0)
    def _():
      self.release(lax.rem(seq + self.stages - 1, self.stages))

  def release_last(self, seq):
    """Releases the step before seq, after all products."""
    plgpu.wgmma_wait(0)
    self.release(lax.rem(seq + self.stages - 1, self.stages))


def _write(acc, strip, col, write):
  """Hands a warpgroup's sums to write(shared memory, columns), in pieces."""
  sums = acc[...].astype(strip.dtype)
  mine = strip.at[lax.axis_index('wg')]
  width = strip.shape[2]
  for at in range(0, sums.shape[1], width):
    # The copy before may still read what is overwritten.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mine[...] = sums[:, at : at + width]
    plgpu.commit_smem()
    write(mine, pl.ds(col + at, width))
    plgpu.commit_smem_to_gmem_group()


def _write_rows(y, row, low, high, strip, cols):
  """Rows low to high of a strip to y, whose row 0 is `row` of y.

  A copy's size is static: one for each power of two that the rows hold.
  """
  rows, at = high - low, low
  size = strip.shape[0]
  while size:

    @pl.when(rows & size != 0)
    def _(size=size, at=at):
      plgpu.copy_smem_to_gmem(
        strip.at[pl.ds(at, size)],
        y.at[pl.ds(row + at, size), cols],
        commit_group=False,
      )

    at += rows & size
    size //= 2


def _keep_rows(ref, low, high):
  """Zero in the rows of shared memory below low, and from high on."""
  a = ref[...]
  row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=plgpu.Layout.WGMMA)
  ref[...] = jnp.where((row >= low) & (row < high), a, jnp.zeros_like(a))


def _kernel(body, out, name, left, right, tile, sms, interpret):
  """The kernel's call: arrays, then scratch of a ring and of the strips."""

  def swizzled(shape, rows):
    return plgpu.SMEM(
      shape,
      out.dtype,
      transforms=(
        plgpu.TilingTransform((rows, _WIDTH)),
        plgpu.SwizzleTransform(128),
      ),
    )

  barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
  width = 128 if tile.cols % 128 == 0 else _WIDTH
  scratch = [
    swizzled((tile.stages, *left), _ALIGN),
    swizzled((tile.stages, *right), _ALIGN),
    barrier(num_barriers=tile.stages),
    barrier(num_barriers=tile.stages),
    # Tiles of one row, so that any number of rows is a piece.
    swizzled((_WGS, _STRIP, width), 1),
  ]
  if name == 'drhs':
    scratch.append(barrier())
  return plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    grid=(sms,),
    grid_names=('sm',),
    num_threads=_WGS + 1,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )


def _multiprocessors():
  """Of the device that is compiled for; an H100's where it does not say."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None and abstract.platform == 'gpu':
    return abstract.num_cores
  if jax.default_backend() == 'gpu':
    return jax.devices()[0].core_count
  return _H100
