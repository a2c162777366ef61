"""The routed layer on meshes: strategies, drops, layouts, refusals."""

import collections
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import parallel, plans
from moe_jax.experts.mlp import Experts
from tests.helpers import oracle

P = jax.sharding.PartitionSpec
T, D, F, E, K = 64, 8, 8, 8, 2
N, GROUP, C = 16, 4, 2  # where experts choose
EXCHANGES = [
  s for s in parallel.STRATEGIES if s not in parallel.LOCAL_STRATEGIES
]
# What exchanges rows does so along `expert` alone, and what sums over the other
# axes is common to all strategies: one of these is enough on each other mesh.
CASES = [
  *itertools.product([(1, 1, 8, 1), (1, 2, 2, 2)], EXCHANGES),
  ((2, 2, 2, 1), 'ragged'),
  *itertools.product([(2, 2, 1, 2)], parallel.LOCAL_STRATEGIES),
]
SCARCE = [
  *itertools.product([(1, 2, 2, 2)], EXCHANGES),
  *[((1, 1, 8, 1), 'ragged'), ((2, 2, 1, 2), 'all_to_all')],
]


@pytest.fixture(autouse=True)
def _wide():
  with jax.enable_x64(True):
    yield


def _dense_gmm(x_MxA, w_ExAxB, group_sizes_E):
  """Every row times every matrix: slow, and few operations to compile."""
  expert_M = plans.expert_of(group_sizes_E, len(x_MxA))
  own_MxE = jax.nn.one_hot(expert_M, len(group_sizes_E), dtype=x_MxA.dtype)
  return jnp.einsum('ma,eab,me->mb', x_MxA, w_ExAxB, own_MxE)


@jax.custom_vjp
def _worst_gmm(x_MxA, w_ExAxB, group_sizes_E):
  """NaN in all that the contract of a grouped matmul leaves open."""
  y_MxB = _dense_gmm(_inside(x_MxA, group_sizes_E), w_ExAxB, group_sizes_E)
  return _inside(y_MxB, group_sizes_E, jnp.nan)


def _worst_gmm_bwd(saved, dy_MxB):
  x_MxA, w_ExAxB, group_sizes_E = saved
  gmm = lambda x, w: _dense_gmm(x, w, group_sizes_E)
  _, pull = jax.vjp(gmm, _inside(x_MxA, group_sizes_E), w_ExAxB)
  dx_MxA, dw_ExAxB = pull(_inside(dy_MxB, group_sizes_E))
  return _inside(dx_MxA, group_sizes_E, jnp.nan), dw_ExAxB, None


_worst_gmm.defvjp(lambda *args: (_worst_gmm(*args), args), _worst_gmm_bwd)


def _inside(a_MxA, group_sizes_E, other=0.0):
  row_M = jnp.arange(len(a_MxA), dtype=jnp.int32)
  rows = jnp.sum(group_sizes_E, dtype=jnp.int32)
  return jnp.where((row_M < rows)[:, None], a_MxA, other)


@functools.cache
def _experts():
  """(graph, names and shapes) of experts with biases."""
  made = nnx.eval_shape(
    lambda: Experts(
      E, D, F, activation='swiglu', gmm=_worst_gmm, bias=True, rngs=nnx.Rngs(0)
    )
  )
  graph, state = nnx.split(made)
  return graph, state


@functools.cache
def arguments():
  """What gradients are taken of."""
  draw = np.random.default_rng(0)
  shapes = nnx.to_pure_dict(_experts()[1])
  return {
    'x_TxD': draw.normal(size=(T, D)),
    'gate_TxK': draw.random((T, K)),
    'gate_NxExC': draw.random((N, E, C)),
    'weights': {k: draw.normal(0, 0.3, a.shape) for k, a in shapes.items()},
  }


def choices(kind, seed=1):
  """Who goes where: of tokens, and of experts in each group of tokens."""
  draw = np.random.default_rng(seed)
  pick = lambda n, k: draw.permutation(n)[:k]
  expert_TxK = np.array([pick(E, K) for _ in range(T)], np.int32)
  if kind == 'skewed':
    expert_TxK[:] = 2, 3  # of two devices that share the experts, all on one
  if kind == 'sparse':
    expert_TxK[draw.random((T, K)) < 0.4] = E  # no expert
  places = [pick(GROUP, C) for _ in range(N * E)]
  return expert_TxK, np.array(places, np.int32).reshape(N, E, C)


KINDS = ('random', 'skewed', 'sparse')


@functools.cache
def answer(layout):
  """A function of arguments and choices: gradients, ([y, y], [overflow] * 2).

  Of both kinds of plans.
  """
  graph, state = _experts()

  def f(args, expert_TxK, place_NxExC, r_TxD):
    nnx.replace_by_pure_dict(state, args['weights'])
    experts = nnx.merge(graph, state)
    found = [
      layout(args['x_TxD'], plan, experts)
      for plan in (
        plans.by_token(expert_TxK, args['gate_TxK'], E),
        plans.ExpertChoice(place_NxExC, args['gate_NxExC'], GROUP),
      )
    ]
    (y_TxD, overflow), (z_TxD, overflow_too) = found
    value = jnp.sum(r_TxD * y_TxD) + jnp.sum(r_TxD[::-1] * z_TxD)
    return value, ([y_TxD, z_TxD], [overflow, overflow_too])

  return jax.jit(jax.grad(f, has_aux=True))


def ask(layout, args, chosen):
  r_TxD = np.random.default_rng(2).normal(size=(T, D))
  return jax.device_get(answer(layout)(args, *chosen, r_TxD))


def on(sizes, strategy, buffer_factor=None):
  mesh = parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))
  return parallel.layout(
    mesh, K, strategy=strategy, buffer_factor=buffer_factor
  )[0]


def same(found, expected):
  close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
  jax.tree.map(close, found, expected)


def dense(args, chosen):
  """What the plain loops answer to both plans."""
  expert_TxK, place_NxExC = chosen
  token_NxExC = place_NxExC + np.arange(N)[:, None, None] * GROUP
  by_expert = lambda a_NxExC: a_NxExC.swapaxes(0, 1).reshape(E, N * C)
  weights = args['weights']
  return [
    oracle.moe(args['x_TxD'], expert_TxK, args['gate_TxK'], weights),
    oracle.moe_by_expert(
      args['x_TxD'],
      by_expert(token_NxExC),
      by_expert(args['gate_NxExC']),
      weights,
    ),
  ]


# --- the same answer ----------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_one_device_answers_as_the_loops(kind):
  args, chosen = arguments(), choices(kind)
  grads, (ys, overflows) = ask(parallel.Layout(), args, chosen)
  same(ys, dense(args, chosen))
  assert overflows == [0, 0]
  toward = jax.tree.map(np.random.default_rng(3).normal, args)
  r_TxD = np.random.default_rng(2).normal(size=(T, D))

  def along(step):
    moved = jax.tree.map(lambda a, d: a + step * d, args, toward)
    y_TxD, z_TxD = dense(moved, chosen)
    return np.sum(r_TxD * y_TxD) + np.sum(r_TxD[::-1] * z_TxD)

  slope = (along(1e-5) - along(-1e-5)) / 2e-5
  dots = jax.tree.map(lambda g, d: np.sum(g * d), grads, toward)
  np.testing.assert_allclose(sum(jax.tree.leaves(dots)), slope, rtol=1e-7)


@pytest.mark.parametrize('sizes, strategy', CASES)
def test_a_mesh_answers_as_one_device(sizes, strategy):
  """Values, all gradients, and no row overflows, wherever tokens want to go."""
  layout = on(sizes, strategy)
  for kind in KINDS:
    found = ask(layout, arguments(), choices(kind))
    same(found, ask(parallel.Layout(), arguments(), choices(kind)))


# --- drops --------------------------------------------------------------------


def kept(strategy, rows, n, places):
  """Which rows of devices that share experts find a place.

  Args:
    rows: (sender, expert) in the order of the senders' tokens.
    places: of a receiver; with all_to_all of a sender's rows for an expert.
  """
  taken, found = collections.Counter(), [False] * len(rows)
  by_expert = sorted(range(len(rows)), key=lambda i: rows[i][1])
  for i in by_expert:
    sender, expert = rows[i]
    receiver = expert // (E // n)
    queue = (sender, expert) if strategy == 'all_to_all' else receiver
    found[i] = taken[queue] < places
    taken[queue] += 1
  return found


def test_places_for_rows_are_counted_exactly():
  """1.1 of 10 rows are 11, though the float 1.1 is a little more."""
  expert_TxK = jnp.zeros((10, 1), jnp.int32)
  plan = plans.TokenChoice(expert_TxK, jnp.ones((10, 1)), E=4)
  assert parallel._places(plan, parallel.Axis(4, 1.1, True)) == 11


def masks(sizes, strategy, buffer_factor, expert_TxK):
  """bool [T, K] and [N, E, C]: the rows that find a place."""
  data, fsdp, n, _ = sizes  # the devices along tensor have the same rows
  expert_NxExC = np.broadcast_to(np.arange(E)[:, None], (N, E, C))
  found = []
  for expert in expert_TxK, expert_NxExC:
    size = expert.size // (data * fsdp * n)
    places = math.ceil(
      buffer_factor * (size / E if strategy == 'all_to_all' else size)
    )
    mask = expert < E
    for part, open_ in zip(  # of devices that share experts
      np.split(expert, data * fsdp), np.split(mask, data * fsdp), strict=True
    ):
      index = list(zip(*np.nonzero(open_), strict=True))
      rows = [(i[0] * n // len(part), part[i]) for i in index]
      for i, place in zip(index, kept(strategy, rows, n, places), strict=True):
        open_[i] = place
    found.append(mask)
  return found


@pytest.mark.parametrize('sizes, strategy', SCARCE)
def test_what_finds_no_place_is_counted_and_left_out(sizes, strategy):
  buffer_factor, args = 0.6, arguments()
  for kind in KINDS:
    chosen = choices(kind)
    mask_TxK, mask_NxExC = masks(sizes, strategy, buffer_factor, chosen[0])
    gates = {
      'gate_TxK': args['gate_TxK'] * mask_TxK,
      'gate_NxExC': args['gate_NxExC'] * mask_NxExC,
    }
    grads, (ys, overflows) = ask(
      on(sizes, strategy, buffer_factor), args, chosen
    )
    same(ys, dense({**args, **gates}, chosen))
    wanted = np.sum(chosen[0] < E)
    assert overflows == [wanted - mask_TxK.sum(), N * E * C - mask_NxExC.sum()]
    if kind == 'skewed':
      assert overflows[0] > 0
    expected, _ = ask(parallel.Layout(), {**args, **gates}, chosen)
    left_out = {
      'gate_TxK': expected['gate_TxK'] * mask_TxK,
      'gate_NxExC': expected['gate_NxExC'] * mask_NxExC,
    }
    same(grads, {**expected, **left_out})


def test_legs_by_hand():
  """Two devices with two experts each and four places for rows."""
  mesh = parallel.mesh({'data': 1, 'fsdp': 1, 'expert': 2, 'tensor': 1})
  rows_SxE = np.array([[2, 1, 0, 3], [1, 2, 2, 1]], np.int32)
  legs = lambda rows_1xE: parallel._ragged_all_to_all_args(rows_1xE[0], 2, 4)
  there, back, came, overflow = jax.jit(
    jax.shard_map(
      lambda rows_1xE: jax.tree.map(lambda a: a[None], legs(rows_1xE)),
      mesh=mesh,
      in_specs=P('expert'),
      out_specs=P('expert'),
    )
  )(rows_SxE)
  # Expert 0 gets 2 and 1 rows, expert 1 one from the first device and no more;
  # expert 2 gets both of the second device, expert 3 two of the first's three.
  leave = [[0, 2, 3, 3], [0, 1, 3, 5]]
  size = [[2, 1, 0, 2], [1, 0, 2, 0]]
  arrive = [[0, 3, 0, 2], [2, 4, 0, 4]]
  come = [[2, 1, 1, 0], [0, 2, 2, 0]]
  np.testing.assert_array_equal(there, [leave, size, arrive, come])
  from_, to = [[0, 3, 2, 4], [0, 2, 0, 4]], [[0, 2, 0, 1], [3, 3, 3, 5]]
  np.testing.assert_array_equal(back, [from_, come, to, size])
  np.testing.assert_array_equal(came, [[3, 1], [2, 2]])
  np.testing.assert_array_equal(overflow, [1, 3])


# --- the layout ---------------------------------------------------------------


@pytest.mark.parametrize(
  'path, shape, expected',
  [
    ('pools.up_ExDxF', (8, 16, 9), P('expert', 'fsdp', 'tensor')),
    ('pools.down_ExFxD', (2, 8, 9, 16), P(None, 'expert', 'tensor', 'fsdp')),
    ('mu.pools.bias_up_ExF', (8, 9), P('expert', 'tensor')),
    ('pools.bias_down_ExD', (8, 16), P('expert', 'fsdp')),
    ('pools.up_ExDxF', (8, 15, 8), P('expert', None, None)),
    ('embed_VxD', (256, 16), P('expert', None)),
    ('embed_VxD', (18, 8), P('tensor', None)),
    ('embed_VxD', (14, 8), P('fsdp', None)),
    ('embed_VxD', (257, 16), P(None, None)),
    ('query_DxHxS', (64, 16, 2, 8), P(None, 'expert', None, None)),
    ('w_DxE', (4, 8), P(None, 'expert')),
    ('scale_D', (16,), P()),
    ('scale_D', (2, 16), P()),
    ('count', (), P()),
  ],
)
def test_an_array_is_cut_by_the_axes_of_its_name(path, shape, expected):
  sizes = {'data': 5, 'fsdp': 2, 'expert': 4, 'tensor': 3}
  keys = tuple(jax.tree_util.DictKey(name) for name in path.split('.'))
  found = parallel.spec(keys, shape, types.SimpleNamespace(shape=sizes))
  assert found == expected


def test_a_cache_is_cut_as_its_rows_are():
  state = collections.namedtuple('State', 'cache_BxNxCxD')(
    jnp.zeros((8, 1, 2, 4))
  )
  mesh = parallel.mesh({'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 1})
  assert parallel.shardings(state, mesh)[0].spec == P(parallel.AXES)


def _pretended(platform, n):
  device = types.SimpleNamespace(platform=platform)
  return types.SimpleNamespace(
    shape={'expert': n}, devices=np.array([device] * n), size=n
  )


@pytest.mark.parametrize(
  'platform, n, k, expected',
  [
    ('cpu', 1, 2, 'local'),
    ('tpu', 1, 2, 'local'),
    ('cpu', 8, 2, 'all_gather'),
    ('gpu', 8, 7.5, 'ragged'),
    ('gpu', 8, 8, 'all_gather'),
    ('tpu', 8, 2, 'ragged'),
  ],
)
def test_auto_chooses(platform, n, k, expected, monkeypatch):
  monkeypatch.setattr(parallel, '_takes_ragged', lambda mesh: True)
  mesh = _pretended(platform, n)
  made, said = parallel.layout(mesh, k, strategy='auto', buffer_factor=2.0)
  assert made.strategy == said == expected
  assert made.axis == parallel.Axis(n, 2.0, emulate=platform == 'cpu')


@pytest.mark.parametrize('strategy', ['auto', 'ragged'])
def test_a_network_without_ragged_exchange_gets_the_dense_one(
  strategy, monkeypatch
):
  monkeypatch.setattr(parallel, '_takes_ragged', lambda mesh: False)
  mesh = _pretended('tpu', 8)
  made, said = parallel.layout(mesh, 2, strategy=strategy, buffer_factor=None)
  assert made.strategy == 'all_to_all'
  assert said.startswith('all_to_all: ')


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  'options, told',
  [
    ({'strategy': 'local'}, r"'local'.*mesh\.expert=8"),
    ({'strategy': 'fused'}, r"'fused'.*mesh\.expert=8"),
    (
      {'strategy': 'raged'},
      "'raged'; there are auto, local, fused, all_gather",
    ),
    ({'buffer_factor': 0.0}, 'buffer_factor=0.0'),
    ({'buffer_factor': -1.0}, 'buffer_factor=-1.0'),
  ],
)
def test_what_no_strategy_can_do_is_refused(options, told):
  mesh = parallel.mesh({'data': 1, 'fsdp': 1, 'expert': 8, 'tensor': 1})
  options = {'strategy': 'auto', 'buffer_factor': None, **options}
  with pytest.raises(ValueError, match=told):
    parallel.layout(mesh, 2, **options)


def test_a_mesh_larger_than_the_devices_is_refused():
  with pytest.raises(ValueError, match=r'fsdp=3.*needs 12 devices.* 8'):
    parallel.mesh({'data': 1, 'fsdp': 3, 'expert': 4, 'tensor': 1})


def test_tokens_that_the_devices_do_not_divide_are_refused():
  graph, state = _experts()
  layout = on((1, 1, 8, 1), 'all_gather')
  expert_12xK = jnp.zeros((12, K), jnp.int32)
  plan = plans.by_token(expert_12xK, jnp.ones((12, K)), E)
  with pytest.raises(ValueError, match='8 devices do not divide the 12 tokens'):
    layout(jnp.ones((12, D)), plan, nnx.merge(graph, state))


def test_one_size_of_a_mesh_may_be_the_rest():
  sizes = dict(data=2, fsdp=-1, expert=4, tensor=1)
  assert parallel.filled(sizes, 16) == {**sizes, 'fsdp': 2}
  assert parallel.filled({**sizes, 'fsdp': 1}, 16) == {**sizes, 'fsdp': 1}
  for changes, devices, told in (
    ({}, 12, 'the other axes, 8 devices, do not divide the 12'),
    ({'data': -1}, 16, 'at most one size may be -1'),
    ({'data': 0}, 16, 'mesh.data=0 .*at least 1, or -1'),
  ):
    with pytest.raises(ValueError, match=told):
      parallel.filled({**sizes, **changes}, devices)
