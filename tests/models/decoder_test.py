"""The decoder: every seam, in small non-plain values, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import attention, blocks, models, ops, parallel, routers
from moe_jax.models import decoder
from moe_jax.plans import by_token, combine, dispatch, sort
from tests.helpers import tiny
from tests.helpers.tiny import B, L, T, V


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _assert_close(a, b, tolerance):
  """Each array, relative to its own largest value."""

  def one(a, b):
    np.testing.assert_allclose(a, b, 0, tolerance * np.abs(b).max() + 1e-30)

  jax.tree.map(one, a, b)


# Loops by hand: in numpy, over modules that are compiled one by one.


def _by_hand(model, params, batch):
  """logits_BxLxV and the aux of each iteration in each layer."""
  c = model.c
  model = models.bind(model, params, tiny.state(model))
  ctx, segment_BxL = _context(batch), batch['segment_BxL']
  view = attention.View(segment_BxL, segment_BxL, causal=True)
  x_BxLxD = np.array(params['embed_VxD'][batch['ids_BxL']])
  found, depth, momentum = [], 0, None
  call = lambda *args: jax.device_get(_call(*args))

  def dense(layer, x_BxLxD):
    x_BxLxD = attend(layer, x_BxLxD)
    h_TxD = call(layer.norm_feed, x_BxLxD).reshape(T, c.D)
    return x_BxLxD + call(layer.feed, h_TxD).reshape(B, L, c.D)

  def attend(layer, x_BxLxD):
    h_BxLxD = call(layer.norm_attention, x_BxLxD)
    return x_BxLxD + call(layer.attention, h_BxLxD, view)

  for n in range(c.first):
    x_BxLxD = dense(blocks.at(model.trunk.first, n), x_BxLxD)
  places = [
    (body, g, r)
    for body in model.trunk.segments().values()
    for g in range(body.G)
    for r in range(body.R)
  ]
  for body, g, r in places:
    experts = blocks.at(body.pools, g)
    at = lambda stacked, g=g, r=r: blocks.at(blocks.at(stacked, g), r)
    d = 0
    for kind in c.pattern:
      if kind == 'd':
        x_BxLxD, d = dense(blocks.at(at(body.dense), d), x_BxLxD), d + 1
        continue
      layer = at(body.moe)
      x_BxLxD = attend(layer, x_BxLxD)
      h_TxD = h0_TxD = call(layer.norm_feed, x_BxLxD).reshape(T, c.D)
      for i in range(c.iterations):
        here = _context_at(ctx, np.int32(depth), np.int32(i))
        plan, aux, _ = call(blocks.at(layer.feed.routers, i), h_TxD, here, ())
        y_TxD = jax.device_get(_routed(experts, h_TxD, plan))
        if c.shared_F:
          y_TxD = y_TxD + call(layer.feed.shared, h_TxD)
        start = {'replace': 0, 'add': h_TxD, 'init': h0_TxD}[c.inner_residual]
        h_TxD = start + y_TxD
        found.append({**aux, 'overflow': np.int32(0)})
      answer_BxLxD = h_TxD.reshape(B, L, c.D)
      rule = dict(c.residual)
      if rule['name'] == 'replace':
        x_BxLxD = answer_BxLxD
      elif rule['name'] == 'heavy_ball':
        momentum = 0 if momentum is None else rule['mu'] * momentum
        momentum += rule['gamma'] * answer_BxLxD
        x_BxLxD = x_BxLxD + rule['sign'] * momentum
      else:
        x_BxLxD = x_BxLxD + answer_BxLxD
      depth += 1
  head_DxV = params['embed_VxD'].T if c.tied else params['head_DxV']
  return call(model.norm, x_BxLxD) @ head_DxV, found


_call = jax.jit(lambda module, *args: module(*args))
_context = jax.jit(tiny.ctx)


@jax.jit
def _context_at(ctx, depth, i):
  here = ctx.at(moe_layer=depth)
  return here.replace(key=jax.random.fold_in(here.key, i))


@jax.jit
def _routed(experts, h_TxD, plan):
  rows = sort(plan)
  return combine(experts(dispatch(h_TxD, rows), rows.group_sizes_E), rows, T)


HEAVY = {'name': 'heavy_ball', 'mu': 0.6, 'gamma': 0.8, 'sign': -1.0}
WIRINGS = {
  'plain': {},
  'dense': {'pattern': 'd', 'tied': False},
  'dm in pools of two, first dense, momentum, two iterations': {
    'pattern': 'dm',
    'N': 5,
    'first_dense': 1,
    'layers_per_pool': 2,
    'iterations': 2,
    'residual': HEAVY,
  },
  'md in two pools of two, carried inside, random draws': {
    'pattern': 'md',
    'N': 8,
    'layers_per_pool': 2,
    'iterations': 2,
    'inner_residual': 'add',
    'residual': {'name': 'replace'},
    'router': {'name': 'random', 'k': 2},
  },
  'ddm, inner residual init, shared expert': {
    'pattern': 'ddm',
    'N': 3,
    'iterations': 2,
    'inner_residual': 'init',
    'shared_F': 8,
    'bias': True,
    'activation': 'gelu',
  },
}


PLAIN, DENSE, MOMENTUM, RANDOM, _ = WIRINGS


@functools.cache
def _wired(name):
  """model, params, logits_BxLxV, aux."""
  model = tiny.model(**WIRINGS[name])
  params = tiny.params(model)
  return model, params, *tiny.run(model, params, tiny.batch())


@pytest.mark.parametrize('name', WIRINGS)
def test_scan_is_the_unrolled_loop(name):
  model, params, logits_BxLxV, aux = _wired(name)
  c = model.c
  expected_BxLxV, found = _by_hand(model, params, tiny.batch())
  _assert_close(logits_BxLxV, expected_BxLxV, 1e-5)
  if not c.segments:
    assert aux == [] and found == []
    return
  ((*shape, _),), (aux,) = c.segments, aux
  shape = (*shape, c.iterations)
  expected = jax.tree.map(
    lambda *a: np.stack(a).reshape(*shape, *a[0].shape), *found
  )
  assert jax.tree.structure(aux) == jax.tree.structure(expected)
  _assert_equal(aux['route'], expected['route'])
  _assert_equal(aux['load_E'], expected['load_E'])
  _assert_close(aux['losses'], expected['losses'], 1e-5)


def test_layers_and_iterations_draw_anew():
  (aux,) = _wired(RANDOM)[3]
  routes = aux['route'].reshape(8, -1)
  assert len({tuple(route) for route in routes.tolist()}) == 8


# Reductions.


def test_momentum_without_memory_is_the_plain_rule():
  neutral = {'name': 'heavy_ball', 'mu': 0.0, 'gamma': 1.0, 'sign': 1.0}
  _, params, *expected = _wired(PLAIN)
  found = tiny.run(tiny.model(residual=neutral), params, tiny.batch())
  _assert_equal(found, tuple(expected))


def test_one_expert_for_all_is_a_dense_layer():
  moe = tiny.model(
    E=1, router={'name': 'topk', 'k': 1}, expert_F=24, tied=False
  )
  dense = tiny.model(**WIRINGS[DENSE])
  params = tiny.params(moe)
  layers = jax.tree.map(lambda a: a[:, 0], tiny.segment(params)['moe'])
  layers['feed'] = {'one': tiny.segment(params)['pools']}
  twin = {**params, 'trunk': {'first': layers}}
  assert jax.tree.structure(twin) == jax.tree.structure(tiny.params(dense))
  logits_BxLxV, (aux,) = tiny.run(moe, params, tiny.batch())
  _assert_close(logits_BxLxV, tiny.run(dense, twin, tiny.batch())[0], 1e-6)
  assert not np.asarray(aux['dropped']).any()
  np.testing.assert_allclose(aux['losses']['balance'], 1)
  _assert_equal(aux['entropy'], np.zeros((2, 1, 1), np.float32))


def test_layers_that_share_a_pool_add_their_gradients():
  shared = tiny.model(layers_per_pool=2)
  params = tiny.params(shared)
  apart = tiny.model(E=8)  # as many candidates, but for each layer its own
  swap = functools.partial(jax.tree.map, lambda a: a.swapaxes(0, 1))
  twice = functools.partial(jax.tree.map, lambda a: np.concatenate([a, a]))
  body = tiny.segment(params)
  twin = tiny.with_segment(
    params, {'moe': swap(body['moe']), 'pools': twice(body['pools'])}
  )
  (loss, _), grads = tiny.grads(shared, params, tiny.batch())
  (loss_apart, _), grads_apart = tiny.grads(apart, twin, tiny.batch())
  np.testing.assert_array_equal(loss, loss_apart)
  grads, grads_apart = tiny.segment(grads), tiny.segment(grads_apart)
  _assert_equal(grads['moe'], swap(grads_apart['moe']))
  for name, d in grads_apart['pools'].items():
    # Both layers reach their experts, and the pool gets the sum of both.
    assert np.abs(d).max(axis=(1, 2, 3)).min() > 0
    for e in range(8):
      _assert_close(grads['pools'][name][0, e], d[0, e] + d[1, e], 1e-5)


def _shapes(**changes):
  return jax.tree.map(lambda a: a.shape, models.split(tiny.model(**changes))[0])


def test_expert_parameters_are_counted_once():
  cost = lambda **changes: decoder.cost(tiny.model(N=4, **changes), L)
  plain = cost()['expert_params']
  assert plain == 4 * 4 * 3 * 16 * 8
  for changes in ({'layers_per_pool': 4}, {'iterations': 3}):
    assert cost(**changes)['expert_params'] == plain
  pooled = tiny.segment(_shapes(N=4, layers_per_pool=2, iterations=3))
  assert pooled['pools']['up_ExDxF'] == (2, 8, 16, 8)
  # Every layer and iteration has a router, over all candidates of the pool.
  assert pooled['moe']['feed']['routers']['w_DxE'] == (2, 2, 3, 16, 8)
  routers = tiny.segment(_shapes(N=4))['moe']['feed']['routers']
  assert routers['w_DxE'] == (4, 1, 1, 16, 4)


def test_k_may_exceed_E_where_a_pool_has_more_candidates():
  tiny.model(layers_per_pool=2, router={'name': 'topk', 'k': 6})
  with pytest.raises(ValueError, match=r'k is 6, .* 4 experts'):
    tiny.model(router={'name': 'topk', 'k': 6})


# Rematerialisation.


def test_rematerialisation_changes_no_number():
  """Nor does the CPU's own grouped matmul."""
  model = tiny.model(layers_per_pool=2)
  recomputed = tiny.model(layers_per_pool=2, remat=True, gmm='cpu')
  params, batch = tiny.params(model), tiny.batch()
  (loss, _), grads = tiny.grads(model, params, batch)
  (found_loss, _), found = tiny.grads(recomputed, params, batch)
  np.testing.assert_allclose(found_loss, loss, 1e-6)
  _assert_close(found, grads, 1e-5)


@pytest.mark.parametrize(
  'router',
  [{'name': 'topk', 'k': 2, 'capacity': 1.0}, {'name': 'expert_choice'}],
  ids=lambda router: router['name'],
)
def test_recomputing_never_routes_again(router):
  """Under rematerialisation nothing is chosen or sorted a second time.

  All the rest is; tests/layers/routers_test.py asks the same of every router.
  """
  keep, recompute = (
    _counts(tiny.model(remat=remat, router=router, gmm='cpu'))
    for remat in (False, True)
  )
  assert keep['top_k']
  for name in ('top_k', 'sort'):
    assert recompute[name] == keep[name]
  assert recompute['dot_general'] > keep['dot_general'] > 4


def _counts(model):
  goal = functools.partial(tiny.value_and_grad, model)
  return tiny.primitives(goal, tiny.params(model), tiny.batch())


# Routing replayed, and what it depends on.


def test_a_recorded_routing_is_replayed_through_the_whole_model():
  model, params, logits_BxLxV, (aux,) = _wired(MOMENTUM)
  batch, route = tiny.batch(), [aux['route']]
  again_BxLxV, (again,) = tiny.run(model, params, batch, route)
  _assert_equal((again_BxLxV, again), (logits_BxLxV, aux))
  moved = jax.tree.map(lambda a: 1.5 * a[..., ::-1], params)
  free_BxLxV, (free,) = tiny.run(model, moved, batch)
  assert not np.array_equal(free['route'], aux['route'])
  kept_BxLxV, (kept,) = tiny.run(model, moved, batch, route)
  _assert_equal(kept['route'], aux['route'])
  assert np.abs(kept_BxLxV - free_BxLxV).max() > 1e-3


def _row_by_row(x_MxA, w_ExAxB, group_sizes_E, *, impl):
  """A grouped matmul in which a row's bits do not depend on its place.

  A matrix product may round the rows at the edge of a tile in another way.
  """
  del impl
  row_M = jnp.arange(len(x_MxA), dtype=jnp.int32)
  end_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
  expert_M = jnp.sum((row_M[:, None] >= end_E[None]), axis=1, dtype=jnp.int32)
  w_MxAxB = w_ExAxB.at[expert_M].get(mode='clip')
  return jnp.sum(x_MxA[:, :, None] * w_MxAxB, axis=1)


@pytest.mark.parametrize(
  'router',
  [
    {'name': 'topk', 'k': 2},
    {'name': 'switch', 'capacity': 0.5},
    {'name': 'expert_choice'},
  ],
  ids=lambda router: router['name'],
)
def test_later_tokens_change_nothing_where_a_router_is_causal(
  router, monkeypatch
):
  """All tokens after a place are replaced: no gradient could see a choice."""
  monkeypatch.setattr(ops, 'gmm', _row_by_row)
  model = tiny.fresh(router=router)
  params, batch = tiny.params(model), tiny.batch()
  run = functools.partial(tiny.run, model)
  whole_BxLxV = run(params, batch)[0]
  moved = 0
  for seed in range(1, 5):
    for cut in (3, 7, 12):
      ids_BxL = batch['ids_BxL'].copy()
      ids_BxL[:, cut:] = tiny.batch(seed)['ids_BxL'][:, cut:]
      # One document, so that attention could see a change if it were later.
      other_BxLxV = run(params, {**batch, 'ids_BxL': ids_BxL})[0]
      difference = np.abs(other_BxLxV - whole_BxLxV)
      assert difference[:, cut:].max() > 1e-2
      moved = max(moved, difference[:, :cut].max())
  if model.trunk.body.moe.feed.routers.causal:
    assert moved == 0.0
  else:
    assert moved > 1e-3


# A router with memory over depth.


class Remembering(routers.Router):
  """A toy RMoE: logits are carried upwards through a gate.

  Tokens enter without gradient, so that a gradient from one layer's router to
  another's can only come through memory.
  """

  def __init__(self, D, E, *, k=2, rngs):
    self.k = k
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), (D, E)))
    self.u_ExE = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), (E, E)))

  def memory(self, x_TxD):
    return {'logits': jnp.ones((len(x_TxD), self.w_DxE.shape[1]))}

  def __call__(self, x_TxD, ctx, memory):
    still_TxD = jax.lax.stop_gradient(x_TxD)
    old_TxE = memory['logits']
    new_TxE = routers.logits(still_TxD, self.w_DxE[...])
    gate_TxE = jax.nn.sigmoid(old_TxE @ self.u_ExE[...])
    logits_TxE = gate_TxE * old_TxE + (1 - gate_TxE) * new_TxE
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    expert_TxK = routers.choose(logits_TxE, self.k, ctx)
    gate_TxK = jnp.take_along_axis(probs_TxE, expert_TxK, axis=1)
    decision = by_token(expert_TxK, gate_TxK, probs_TxE.shape[1])
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    aux |= {'old_TxE': old_TxE, 'logits_TxE': logits_TxE}
    return decision, aux, {'logits': logits_TxE}


def test_memory_goes_from_router_to_router(monkeypatch):
  """Two layers in one pool, two iterations each, with dense ones between."""
  get = routers.get
  monkeypatch.setattr(
    routers, 'get', lambda n: Remembering if n == 'toy' else get(n)
  )
  model = tiny.fresh(
    N=4,
    pattern='dm',
    layers_per_pool=2,
    iterations=2,
    remat=True,
    router={'name': 'toy'},
  )

  def last(params):
    _, (aux,) = tiny.forward(model, params, tiny.batch())
    return jnp.sum(aux['logits_TxE'][0, 1, 1]), aux

  grads, aux = jax.jit(jax.grad(last, has_aux=True))(tiny.params(model))
  seen = np.asarray(aux['old_TxE']).reshape(4, T, 8)  # layer 0, 0, 1, 1
  left = np.asarray(aux['logits_TxE']).reshape(4, T, 8)
  _assert_equal(seen[0], np.ones((T, 8), np.float32))
  _assert_equal(seen[1:], left[:-1])
  assert np.abs(np.diff(left, axis=0)).max(axis=(1, 2)).min() > 1e-2
  # A gradient reaches the first router, which can only be through memory.
  d_RxI = np.abs(tiny.segment(grads)['moe']['feed']['routers']['w_DxE'][0]).max(
    axis=(2, 3)
  )
  assert (d_RxI > 1e-4).all()


# Types.


def test_bfloat16_is_close_and_ends_in_float32():
  _, params, logits_BxLxV, (aux,) = _wired(PLAIN)
  low_BxLxV, (low,) = tiny.run(
    tiny.model(dtype='bfloat16'), params, tiny.batch(), [aux['route']]
  )
  assert low_BxLxV.dtype == jnp.float32
  assert jax.tree.map(lambda a: a.dtype, low) == jax.tree.map(
    lambda a: a.dtype, aux
  )
  error = np.abs(low_BxLxV - logits_BxLxV).max() / np.abs(logits_BxLxV).max()
  assert 1e-4 < error < 0.05


def test_float64_agrees():
  _, params, logits_BxLxV, (aux,) = _wired(PLAIN)
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, params)
    high_BxLxV, (high,) = tiny.run(
      tiny.model(dtype='float64'), wide, tiny.batch(), [aux['route']]
    )
    assert high_BxLxV.dtype == high['losses']['z'].dtype == jnp.float64
  _assert_close(np.asarray(logits_BxLxV), np.asarray(high_BxLxV), 1e-5)


def test_grouped_matmuls_agree():
  _, params, logits_BxLxV, _ = _wired(PLAIN)
  found_BxLxV, _ = tiny.run(tiny.model(gmm='cpu'), params, tiny.batch())
  _assert_close(found_BxLxV, logits_BxLxV, 1e-5)


# State, parameters, counts.


def test_state_is_updated_for_every_router():
  router = {'name': 'topk', 'k': 2, 'bias_rate': 0.5}
  model = tiny.model(N=4, layers_per_pool=2, iterations=3, router=router)
  params, state = tiny.params(model), tiny.state(model)
  load = np.random.default_rng(0).integers(0, 9, (2, 2, 3, 8), np.int32)
  update = lambda params, state: models.bind(
    model, params, state
  ).updated_state([{'load_E': load}])
  new = jax.jit(update)(params, state)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  expected = 0.5 * np.sign(load.mean(axis=-1, keepdims=True) - load)
  _assert_equal(jax.tree.leaves(new)[0], expected.astype(np.float32))


def test_without_router_state_there_is_nothing_to_update():
  for changes in ({}, {'pattern': 'd'}):
    model = tiny.model(**changes)
    bound = models.bind(model, tiny.params(model), tiny.state(model))
    assert not jax.tree.leaves(
      bound.updated_state([{'load_E': np.ones((2, 1, 1, 4))}])
    )


def test_split_and_bind_are_inverse():
  router = {'name': 'topk', 'k': 2, 'bias_rate': 0.5}
  model = tiny.model(router=router, tied=False)
  params = tiny.params(model)
  state = jax.tree.map(lambda a: a + 3, tiny.state(model))
  found = models.split(models.bind(model, params, state))
  assert jax.tree.structure(found) == jax.tree.structure((params, state))
  _assert_equal(found, (params, state))


def test_a_stack_is_made_of_different_modules():
  make = lambda rngs: Remembering(3, 2, rngs=rngs)

  @jax.jit
  def stack():
    stacked = blocks.stack(make, (2, 3), nnx.Rngs(0))
    last = blocks.at(blocks.at(stacked, 1), 2)
    return stacked.w_DxE[...], last.w_DxE[...]

  stacked, last = jax.device_get(stack())
  assert stacked.shape == (2, 3, 3, 2)
  assert len(np.unique(stacked.reshape(6, 6), axis=0)) == 6
  np.testing.assert_array_equal(last, stacked[1, 2])


def test_projections_into_the_stream_start_smaller_the_deeper_the_model():
  changes = {'N': 8, 'layers_per_pool': 2}

  @jax.jit  # of which only these are made
  def init():
    rngs = nnx.Rngs(jax.random.key(0, impl='rbg'))  # compiles fast
    model = decoder.build(tiny.config(**changes), parallel.Layout(), rngs=rngs)
    body = model.trunk.body
    pools, attention = body.pools, body.moe.attention
    return [
      a[...]
      for a in (
        *(pools.up_ExDxF, pools.down_ExFxD),
        *(attention.query_DxHxS, attention.out_HxSxD),
        model.norm.scale_D,
      )
    ]

  up, down, query, out, scale_D = jax.device_get(init())
  shapes = tiny.segment(_shapes(**changes))
  assert up.shape == shapes['pools']['up_ExDxF']
  assert out.shape == shapes['moe']['attention']['out_HxSxD']
  std = lambda a, inputs: float(np.std(a)) * inputs**0.5
  assert std(up, 16) == pytest.approx(1, rel=0.1)
  assert std(query, 16) == pytest.approx(1, rel=0.1)
  assert std(down, 8) == pytest.approx(0.25, rel=0.1)
  assert std(out, 16) == pytest.approx(0.25, rel=0.1)
  assert (scale_D == 1).all()


def test_cost_by_hand():
  model = tiny.model(
    N=7,
    first_dense=1,
    pattern='dm',
    layers_per_pool=3,
    iterations=2,
    shared_F=10,
    tied=False,
  )
  D, F = 16, 24
  attention = D * D + 2 * D * 8 + D * D  # one key-value head of size 8
  dense = attention + 2 * D + 3 * D * F
  expert, shared, router = 3 * D * 8, 3 * D * 10, D * 12
  moe = attention + 2 * D + 2 * router + shared
  rest = 2 * V * D + D + 4 * dense + 3 * moe
  cost = decoder.cost(model, L)
  assert cost['expert_params'] == 12 * expert
  assert cost['params_total'] == rest + 12 * expert
  active = rest + 3 * 2 * 2 * expert + 3 * shared
  assert cost['params_active'] == active
  # A token meets (L + 1) / 2 keys and values; forward is 2 of the 6.
  attended = 7 * 2 * (L + 1) / 2 * D
  assert cost['flops_per_token'] == 6 * (active - V * D + attended)


def test_a_dense_model_is_all_active():
  cost = decoder.cost(tiny.model(pattern='d'), L)
  assert cost['expert_params'] == 0
  assert cost['params_active'] == cost['params_total']


# What cannot be built.


@pytest.mark.parametrize(
  'changes, told',
  [
    ({'E': 0}, 'E=0'),
    ({'iterations': 0}, 'iterations=0'),
    ({'shared_F': -1}, 'shared_F=-1'),
    ({'H': 3}, r'H \(3\) .* D \(16\)'),
    (
      {'H': 4, 'attention': {'name': 'gqa', 'num_kv_heads': 3}},
      r'num_kv_heads \(3\) .* H \(4\)',
    ),
    ({'D': 6}, 'D=6 .* H=2 .* 3'),
    ({'pattern': 'dx'}, "'dx'"),
    ({'pattern': 'mm'}, "'mm'"),
    ({'pattern': ''}, "pattern=''"),
    ({'first_dense': 3}, 'first_dense=3 .* N=2'),
    ({'N': 3, 'pattern': 'dm'}, r'pattern \(2\) .* \(3\)'),
    ({'N': 3, 'layers_per_pool': 2}, r'layers_per_pool \(2\) .* \(3\)'),
    ({'activation': 'tanh'}, "'tanh'; there are swiglu"),
    ({'dtype': 'float8'}, "'float8'; there are float32"),
    ({'block': 'past'}, "'past'; there are momentum_lm"),
    ({'inner_residual': 'sum'}, "'sum'; there are replace"),
    ({'residual': {'name': 'eve'}}, "'eve'; there are adam"),
    (
      {'inner_residual': 'add', 'residual': HEAVY},
      "'add' with residual 'heavy_ball'",
    ),
    (
      {'inner_residual': 'init', 'residual': HEAVY},
      "'init' with residual 'heavy_ball'",
    ),
    ({'router': {'name': 'best'}}, "'best'; there are expert_choice"),
  ],
)
def test_what_cannot_be_built_is_told_in_one_line(changes, told):
  with pytest.raises(ValueError, match=told) as raised:
    tiny.model(**changes)
  assert '\n' not in str(raised.value)


def test_models_are_found_by_their_file():
  assert models.get('decoder') is decoder
  with pytest.raises(
    ValueError, match="'encoder'; there are classifier, decoder"
  ):
    models.get('encoder')
