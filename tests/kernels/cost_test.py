"""The schedule reader, the byte counter and the tile model, without libtpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import shapes, tiling, tpu
from pallas_kernels.tools import cost, schedule, traffic
from pallas_kernels.tools.rivals import Steps
from tests.kernels import bench_test

# A kernel of 12 bundles: a loop over 1..10 that holds a run of code with one
# product (2..4) and another, around a plain region, with two (5..8).
LISTING = """
LB: loop body
= control target key end

     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 } /* Start region 1 */
   0x2   : > { %v1 = vmatmul.bf16.gmra.mxu0 %v0 } /* Start region 2 */
   0x3   : > { %v2 = vld [vmem:[%s1]] ;;  %v3 = vmatpush.bf16.msra.mxu0 %v0 }
   0x4   : > { %v4 = vpop.f32.mrf.mxu0 } /* End region 2 */
   0x5   : > { %v5 = vmatmul.mubr.bf16.gmra.mxu0 %v0 } /* Start region 3 */
   0x6   : > { %v6 = vadd.f32 %v4, %v4 } /* Start region 4 :: End region 4 */
   0x7   : > { %v7 = vmatmul.bf16.gmra.mxu1 %v0 }
   0x8   : > { vst [vmem:[%s1]] %v6 } /* End region 3 */
   0x9   : > { %s2 = smov 1 }
   0xa   :  { %12 = sbr.rel target = $region1 } /* End region 1 */
   0xb   :  { %s3 = smov 2 }
"""
TABLE = (
  """== CAPACITY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
  + '0 0 0 0 0 0 0 0 0 0\n' * 2
  + '2 0 0 0 0 0 1 0 0 0\n' * 2
  + '0 0 0 0 0 0 0 0 0 0\n'
  + '1 0 0 0 0 0 0 0 3 0\n' * 4
  + '0 0 0 0 0 0 0 0 0 0\n' * 3
)


def test_reads_the_hot_regions_of_a_schedule():
  read = schedule.parse(LISTING, TABLE, unit=128)
  one = 16 * 128 * 128
  assert read.hot == (
    schedule.Region(bundles=3, macs=one, mxu=4 / 6, spills=0, fills=2),
    schedule.Region(bundles=4, macs=2 * one, mxu=4 / 8, spills=12, fills=0),
  )
  assert read.overhead == 10 - 3 - 4


def test_a_schedule_without_products_is_refused():
  with pytest.raises(ValueError, match='no matrix products'):
    schedule.parse(LISTING.replace('vmatmul', 'vadd'), TABLE, unit=128)


def test_a_step_takes_the_largest_of_its_bounds():
  chip = tiling.CHIPS['v5p']._replace(macs=10, hz=1.0, bandwidth=4.0)
  read = schedule.Schedule(
    hot=(
      schedule.Region(50, 300, 1.0, 0, 0),
      schedule.Region(70, 600, 1.0, 0, 0),
      schedule.Region(60, 600, 1.0, 0, 0),
    ),
    overhead=5,
  )
  steps = Steps(
    bytes_S=np.array([40, 40, 4000, 400]),
    macs_SxP=np.array([[600, 0], [300, 0], [600, 0], [0, 0]]),
    trips=1,
    compulsory=1,
  )
  # 5 + 70 bundles; 5 + 50; 4000 bytes at 4 a cycle; a copy of 400 bytes.
  assert cost.model(read, steps, chip) == 75 + 55 + 1000 + 100
  # Two runs of the region of 300 make the step of 600.
  macs_SxP = np.array([[600, 0], [0, 0], [0, 0], [0, 0]])
  steps = steps._replace(macs_SxP=macs_SxP, trips=2)
  assert cost.model(read, steps, chip) == (5 + 2 * 50) + 10 + 1000 + 100
  # A step of two parts.
  macs_SxP = np.array([[600, 300], [0, 0], [0, 0], [0, 0]])
  steps = steps._replace(macs_SxP=macs_SxP, trips=1)
  assert cost.model(read, steps, chip) == (5 + 70 + 50) + 10 + 1000 + 100


def test_walk_counts_a_block_when_its_index_changes():
  # Rows in blocks of 4, of which the last holds 2; columns in blocks of 8.
  def kernel(x, w, y):
    y[...] = x[...] + w[...]

  def f(x, w):
    return pl.pallas_call(
      kernel,
      grid=(3, 2),
      in_specs=[
        pl.BlockSpec((4, 8), lambda i, j: (i, 0)),  # once per i
        pl.BlockSpec((4, 8), lambda i, j: (0, j)),  # at every step
      ],
      out_specs=pl.BlockSpec((4, 8), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((10, 16), jnp.float32),
    )(x, w)

  walk = traffic.walk(
    f,
    jax.ShapeDtypeStruct((10, 8), jnp.float32),
    jax.ShapeDtypeStruct((4, 16), jnp.float32),
  )
  assert walk.grid_SxG.tolist() == [
    [0, 0],
    [0, 1],
    [1, 0],
    [1, 1],
    [2, 0],
    [2, 1],
  ]
  block = 4 * 8 * 4
  edge = 2 * 8 * 4
  full = [3 * block, 2 * block, 3 * block, 2 * block]
  assert walk.bytes_S.tolist() == [*full, 2 * edge + block, edge + block]


def test_walk_follows_prefetched_group_sizes():
  M, A, B, E = 512, 128, 256, 4
  tile = tiling.Tile(
    rows=128, depth=A, cols=128, run=128, step=64, vmem_bytes=0
  )
  f = functools.partial(tpu.product, tile=tile)
  args = [
    jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, A), (E, A, B))
  ]  # fmt: skip
  # 0..100 | 100..356 | nothing | 356..512: 1 + 3 + 0 + 2 visits.
  walk = traffic.walk(f, *args, np.array([100, 256, 0, 156], np.int32))
  assert len(walk.grid_SxG) == 2 * 6
  x, w, y = 2 * M * A, 3 * A * B, M * B
  assert walk.bytes_S.sum() == 2 * (x + w + y)
  # The second visit of a shared tile fetches the weights alone, and the tile
  # is written after it.
  assert walk.bytes_S[1] == 2 * (A * 128 + 128 * 128)


def test_walk_needs_what_the_grid_depends_on():
  tile = tiling.Tile(128, 128, 128, 128, 128, 0)
  args = [
    jax.ShapeDtypeStruct(s, d)
    for s, d in (
      ((256, 128), jnp.bfloat16),
      ((2, 128, 128), jnp.bfloat16),
      ((2,), jnp.int32),
    )
  ]
  with pytest.raises(ValueError, match='depend on abstract operands'):
    traffic.walk(functools.partial(tpu.product, tile=tile), *args)


@pytest.mark.parametrize('chip', tiling.CHIPS)
@pytest.mark.parametrize('name', shapes.LAYERS)
def test_tiles_fit_and_cover(name, chip):
  M, A, B, E = shapes.LAYERS[name]
  chip = tiling.CHIPS[chip]
  tiles = tiling.choose(M, A, B, E, 2, chip)
  for tile, depth, width in (
    (tiles.fwd, A, B),
    (tiles.dlhs, B, A),
    (tiles.drhs, A, B),
  ):
    assert tile.rows % 16 == 0 and tile.rows <= M
    assert tile.vmem_bytes < chip.vmem
    blocks = tile.rows * (tile.depth + tile.cols) + tile.depth * tile.cols
    assert 2 * 2 * blocks < tile.vmem_bytes
    assert tile.cols % 128 == 0 or tile.cols == width
    whole = tile.depth if tile is tiles.drhs else tile.cols
    assert whole % tile.run == 0
    assert tiling.windows(tile)[-1] == tile.step
    if tile is not tiles.drhs:
      assert tile.depth == depth
  # Columns that no block needs are waste.
  assert tiles.fwd.cols - -(-B // -(-B // tiles.fwd.cols)) < 2 * chip.unit


def test_windows_cover_every_size():
  tile = tiling.Tile(128, 1, 1, 1, step=32, vmem_bytes=0)
  assert tiling.windows(tile) == [128, 64, 32]
  assert tiling.windows(tile._replace(rows=32)) == [32]
  low, high = np.array([0, 5, 17, 60, 40]), np.array([128, 6, 33, 130, 40])
  window = tiling.window_of(low, high, tile)
  assert window.tolist() == [128, 32, 32, 96, 0]
  assert tiling.parts(window, tile).tolist() == [
    [128, 0, 0],
    [0, 0, 32],
    [0, 0, 32],
    [0, 64, 32],
    [0, 0, 0],
  ]


def test_a_shape_that_fits_no_memory_is_refused():
  with pytest.raises(NotImplementedError, match='fits the 64 MiB of v5p'):
    tiling.choose(512, 1 << 20, 128, 2, 2, tiling.CHIPS['v5p'])


@pytest.mark.parametrize('E', [1, 7, 64, 256])
@pytest.mark.parametrize('name', shapes.GROUPS)
def test_group_sizes_share_all_rows(name, E):
  group_sizes_E = shapes.GROUPS[name](8192, E)
  assert group_sizes_E.shape == (E,) and group_sizes_E.dtype == np.int32
  assert group_sizes_E.sum() == 8192 and (group_sizes_E >= 0).all()
  if name == 'even':
    assert np.ptp(group_sizes_E) <= 1
  elif E > 1:
    big = np.sort(group_sizes_E)[::-1].astype(float)
    assert abs(big[0] / big[1] - 2) < 0.1


def test_a_case_has_its_own_groups():
  assert shapes.find('skewed') == shapes.Shape(300, 32, 24, 5)
  ((grouping, group_sizes_E),) = shapes.groups(
    'skewed', ['even', 'zipf']
  ).items()
  assert grouping == 'own' and group_sizes_E.tolist() == [3, 251, 17, 1, 28]
  assert list(shapes.groups('A', ['zipf'])) == ['zipf']
  assert shapes.find('8x4x2x3') == shapes.Shape(8, 4, 2, 3)
  with pytest.raises(ValueError, match="'no_rows' is not"):
    shapes.find('no_rows')


def test_bad_flags_get_one_line(tmp_path):
  bad = {
    '--chip=v9': "--chip has 'v9'; there are v5e, v5p, v6e, tpu7x",
    '--shape=gpt': "shape 'gpt' is not MxAxBxE, nor one of A, B, C, mix",
    '--shape=1x2x3': "shape '1x2x3' is not MxAxBxE",
    '--pass=back': "--pass has 'back'",
    '--impl=cuda': "--impl has 'cuda'",
  }
  found = bench_test.commands(
    *(tmp_path / 'here', 'pallas_kernels.tools.cost'),
    [
      'pallas_kernels.tools.rivals',
      'pallas_kernels.tools.hopper',
      'absl.flags',
    ],
    *([flag] for flag in bad),
  )
  bench_test.refuses(found, bad.values())
