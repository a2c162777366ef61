"""The decoder: every seam, in small non-plain values, against plain loops."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import B, L, T, V

from moe_jax import attention, block, models, ops, parallel, routers
from moe_jax.models import decoder
from moe_jax.plan import by_token, combine, dispatch, sort


def _value_and_grad(model):
  return jax.value_and_grad(functools.partial(tiny.loss, model), has_aux=True)


def _grads(model, params):
  """(loss, gradients) of the standard batch."""
  (loss, _), grads = jax.jit(_value_and_grad(model))(params, tiny.batch())
  return jax.device_get((loss, grads))


@functools.cache
def _plain():
  """The model that most variants are neutral to, its parameters."""
  model = tiny.model()
  return model, tiny.params(model)


@functools.cache
def _plain_grads():
  return _grads(*_plain())


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _assert_close(a, b, tolerance):
  """Each array, relative to its own largest value."""

  def one(a, b):
    np.testing.assert_allclose(a, b, 0, tolerance * np.abs(b).max() + 1e-30)

  jax.tree.map(one, a, b)


# Loops by hand.


def _by_hand(model, params, batch):
  """logits_BxLxV and the aux of each iteration in each layer."""
  c = model.c
  model = models.bind(model, params, tiny.state(model))
  ctx, segment_BxL = tiny.ctx(batch), batch['segment_BxL']
  view = attention.View(segment_BxL, segment_BxL, causal=True)
  x_BxLxD = model.embed_VxD[...][batch['ids_BxL']]
  found, depth, momentum = [], 0, None

  def dense(layer, x_BxLxD):
    x_BxLxD += layer.attention(layer.norm_attention(x_BxLxD), view)
    h_TxD = layer.norm_feed(x_BxLxD).reshape(T, c.D)
    return x_BxLxD + layer.feed(h_TxD).reshape(B, L, c.D)

  for n in range(c.first):
    x_BxLxD = dense(block.at(model.trunk.first, n), x_BxLxD)
  places = [
    (body, g, r)
    for body in model.trunk.segments().values()
    for g in range(body.G)
    for r in range(body.R)
  ]
  for body, g, r in places:
    experts = block.at(body.pools, g)
    at = lambda stacked, g=g, r=r: block.at(block.at(stacked, g), r)
    d = 0
    for kind in c.pattern:
      if kind == 'd':
        x_BxLxD, d = dense(block.at(at(body.dense), d), x_BxLxD), d + 1
        continue
      layer = at(body.moe)
      x_BxLxD += layer.attention(layer.norm_attention(x_BxLxD), view)
      h_TxD = h0_TxD = layer.norm_feed(x_BxLxD).reshape(T, c.D)
      for i in range(c.iterations):
        here = ctx.at_depth(jnp.int32(depth), None)
        here = here.replace(key=jax.random.fold_in(here.key, i))
        plan, aux, _ = block.at(layer.feed.routers, i)(h_TxD, here, ())
        rows = sort(plan)
        y_TxD = experts(dispatch(h_TxD, rows), rows.group_E)
        y_TxD = combine(y_TxD, rows, T)
        if c.shared_F:
          y_TxD += layer.feed.shared(h_TxD)
        start = {'replace': 0, 'add': h_TxD, 'init': h0_TxD}[c.link]
        h_TxD = start + y_TxD
        found.append({**aux, 'lost': jnp.int32(0)})
      answer_BxLxD = h_TxD.reshape(B, L, c.D)
      rule = dict(c.residual)
      if rule['name'] == 'replace':
        x_BxLxD = answer_BxLxD
      elif rule['name'] == 'heavy_ball':
        momentum = 0 if momentum is None else rule['mu'] * momentum
        momentum += rule['gamma'] * answer_BxLxD
        x_BxLxD += rule['sign'] * momentum
      else:
        x_BxLxD += answer_BxLxD
      depth += 1
  head_DxV = model.embed_VxD[...].T if c.tied else model.head_DxV[...]
  return model.norm(x_BxLxD) @ head_DxV, found


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
  'md, carried by the link': {
    'pattern': 'md',
    'N': 4,
    'iterations': 2,
    'link': 'add',
    'residual': {'name': 'replace'},
  },
  'ddm, link init, shared expert': {
    'pattern': 'ddm',
    'N': 3,
    'iterations': 2,
    'link': 'init',
    'shared_F': 8,
    'bias': True,
    'activation': 'gelu',
  },
  'random draws': {
    'iterations': 2,
    'layers_per_pool': 2,
    'router': {'name': 'random', 'k': 2},
  },
}


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
  by_hand = jax.jit(functools.partial(_by_hand, model))
  expected_BxLxV, found = by_hand(params, tiny.batch())
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
  (aux,) = _wired('random draws')[3]
  routes = np.asarray(aux['route']).reshape(4, -1)
  assert len({tuple(route) for route in routes.tolist()}) == 4


# Reductions.


def test_momentum_without_memory_is_the_plain_rule():
  neutral = {'name': 'heavy_ball', 'mu': 0.0, 'gamma': 1.0, 'sign': 1.0}
  params = _plain()[1]
  a, b = (
    tiny.run(m, params, tiny.batch())
    for m in (tiny.model(residual=neutral), tiny.model())
  )
  _assert_equal(a, b)
  # What is computed again for the gradient is fused and rounded otherwise.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  found = _grads(tiny.model(residual=neutral), params)
  jax.tree.map(close, found, _plain_grads())


def test_with_one_iteration_two_links_are_one():
  params = tiny.params(tiny.model())
  a, b = (
    tiny.run(tiny.model(link=link), params, tiny.batch())
    for link in ('add', 'init')
  )
  _assert_equal(a, b)


def test_one_expert_for_all_is_a_dense_layer():
  moe = tiny.model(E=1, router={'name': 'topk', 'k': 1}, expert_F=24)
  dense = tiny.model(pattern='d', F=24)
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
  loss, grads = _grads(shared, params)
  loss_apart, grads_apart = _grads(apart, twin)
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
  loss, grads = _plain_grads()
  found_loss, found = _grads(tiny.model(remat=True), _plain()[1])
  np.testing.assert_allclose(found_loss, loss, 1e-6)
  _assert_close(found, grads, 1e-5)


@pytest.mark.parametrize(
  'router',
  [
    {'name': 'topk', 'k': 2},
    {'name': 'topk', 'k': 2, 'capacity': 1.0},
    {'name': 'switch'},
    {'name': 'expert_choice'},
    {'name': 'random', 'k': 2},
  ],
  ids=lambda router: '-'.join(str(v) for v in router.values()),
)
def test_recomputing_never_routes_again(router):
  """Under rematerialisation nothing is chosen or sorted a second time."""
  keep, recompute = (
    _choices(tiny.model(N=2, pattern='m', remat=remat, router=router))
    for remat in (False, True)
  )
  assert keep and recompute == keep


def _choices(model):
  """How many top_k and sort there are in a gradient's program."""
  params, batch = tiny.params(model), tiny.batch()
  jaxpr = jax.make_jaxpr(_value_and_grad(model))(params, batch)
  names = collections.Counter(_primitives(jaxpr.jaxpr))
  assert names['dot_general'] > 4
  return {n: names[n] for n in ('top_k', 'sort') if names[n]}


def _primitives(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=_is_jaxpr
    ):
      if _is_jaxpr(inner):
        yield from _primitives(getattr(inner, 'jaxpr', inner))


def _is_jaxpr(x):
  return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')


def test_rematerialisation_recomputes_the_rest():
  count = lambda model: collections.Counter(
    _primitives(
      jax.make_jaxpr(_value_and_grad(model))(
        tiny.params(model), tiny.batch()
      ).jaxpr
    )
  )['dot_general']
  assert count(tiny.model(remat=True)) > count(tiny.model())


# Routing replayed, and what it depends on.


def test_a_recorded_routing_is_replayed_through_the_whole_model():
  model = tiny.model(iterations=2, layers_per_pool=2)
  params, batch = tiny.params(model), tiny.batch()
  run = jax.jit(functools.partial(tiny.forward, model))
  logits_BxLxV, (aux,) = run(params, batch)
  again_BxLxV, (again,) = run(params, batch, [aux['route']])
  _assert_equal((again_BxLxV, again), (logits_BxLxV, aux))
  moved = jax.tree.map(lambda a: 1.5 * a[..., ::-1], params)
  free = run(moved, batch)[1][0]['route']
  assert not np.array_equal(free, aux['route'])
  kept_BxLxV, (kept,) = run(moved, batch, [aux['route']])
  _assert_equal(kept['route'], aux['route'])
  assert np.abs(kept_BxLxV - run(moved, batch)[0]).max() > 1e-3


def _row_by_row(x_MxA, w_ExAxB, group_E, *, impl):
  """A grouped matmul in which a row's bits do not depend on its place.

  A matrix product may round the rows at the edge of a tile in another way.
  """
  del impl
  row_M = jnp.arange(len(x_MxA), dtype=jnp.int32)
  end_E = jnp.cumsum(group_E, dtype=jnp.int32)
  expert_M = jnp.sum((row_M[:, None] >= end_E[None]), axis=1, dtype=jnp.int32)
  w_MxAxB = w_ExAxB.at[expert_M].get(mode='clip')
  return jnp.sum(x_MxA[:, :, None] * w_MxAxB, axis=1)


@pytest.mark.parametrize(
  'router',
  [
    {'name': 'topk', 'k': 2},
    {'name': 'random', 'k': 2},
    {'name': 'switch', 'capacity': 0.5},
    {'name': 'topk', 'k': 2, 'capacity': 0.5},
    {'name': 'expert_choice'},
  ],
  ids=lambda router: '-'.join(str(v) for v in router.values()),
)
def test_later_tokens_change_nothing_where_a_router_is_causal(
  router, monkeypatch
):
  """All tokens after a place are replaced: no gradient could see a choice."""
  monkeypatch.setattr(ops, 'gmm', _row_by_row)
  model = tiny.model(router=router)
  params = tiny.params(model)
  run = jax.jit(functools.partial(tiny.forward, model))
  batch = tiny.batch()
  whole_BxLxV = np.array(run(params, batch)[0])
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


@pytest.fixture
def remembering(monkeypatch):
  """A model of two layers in one pool, two iterations each, dense between."""
  get = routers.get
  monkeypatch.setattr(
    routers, 'get', lambda n: Remembering if n == 'toy' else get(n)
  )
  return tiny.model(
    N=4,
    pattern='dm',
    layers_per_pool=2,
    iterations=2,
    remat=True,
    router={'name': 'toy'},
  )


def test_memory_goes_from_router_to_router(remembering):
  params, batch = tiny.params(remembering), tiny.batch()
  _, (aux,) = tiny.run(remembering, params, batch)
  seen = np.asarray(aux['old_TxE']).reshape(4, T, 8)  # layer 0, 0, 1, 1
  left = np.asarray(aux['logits_TxE']).reshape(4, T, 8)
  _assert_equal(seen[0], np.ones((T, 8), np.float32))
  _assert_equal(seen[1:], left[:-1])
  assert np.abs(np.diff(left, axis=0)).max(axis=(1, 2)).min() > 1e-2


def test_a_gradient_reaches_the_first_router_through_memory(remembering):
  def last(params):
    _, (aux,) = tiny.forward(remembering, params, tiny.batch())
    return jnp.sum(aux['logits_TxE'][0, 1, 1])

  grads = jax.jit(jax.grad(last))(tiny.params(remembering))
  d_RxI = np.abs(tiny.segment(grads)['moe']['feed']['routers']['w_DxE'][0]).max(
    axis=(2, 3)
  )
  assert (d_RxI > 1e-4).all()


# Types.


@functools.cache
def _routed():
  return tiny.run(*_plain(), tiny.batch())


def test_bfloat16_is_close_and_ends_in_float32():
  logits_BxLxV, (aux,) = _routed()
  low_BxLxV, (low,) = tiny.run(
    tiny.model(dtype='bfloat16'), _plain()[1], tiny.batch(), [aux['route']]
  )
  assert low_BxLxV.dtype == jnp.float32
  assert jax.tree.map(lambda a: a.dtype, low) == jax.tree.map(
    lambda a: a.dtype, aux
  )
  error = np.abs(low_BxLxV - logits_BxLxV).max() / np.abs(logits_BxLxV).max()
  assert 1e-4 < error < 0.05


def test_float64_agrees():
  logits_BxLxV, (aux,) = _routed()
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, _plain()[1])
    high_BxLxV, (high,) = tiny.run(
      tiny.model(dtype='float64'), wide, tiny.batch(), [aux['route']]
    )
    assert high_BxLxV.dtype == high['losses']['z'].dtype == jnp.float64
  _assert_close(np.asarray(logits_BxLxV), np.asarray(high_BxLxV), 1e-5)


def test_grouped_matmuls_agree():
  logits_BxLxV, _ = _routed()
  _assert_close(
    tiny.run(tiny.model(gmm='xla'), _plain()[1], tiny.batch())[0],
    logits_BxLxV,
    1e-5,
  )


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
  stacked = block.stack(make, (2, 3), nnx.Rngs(0))
  assert stacked.w_DxE.shape == (2, 3, 3, 2)
  w = np.asarray(stacked.w_DxE[...]).reshape(6, 6)
  assert len(np.unique(w, axis=0)) == 6
  last = block.at(block.at(stacked, 1), 2)
  np.testing.assert_array_equal(last.w_DxE[...].reshape(-1), w[5])


def test_projections_into_the_stream_start_smaller_the_deeper_the_model():
  def init():
    rngs = nnx.Rngs(jax.random.key(0, impl='rbg'))  # compiles fast
    c = tiny.config(N=8, layers_per_pool=2)
    return models.split(decoder.build(c, parallel.Layout(), rngs=rngs))[0]

  params = jax.device_get(jax.jit(init)())
  assert jax.tree.map(np.shape, params) == _shapes(N=8, layers_per_pool=2)
  body = tiny.segment(params)
  projections = body['moe']['attention']
  std = lambda a, inputs: float(np.std(a)) * inputs**0.5
  assert std(body['pools']['up_ExDxF'], 16) == pytest.approx(1, rel=0.1)
  assert std(projections['query_DxHxS'], 16) == pytest.approx(1, rel=0.1)
  assert std(body['pools']['down_ExFxD'], 8) == pytest.approx(0.25, rel=0.1)
  assert std(projections['out_HxSxD'], 16) == pytest.approx(0.25, rel=0.1)
  assert (params['norm']['scale_D'] == 1).all()


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
    ({'H': 4, 'attention': {'name': 'rotary', 'J': 3}}, r'J \(3\) .* H \(4\)'),
    ({'D': 6}, 'D=6 .* H=2 .* 3'),
    ({'pattern': 'dx'}, "'dx'"),
    ({'pattern': 'mm'}, "'mm'"),
    ({'pattern': ''}, "pattern=''"),
    ({'first_dense': 3}, 'first_dense=3 .* N=2'),
    ({'N': 3, 'pattern': 'dm'}, r'pattern \(2\) .* \(3\)'),
    ({'N': 3, 'layers_per_pool': 2}, r'layers_per_pool \(2\) .* \(3\)'),
    ({'activation': 'tanh'}, "'tanh'; there are swiglu"),
    ({'dtype': 'float8'}, "'float8'; there are float32"),
    ({'block': 'past'}, "'past'; there are pre"),
    ({'link': 'sum'}, "'sum'; there are replace"),
    ({'residual': {'name': 'eve'}}, "'eve'; there are plain"),
    ({'link': 'add', 'residual': HEAVY}, "'add' with residual 'heavy_ball'"),
    ({'link': 'init', 'residual': HEAVY}, "'init' with residual 'heavy_ball'"),
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
