"""Kernels compiled for TPUs that are not there; needs the extra `aot`.

Each compilation has a process of its own: libtpu reads its settings once.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from pallas_kernels import shapes, tiling
from pallas_kernels.tools import cost

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the extra 'aot': libtpu is not installed",
)

# Bundles, spills and fills of the largest hot region, by version of libtpu.
SHAPE = '8192x1024x1024x8'
BUNDLES = {
  '0.0.50.1': {
    'v5e': {
      'fwd': [7284, 1433, 1433],
      'dlhs': [7060, 1433, 1433],
      'drhs': [7787, 787, 2604],
    },
    'v5p': {
      'fwd': [3551, 714, 714],
      'dlhs': [3569, 714, 714],
      'drhs': [4145, 543, 1453],
    },
    'v6e': {
      'fwd': [2279, 389, 389],
      'dlhs': [2226, 389, 389],
      'drhs': [4797, 1970, 3781],
    },
    'tpu7x': {
      'fwd': [2539, 442, 442],
      'dlhs': [2999, 442, 442],
      'drhs': [3136, 742, 962],
    },
  },
}

COMPILE = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels import shapes, tiling, tpu

chip = tiling.CHIPS[sys.argv[1]]
devices = topologies.get_topology_desc(chip.topology, 'tpu').devices
mesh = jax.sharding.Mesh(devices, ('data',))
P = jax.sharding.PartitionSpec

def step(x, w, group, dy):
  y, back = jax.vjp(lambda x, w: tpu.gmm(x, w, group), x, w)
  return y, *back(dy)

def compile(f, specs, *args):
  args = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, s))
    for a, s in zip(args, specs)
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(f).lower(*args).compile()

def arrays(M, A, B, E, dtype):
  shaped = jax.ShapeDtypeStruct
  return (
    shaped((M, A), dtype), shaped((E, A, B), dtype),
    shaped((E,), jnp.int32), shaped((M, B), dtype),
  )
"""
CASES = """
mesh = jax.sharding.Mesh(devices[:1], ('data',))
for name, (M, A, B, group) in shapes.CASES.items():
  if M:
    for dtype in (jnp.float32, jnp.bfloat16):
      try:
        compile(step, [P()] * 4, *arrays(M, A, B, len(group), dtype))
      except NotImplementedError as error:
        assert (A, dtype) == (1, jnp.bfloat16), (name, dtype)
        assert 'width 1' in str(error)
"""
SHARDED = """
n = len(devices)
x, w, group, dy = arrays(1024, 256, 384, 4, jnp.bfloat16)
many = lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype)
P = jax.sharding.PartitionSpec
specs = (P('data'), P(), P('data'), P('data'))

def local(x, w, group, dy):
  y, dx, dw = step(x[0], w, group[0], dy[0])
  return y[None], dx[None], dw

f = jax.shard_map(
  local, mesh=mesh.abstract_mesh, in_specs=specs,
  out_specs=(P('data'), P('data'), P()),
)
text = compile(f, specs, many(x), w, many(group), many(dy)).as_text()
assert text.count('tpu_custom_call') >= 3 and 'all-reduce' in text
"""
GATHERED = """
mesh = jax.sharding.Mesh(devices[:1], ('data',))
x, w, group, _ = arrays(4096, 1024, 512, 8, jnp.bfloat16)
token = jax.ShapeDtypeStruct((8192,), jnp.int32)
tile = tiling.choose(8192, 1024, 512, 8, 2, chip).fwd
f = lambda *args: tpu.gathered(*args, tile)
text = compile(f, [P()] * 4, x, token, w, group).as_text()
assert text.count('tpu_custom_call') == 1 and '[8192,1024]' not in text
"""


def compile_in_process(code, chip, folder):
  done = subprocess.run(
    [sys.executable, '-c', COMPILE + code, chip],
    env=cost.environment(folder),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('chip', tiling.CHIPS)
def test_compiles_inside_a_checked_shard_map(chip, tmp_path):
  compile_in_process(SHARDED, chip, tmp_path)


@pytest.mark.parametrize('chip', ['v5p', 'v6e'])
def test_gathered_rows_compile(chip, tmp_path):
  compile_in_process(GATHERED, chip, tmp_path)


@pytest.mark.parametrize('chip', ['v5e', 'tpu7x'])
def test_every_case_compiles(chip, tmp_path):
  assert len(shapes.CASES) > 10
  compile_in_process(CASES, chip, tmp_path)


@pytest.mark.parametrize('chip', tiling.CHIPS)
@pytest.mark.parametrize('kind', ['fwd', 'dlhs', 'drhs'])
def test_static_budget(kind, chip):
  rows = cost.in_process('tpu', kind, SHAPE, chip, ['even', 'zipf'])
  assert not isinstance(rows, str), rows
  even, zipf = rows
  assert even.excess <= 1.05 and zipf.excess <= 1.05
  assert even.ms <= zipf.ms and 0.3 < even.roofline <= 1
  version = importlib.metadata.version('libtpu')
  if version in BUNDLES:
    found = [even.bundles, even.spills, even.fills]
    assert found == BUNDLES[version][chip][kind], json.dumps(found)
