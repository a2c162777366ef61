"""The papers' settings, compiled whole for chips that are not there.

The training step of every config in configs/paper at its published sizes, but
for the rows of a batch: on a slice of TPUs, whose chips share parameters and
experts, and on H100s. Needs the extra `aot`. Nothing is executed. Each
compilation has a process of its own: libtpu reads its settings once.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from moe_jax import config, models, parallel
from moe_jax.sizing import aot as chips
from moe_jax.training import train_step
from moe_jax.training.jobs import assemble

pytestmark = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ('libtpu', 'jax_cuda13_plugin'))),
  reason="needs the extra 'aot': libtpu or jax_cuda13_plugin is not installed",
)

ROOT = pathlib.Path(__file__).parents[2]
PAPERS = sorted(p.stem for p in (ROOT / 'configs/paper').glob('*.py'))
H100 = (ROOT / 'pallas_kernels/tools/h100.txtpb').read_text()
GIB = 2**30
HBM = {'v5p': 95 * GIB, 'h100': 79 * GIB}
ROWS = {'momentum_vmoe': 64}  # else 8
# (data, fsdp, expert, tensor) of a slice; 63 experts are not for two chips.
SLICES = {'coe': (1, 4, 1, 1)}  # else 1, 2, 2, 1
# Of these a TPU's step takes libtpu minutes.
SLOW = ('coe', 'momentum_vmoe', 'rexmoe_half', 'thor')
# On GPUs ragged_dot makes a copy of the rows for each of a pool's experts.
WITHOUT_COPIES = ('rexmoe_2b', 'rexmoe_half')
IMAGE = {'V': 1000, 'size': (224, 224, 3)}  # ImageNet's


def compiled(name, chip, gmm, sizes):
  """Prints what the compiler says of a config's step on a mesh of chips."""
  axes = dict(zip(parallel.AXES, sizes, strict=True))
  mesh = parallel.mesh(axes, devices(chip, sizes))
  path = ROOT / 'configs/paper' / f'{name}.py'
  c = config.resolve(runpy.run_path(str(path))['get_config']())
  c['batch_size'] = ROWS.get(name, 8) * mesh.size
  abstract = abstract_job(c, gmm, mesh)
  state = train_step.abstract_state(abstract)
  rows = jax.NamedSharding(mesh, parallel.ROWS)
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows)
  batch = {k: place(a) for k, a in batch_of(c).items()}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = train_step.make_step(abstract).lower(state, batch).compile()
  memory, text = program.memory_analysis(), program.as_text()
  calls = re.findall(r'%(\w+)\S* = .*"tpu_custom_call"', text)
  found = {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'donated': memory.alias_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'kernels': sorted(set(calls)),
    'reduced': 'all-reduce' in text,
    'strategy': abstract.implementation['strategy'],
  }
  print(json.dumps(found))


def devices(chip, sizes):
  if chip == 'h100':
    topology = topologies.get_topology_desc(
      '', 'cuda', topology='1x1x8', target_config=H100
    )
  else:
    topology = topologies.get_topology_desc('v5p:2x2x1', 'tpu')
  return topology.devices[: math.prod(sizes)]


def abstract_job(c, gmm, mesh):
  """What job.prepare returns, without data and on devices that are not here."""
  values = {**c['model'], 'gmm': gmm, **sizes_of(c)}
  layout, said = parallel.layout(
    mesh, c['model']['router']['k'], **c['parallel']
  )
  init = models.initializer(values, layout)
  return assemble(
    c,
    workdir=None,
    mesh=mesh,
    init=init,
    implementation={'strategy': said},
    dataset=types.SimpleNamespace(streams=streams(c)),
  )


def sizes_of(c):
  """What the data would say, as published."""
  if c['data']['source'] == 'images':
    return IMAGE
  return {'V': c['data']['vocab_size']}


def streams(c):
  return c['data'].get('order') == 'stream'


def batch_of(c):
  """The shapes of a batch, as data.py, pairs.py and images.py state them."""
  B, L, source = c['batch_size'], c['seq_len'], c['data']['source']
  L = 1 if source == 'images' else L
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  batch = {
    'target_BxL': ints(B, L),
    'mask_BxL': floats(B, L),
    'segment_BxL': ints(B, L),
    'row_B': ints(B),
  }
  if source == 'images':
    return {**batch, 'image_BxYxXxC': floats(B, *IMAGE['size'])}
  for name in ('ids_BxL', 'pos_BxL'):
    batch[name] = ints(B, L)
  if source == 'pairs':
    batch['source_BxS'] = ints(B, L)
    batch['source_mask_BxS'] = floats(B, L)
  if streams(c):
    batch['begins_B'] = ints(B)
  return batch


@functools.cache
def in_process(name, chip, gmm, sizes=(1, 1, 1, 1)):
  """What `compiled` finds, in a process of its own."""
  call = f'compiled({name!r}, {chip!r}, {gmm!r}, {sizes})'
  done = subprocess.run(
    [sys.executable, '-c', f'from {__name__} import compiled; {call}'],
    cwd=ROOT,
    env=os.environ | chips.ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


def check_memory(found, chip):
  # The old state makes room for the new one: only metrics are beside it.
  assert found['outputs'] - found['donated'] < 2**20
  new = found['outputs'] - found['donated'] + found['temporary']
  assert found['arguments'] + new < HBM[chip]


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in PAPERS
  ],
)
def test_a_step_fits_on_a_slice_of_tpus(name):
  found = in_process(name, 'v5p', 'tpu', SLICES.get(name, (1, 2, 2, 1)))
  check_memory(found, 'v5p')
  assert found['kernels'] == ['dlhs', 'drhs', 'gmm']
  # With one expert for a token it is not worth while to send it everywhere.
  other = {'coe': 'local', 'thor': 'ragged'}
  assert found['strategy'] == other.get(name, 'all_gather')


@pytest.mark.parametrize('name', PAPERS)
def test_a_step_fits_on_a_gpu(name):
  gmm = 'cpu' if name in WITHOUT_COPIES else 'xla'
  check_memory(in_process(name, 'h100', gmm), 'h100')


def test_a_step_is_split_over_gpus():
  alone = in_process('momentum_small', 'h100', 'xla')
  found = in_process('momentum_small', 'h100', 'xla', (2, 2, 2, 1))
  assert found['reduced'] and not alone['reduced']
  assert found['temporary'] < 1.1 * alone['temporary']
