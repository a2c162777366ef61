"""The memory planner, beside programs that were compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checks.scale import __main__ as scale
from moe_jax import config, parallel
from moe_jax.sizing import aot, estimate
from moe_jax.training import train_step
from tests.helpers.small import command

P = jax.sharding.PartitionSpec
N, D, F, E, L, B, K = 2, 16, 8, 8, 16, 16, 2


def small(sizes, strategy='auto', buffer_factor=None):
  """A resolved config on a mesh of these sizes."""
  c = config.default()
  c.batch_size, c.seq_len = B, L
  c.data = config.source('text', vocab_size=64)
  c.model.update(N=N, D=D, H=2, E=E, expert_F=F, remat=True, tied=False)
  c.model.update(gmm='cpu')
  c.model.router = config.router('topk', k=K)
  c.mesh.update(dict(zip(parallel.AXES, sizes, strict=True)))
  c.parallel.update(strategy=strategy, buffer_factor=buffer_factor)
  return config.resolve(c)


# --- what lies there ----------------------------------------------------------


@pytest.mark.parametrize(
  'sizes, moments', [((2, 2, 2, 1), 'params'), ((1, 2, 2, 2), 'bfloat16')]
)
def test_what_is_held_is_what_lies_on_a_device(sizes, moments):
  c = small(sizes)
  c['optimizer']['moments'] = moments
  mesh = parallel.mesh(c['mesh'])
  there = aot.job_on(mesh, c, parallel.Layout())
  state = train_step.abstract_state(there)
  here = lambda tree: sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )
  found = estimate.held(c, mesh.abstract_mesh)
  params = found.pools + found.layers + found.table
  assert 4 * params == here(state.params)
  assert found.moments == here(state.opt_state)
  with jax.enable_x64(True):
    assert estimate.held(c, mesh.abstract_mesh) == found
  assert found.pools == 3 * N * E * D * F // math.prod(sizes[1:])
  attention = state.params['trunk']['body']['moe']['attention']
  router = N * D * E
  whole = sum(a.size for a in jax.tree.leaves(attention)) + router
  assert found.gathered == whole


# --- what it tells others -----------------------------------------------------


@functools.cache
def traffic(sizes, strategy, buffer_factor=None):
  """(compiled, planned), bytes by kind, on 8 CPU devices."""
  c = small(sizes, strategy, buffer_factor)
  lowered, _ = aot.lower(c, parallel.mesh(c['mesh']))
  found = aot.collectives(lowered.compile().as_text())
  plan = estimate.plan(c, 'h100:8').traffic
  return found, {kind: sum(what.values()) for kind, what in plan.items()}


def test_rows_of_all_to_all_are_planned_to_the_byte():
  found, planned = traffic((1, 2, 4, 1), 'all_to_all', 1.25)
  assert found['all-to-all'] == planned['all-to-all']


@pytest.mark.parametrize(
  'N, pattern, moe', [(2, 'm', 2), (3, 'md', 2), (5, 'mdd', 2), (2, 'mdd', 1)]
)
def test_rows_are_of_the_moe_layers_that_there_are(N, pattern, moe):
  """A pattern that is cut off at the last layer counts too."""
  c = small((1, 1, 8, 1), 'all_to_all', 1.25)
  one = estimate.plan({**c, 'model': {**c['model'], 'N': 1}}, 'h100:8')
  c['model'].update(N=N, pattern=pattern)
  found = estimate.plan(c, 'h100:8').traffic['all-to-all']['rows']
  assert found == moe * one.traffic['all-to-all']['rows']


def test_tokens_that_are_gathered_are_planned():
  """But for what of their plan goes with them, which at this width counts.

  CPU sums the gradients of all else without scattering them.
  """
  c = small((1, 1, 8, 1), 'all_gather')
  found, planned = traffic((1, 1, 8, 1), 'all_gather')
  assert 1 <= found['all-gather'] / planned['all-gather'] < 1.2
  answers = estimate.plan(c, 'h100:8').traffic['reduce-scatter']['answers']
  assert 1 <= found['reduce-scatter'] / answers < 1.2


def test_collectives_count_a_loop_as_often_as_it_runs():
  mesh = parallel.mesh(dict(data=1, fsdp=1, expert=8, tensor=1))

  def here(x):
    def add(x, _):
      total = jax.lax.psum(x, 'expert')
      return x + jax.lax.all_gather(total, 'expert')[0], None

    return jax.lax.scan(add, x, length=5)[0]

  cut = P('expert')
  sums = jax.jit(
    jax.shard_map(here, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
  )
  program = sums.lower(jnp.zeros((8, 6), jnp.float32)).compile()
  one = 4 * 6
  assert aot.collectives(program.as_text()) == {
    'all-reduce': 5 * one,
    'all-gather': 5 * 8 * one,
  }


TPU = """
%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%input), to_apply=%add
  ROOT %slice.1 = bf16[8,32]{1,0} slice(%all-reduce.1), slice={[0:8], [0:32]}
}

%called (a: f32[16]) -> f32[128] {
  %a = f32[16]{0} parameter(0)
  ROOT %all-gather.1 = f32[128]{0} all-gather(%a), dimensions={0}
}

%async (b: f32[16]) -> f32[128] {
  %b = f32[16]{0} parameter(0)
  ROOT %call.1 = f32[128]{0} call(%b), to_apply=%called
}

ENTRY %main (g: bf16[64,32], c: f32[16], few: s8[4], many: s8[9]) -> s8[9] {
  %g = bf16[64,32]{1,0} parameter(0)
  %c = f32[16]{0} parameter(1)
  %few = s8[4]{0} parameter(2)
  %many = s8[9]{0} parameter(3)
  %fusion.1 = bf16[8,32]{1,0} fusion(%g), calls=%all-reduce-scatter.1
  %start = ((f32[16]), f32[128]) async-start(%c), calls=%async
  %done = f32[128]{0} async-done(%start)
  ROOT %ragged = s8[9]{0} ragged-all-to-all(%few, %many, %fusion.1)
}
"""


def test_collectives_of_a_tpus_program():
  """In fusions and calls; a reduction that is cut; the smaller buffer."""
  assert aot.collectives(TPU) == {
    'reduce-scatter': 2 * 64 * 32,
    'all-gather': 4 * 128,
    'ragged-all-to-all': 4,
  }


# --- what needs how much ------------------------------------------------------


COMPILED = [cell for cell in scale.CELLS if cell.name in scale.done()]


@pytest.mark.parametrize('cell', COMPILED, ids=lambda cell: cell.name)
def test_the_plan_is_near_what_was_compiled(cell):
  found = scale.done()[cell.name]
  plan = estimate.plan(cell.resolved(), cell.topology)
  assert plan.peak == pytest.approx(found['peak'], rel=0.15)
  assert (plan.peak > plan.there.chip.memory) == ('exceeds' in found)
  assert plan.strategy == found['strategy']
  state = sum(plan.state.values())
  if 'arguments' in found:  # a TPU pads the small ones
    assert found['arguments'] == pytest.approx(state, rel=0.2)


def test_what_a_change_of_the_config_costs():
  def plan(section='model', **changes):
    c = small((1, 2, 4, 1), 'ragged', 1.0)
    c['data']['vocab_size'] = 8  # else logits are all that counts
    c[section].update(changes)
    return estimate.plan(c, 'h100:8')

  least = plan().peak
  assert least < plan('parallel', buffer_factor=2.0).peak
  assert (
    plan('parallel', buffer_factor=2.0).peak
    < plan('parallel', buffer_factor=None).peak
  )
  assert least < plan(remat=False).peak
  halves = plan('optimizer', accumulate=2).step
  assert halves['gradients of the microbatches before'] > 0


# --- what is said -------------------------------------------------------------


def test_a_compilers_complaint_is_read():
  error = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required'
    ' for HLO temporaries (88.03G) exceeds available HBM (31.24G). HLO module'
  )
  found = aot.too_large(error)
  assert found['peak'] == round(88.03 * 2**30)
  assert found['exceeds'] == pytest.approx((88.03 - 31.24) * 2**30)
  with pytest.raises(RuntimeError, match=r'^another trouble$'):
    aot.too_large('another\n trouble')


@pytest.mark.parametrize(
  'text, devices, slices',
  [
    ('v5p:8x8x8', 512, 1),
    ('2xv5p:4x4x4', 128, 2),
    ('tpu7x:4x4x4', 128, 1),
    ('h100:8', 8, 1),
  ],
)
def test_a_topology(text, devices, slices):
  found = estimate.topology(text)
  assert (found.devices, found.slices) == (devices, slices)


@pytest.mark.parametrize(
  'text, message',
  [
    ('v5p', "'v5p' is not like v5p:8x8x8"),
    ('v5p:8x', "'v5p:8x' is not like"),
    ('v1:2x2', "no chip 'v1'; there are v5e, v5p, v6e, tpu7x, h100"),
  ],
)
def test_no_topology(text, message):
  with pytest.raises(ValueError, match=message) as error:
    estimate.topology(text)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'sizes, topology, message',
  [
    ((1, 1, 4, 1), 'h100:8', '= 4 devices, the topology has 8$'),
    ((1, 2, 8, 1), 'h100:8', '= 16 devices, the topology has 8$'),
    ((1, 2, 4, 1), '2xv5p:2x2', 'data is not a multiple of 2 slices$'),
    ((1, 1, 16, 1), 'v5p:4x4', 'mesh.expert=16 does not divide model.E=8$'),
    ((1, 1, 1, 16), 'v5p:4x4', 'does not divide model.expert_F=8$'),
    ((32, 1, 1, 1), 'v5p:4x8', 'batch_size=16 is not a multiple of 32: '),
  ],
)
def test_no_such_mesh(sizes, topology, message):
  with pytest.raises(ValueError, match=message):
    estimate.plan(small(sizes), topology)


@pytest.mark.parametrize(
  'sizes, topology, strategy',
  [
    ((8, 1, 1, 1), 'h100:8', 'local'),
    ((2, 1, 4, 1), 'h100:8', 'ragged'),
    ((4, 1, 2, 1), 'h100:8', 'all_gather'),  # k = 2 go to both
    ((2, 1, 4, 1), 'v5e:2x4', 'ragged'),
    ((16, 1, 4, 1), 'v5e:8x8', 'all_to_all'),
  ],
)
def test_the_strategy_that_will_be_chosen(sizes, topology, strategy):
  c = small(sizes)
  c['batch_size'] = 64
  assert estimate.plan(c, topology).strategy == strategy


CONFIG = '--config=configs/scale/qwen3_30b.py'


def test_the_command_prints_a_plan():
  run = command('plan', CONFIG, '--topology=v6e:16x16')
  assert run.returncode == 0, run.stderr
  assert 'one of 256 devices, strategy ragged' in run.stdout
  assert ' of 31.24 GiB: fits' in run.stdout
  numbers = [float(w) for w in run.stdout.split() if w.count('.') == 1]
  assert len(numbers) > 12 and np.all(np.isfinite(numbers))


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--topology=v5p:8x8x8',), '= 256 devices, the topology has 512'),
    ((), '--topology is missing'),
  ],
)
def test_the_command_refuses_in_one_line(flags, message):
  run = command('plan', CONFIG, *flags)
  assert run.returncode == 2
  assert message in run.stderr
  assert run.stderr.startswith('moe-plan: ') and run.stderr.count('\n') == 1
