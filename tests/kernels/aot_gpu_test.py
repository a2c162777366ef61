"""Kernels compiled for an H100 that is not there; needs the extra `aot`."""

import importlib.util
import os
import subprocess
import sys

import pytest

from pallas_kernels.tools import hopper

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None,
  reason="needs the extra 'aot': jax_cuda13_plugin is not installed",
)

# Instructions of a product and of the copy engine, of one kernel.
BUDGET = {'fwd': (8, 4, 14), 'dlhs': (8, 4, 14), 'drhs': (4, 2, 2)}


@pytest.mark.parametrize('kind', BUDGET)
def test_static_budget(kind):
  found = hopper.rows('gpu', kind, '8192x1024x1024x8', ['even', 'zipf'])
  assert not isinstance(found, str), found
  for row in found:
    assert (row.spills, row.fills) == (0, 0) and row.registers <= 168
    rows, cols, depth = map(int, row.tile.split('x'))
    assert rows >= 128 and cols >= 128 and depth >= 64 and row.stages >= 2
    assert (row.wgmmas, row.loads, row.stores) == BUDGET[kind]
    assert row.shared <= 227 * 1024
    assert row.padding <= 1.1 and 0.5 < row.roofline <= 1
  assert found[0].ms <= found[1].ms


@pytest.mark.parametrize('kind', BUDGET)
def test_no_slower_than_jax_s_own_by_the_model(kind):
  ours, theirs = (
    hopper.rows(impl, kind, '8192x1024x1024x8', ['even', 'zipf'])
    for impl in ('gpu', 'mgpu')
  )
  for own, other in zip(ours, theirs, strict=True):
    assert own.roofline >= other.roofline


SETUP = """
import functools, itertools
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import gpu
from pallas_kernels.tools import hopper

P = jax.sharding.PartitionSpec
topology = topologies.get_topology_desc(
  '', 'cuda', topology='1x1x2', target_config=hopper.TARGET.read_text()
)

def step(x, w, group, dy):
  y, back = jax.vjp(lambda x, w: gpu.gmm(x, w, group), x, w)
  return y, *back(dy)

def arrays(M, A, B, E, *many):
  shaped = jax.ShapeDtypeStruct
  return (
    shaped((*many, M, A), jnp.bfloat16), shaped((E, A, B), jnp.bfloat16),
    shaped((*many, E), jnp.int32), shaped((*many, M, B), jnp.bfloat16),
  )

def compile(mesh, f, specs, args):
  args = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, s))
    for a, s in zip(args, specs)
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(f).lower(*args).compile().as_text()
"""
WIDTHS = """
mesh = jax.sharding.Mesh(topology.devices[:1], ('data',))
for M, A, B, E in (
  (1, 64, 64, 3), (7, 64, 192, 1), (300, 320, 128, 4), (4096, 704, 1408, 64),
):
  text = compile(mesh, step, [P()] * 4, arrays(M, A, B, E))
  assert text.count('mosaic_gpu') >= 3, text
"""
SHARDED = """
mesh = jax.sharding.Mesh(topology.devices, ('data',))
specs = (P('data'), P(), P('data'), P('data'))

def local(x, w, group, dy):
  y, dx, dw = step(x[0], w, group[0], dy[0])
  return y[None], dx[None], dw

f = jax.shard_map(
  local, mesh=mesh.abstract_mesh, in_specs=specs,
  out_specs=(P('data'), P('data'), P()),
)
text = compile(mesh, f, specs, arrays(512, 128, 256, 4, 2))
assert text.count('mosaic_gpu') >= 3 and 'all-reduce' in text
"""


@pytest.mark.parametrize('code', [WIDTHS, SHARDED], ids=['widths', 'sharded'])
def test_compiles(code):
  """Of all widths that it takes, and inside a checked shard_map."""
  done = subprocess.run(
    [sys.executable, '-c', SETUP + code],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
