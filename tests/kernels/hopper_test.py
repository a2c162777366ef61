"""The model of an H100, and the walks of kernels, without a compiler."""

import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.tools import hopper
from pallas_kernels.tools.hopper import H100, Walk


def walk(macs, read=(), written=0, sm=0):
  """Blocks that differ in little: each argument is one for all, or a list."""
  n = max(np.size(a) for a in (macs, read, written, sm)) if np.size(read) else 1
  whole = lambda a: np.broadcast_to(np.asarray(a, np.int64), (n,)).copy()
  strips = np.arange(n) if not len(read) else np.asarray(read)
  return Walk(whole(macs), ((strips, whole(0)),), whole(written), whole(sm))


def test_a_block_takes_its_products_or_its_bytes():
  cycles, near, far = hopper.model(walk(H100.macs * 1000), 0)
  assert (cycles, near, far) == (1000, 0, 0)
  share = H100.l2_bandwidth / H100.sms
  cycles, near, _ = hopper.model(walk(1, written=1 << 20), 0)
  assert near == 1 << 20 and cycles == pytest.approx((1 << 20) / share)


def test_the_last_multiprocessor_is_waited_for():
  one = H100.macs * 10
  blocks = walk(one, read=range(H100.sms + 1))
  turns = np.arange(H100.sms + 1) % H100.sms
  assert hopper.model(blocks._replace(sm_V=turns), 0)[0] == 20
  assert hopper.model(blocks._replace(sm_V=None), 0)[0] == 20
  # Who is free first has the next one: a long block holds up no others.
  macs_V = np.full(2 * H100.sms - 1, one)
  macs_V[0] *= 2
  some = walk(1, read=range(len(macs_V)))._replace(macs_V=macs_V)
  assert hopper.model(some._replace(sm_V=None), 0)[0] == 20
  turns = np.arange(len(macs_V)) % H100.sms
  assert hopper.model(some._replace(sm_V=turns), 0)[0] == 30


def test_strips_that_were_used_last_are_in_the_l2():
  size = H100.l2_bytes // 2
  strips = lambda *order: (np.array(order), np.full(len(order), size))
  assert hopper._missed((strips(0, 1, 0, 1),), H100.l2_bytes) == 2 * size
  assert hopper._missed((strips(0, 1, 2, 0),), H100.l2_bytes) == 4 * size
  assert hopper._missed((strips(0, 1, 0, 2, 0),), H100.l2_bytes) == 3 * size
  # Strips of two operands are never the same.
  two = strips(0), strips(0)
  assert hopper._missed(two, H100.l2_bytes) == 2 * size


def test_copies_and_hbm_take_their_time():
  gigabyte = 1 << 30
  second = gigabyte / H100.bandwidth * H100.hz
  assert hopper.model(walk(1), gigabyte)[0] == pytest.approx(second, rel=1e-3)
  big = Walk(
    np.zeros(H100.sms, int),
    ((np.arange(H100.sms), np.full(H100.sms, gigabyte // H100.sms)),),
    np.zeros(H100.sms, int),
    np.arange(H100.sms),
  )
  assert hopper.model(big, 0)[0] == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize('groups', ['even', 'zipf', 'gaps'])
@pytest.mark.parametrize('kind', ['fwd', 'dlhs', 'drhs'])
@pytest.mark.parametrize('impl', ['gpu', 'mgpu'])
def test_walks_write_every_result_once(impl, kind, groups):
  shape = M, A, B, E = shapes.Shape(3000, 384, 640, 12)
  if groups == 'gaps':
    group_sizes_E = np.array(
      [0, 700, 0, 1, 0, 128, 999, 0, 0, 3, 64, 0], np.int32
    )
  else:
    group_sizes_E = shapes.GROUPS[groups](M, E)
  found = hopper.build(impl, kind, shape).walk(group_sizes_E)
  rows = int(group_sizes_E.sum())
  results = {'fwd': rows * B, 'dlhs': rows * A, 'drhs': E * A * B}[kind]
  assert found.writes_V.sum() == 2 * results
  assert found.macs_V.sum() >= rows * A * B
  assert 0 <= found.sm_V.min() and found.sm_V.max() < H100.sms
  for strip_V, bytes_V in found.reads:
    # A strip has one size: those of two experts, or columns, are two strips.
    sizes = {}
    for strip, size in zip(strip_V.tolist(), bytes_V.tolist(), strict=True):
      assert sizes.setdefault(strip, size) == size
    assert len(strip_V) == len(found.macs_V)
  if impl == 'gpu' and groups != 'gaps':
    assert found.macs_V.sum() <= 1.5 * rows * A * B


@pytest.mark.parametrize('name', ['olmoe-up', 'qwen3-up', 'deepseek-up'])
def test_drhs_of_uneven_experts_is_dealt_out_evenly(name):
  """As they come, one multiprocessor would have up to 1.36 of its share."""
  shape = shapes.find(name)
  group_sizes_E = shapes.zipf(shape.M, shape.E)
  found = hopper.build('gpu', 'drhs', shape).walk(group_sizes_E)
  each = np.bincount(found.sm_V, found.macs_V, H100.sms)
  assert each.max() <= 1.2 * each.mean()
