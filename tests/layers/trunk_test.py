"""Layers: reductions to what is already known, ragged ends, crossings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import blocks, models, objectives, parallel, routers, trunk
from tests.helpers import tiny
from tests.helpers.tiny import B, L, V


def _logits(params, **changes):
  return tiny.run(tiny.model(**changes), params, tiny.batch())[0]


def _grown(tree, key, change):
  """The tree with change(value) for every parameter of that name."""
  return jax.tree_util.tree_map_with_path(
    lambda path, a: change(a) if path[-1].key == key else a, tree
  )


# What a neutral setting must equal, bit for bit.


@pytest.mark.parametrize('routing', ['shared', 'once'])
def test_one_iteration_knows_no_routing(routing):
  params = tiny.params(tiny.model())
  found = _logits(params, routing=routing)
  np.testing.assert_array_equal(found, _logits(params))


CARRIED = {
  'iterations': 2,
  'inner_residual': 'add',
  'residual': {'name': 'replace'},
}


def test_a_shared_router_is_two_equal_ones():
  """Asked again, it sees the first answer; asked once, it does not."""
  params = tiny.params(tiny.model(**CARRIED))
  equal = _grown(params, 'w_DxE', lambda a: np.repeat(a[:, :, :1], 2, axis=2))
  one = _grown(params, 'w_DxE', lambda a: a[:, :, :1])
  shared = _logits(one, routing='shared', **CARRIED)
  np.testing.assert_array_equal(shared, _logits(equal, **CARRIED))
  assert np.abs(shared - _logits(one, routing='once', **CARRIED)).max() > 1e-3


def test_routed_once_every_iteration_has_the_first_plan():
  model = tiny.model(routing='once', **CARRIED)
  params = tiny.params(model)
  logits_BxLxV, (aux,) = tiny.run(model, params, tiny.batch())
  assert aux['route'].shape[:3] == (2, 1, 1)
  shared = tiny.model(routing='shared', **CARRIED)
  replay = [np.repeat(aux['route'], 2, axis=2)]
  # The plan is kept with its gates, which a router asked again would change.
  again_BxLxV, _ = tiny.run(shared, params, tiny.batch(), replay)
  assert np.abs(again_BxLxV - logits_BxLxV).max() > 1e-4


def test_a_learned_link_starts_as_one_iteration():
  params = tiny.params(tiny.model())
  grown = tiny.params(tiny.model(iterations=2, inner_residual='upcycle'))
  grown = _grown(grown, 'scale_I', np.zeros_like)
  # The last of the two routers is the one that is left.
  last = _grown(grown, 'w_DxE', lambda a: a[:, :, 1:])
  body = last['trunk']['body']
  body['moe']['feed'].pop('scale_I')
  assert jax.tree.structure(last) == jax.tree.structure(params)
  found = _logits(grown, iterations=2, inner_residual='upcycle')
  np.testing.assert_array_equal(found, _logits(last))
  moved = _grown(grown, 'scale_I', np.ones_like)
  moved_BxLxV = _logits(moved, iterations=2, inner_residual='upcycle')
  assert np.abs(moved_BxLxV - found).max() > 1e-3


def test_without_a_rate_nothing_is_dropped():
  model = tiny.model(dropout=0.5)
  params = tiny.params(model)
  run = jax.jit(
    lambda params, key, train: models.bind(model, params, {})(
      tiny.batch(),
      routers.context(tiny.batch(), jax.random.key(key), 3, train=train),
    )[0],
    static_argnums=2,
  )
  plain = _logits(params)
  np.testing.assert_array_equal(run(params, 0, False), plain)
  one, other = run(params, 0, True), run(params, 1, True)
  assert np.abs(one - plain).max() > 1e-2 < np.abs(one - other).max()


def test_dropout_keeps_the_mean_and_differs_by_token_and_place():
  ctx = routers.context(tiny.batch(), jax.random.key(0), 3, train=True)
  ones_TxD = jnp.ones((B * L, 64))
  a, b = (np.asarray(blocks.drop(ones_TxD, 0.25, ctx, n)) for n in (0, 1))
  assert set(np.unique(a)) == {0, np.float32(1 / 0.75)}
  assert a.mean() == pytest.approx(1, abs=0.06)
  assert len(np.unique(a, axis=0)) == B * L and (a != b).mean() > 0.2


# Ragged ends.


def test_a_ragged_pool_is_a_pool_of_fewer_layers():
  """Five layers in pools of two: the last is alone, with a narrower router."""
  changes = {'N': 5, 'layers_per_pool': 2, 'ragged_pool': True}
  model = tiny.model(**changes)
  params = tiny.params(model)
  shapes = jax.tree.map(np.shape, params['trunk'])
  assert shapes['body']['pools']['up_ExDxF'] == (2, 8, 16, 8)
  assert shapes['ragged']['pools']['up_ExDxF'] == (1, 4, 16, 8)
  routers_shape = shapes['ragged']['moe']['feed']['routers']['w_DxE']
  assert routers_shape == (1, 1, 1, 16, 4)
  logits_BxLxV, aux = tiny.run(model, params, tiny.batch())
  assert [a['load_E'].shape for a in aux] == [(2, 2, 1, 8), (1, 1, 1, 4)]
  # The same as four layers, and then one more on their stream.
  four = tiny.model(N=4, layers_per_pool=2)
  body = {**params, 'trunk': {'body': params['trunk']['body']}}
  _, (same,) = tiny.run(four, body, tiny.batch())
  np.testing.assert_array_equal(same['route'], aux[0]['route'])
  routes = [a['route'] for a in aux]
  again_BxLxV, _ = tiny.run(model, params, tiny.batch(), routes)
  np.testing.assert_array_equal(again_BxLxV, logits_BxLxV)


def test_state_of_a_ragged_pool_is_updated():
  router = {'name': 'topk', 'k': 2, 'bias_rate': 0.5}
  changes = {'N': 3, 'layers_per_pool': 2, 'ragged_pool': True}
  model = tiny.model(router=router, **changes)
  params, state = tiny.params(model), tiny.state(model)
  loads = [np.arange(16).reshape(1, 2, 1, 8), np.arange(4).reshape(1, 1, 1, 4)]
  bound = models.bind(model, params, state)
  new = bound.updated_state([{'load_E': jnp.int32(load)} for load in loads])
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for name, load in zip(('body', 'ragged'), loads, strict=True):
    (bias,) = jax.tree.leaves(new['trunk'][name])
    expected = 0.5 * np.sign(load.mean(axis=-1, keepdims=True) - load)
    np.testing.assert_array_equal(bias, expected)


# A cache.


def test_two_blocks_with_a_cache_are_one_long_block():
  model = tiny.model(
    N=3,
    first_dense=1,
    attention={'name': 'adaptive_span', 'span': 5},
    block='momentum_lm',
    norm='layer',
  )
  params, batch = jax.tree.map(jnp.asarray, tiny.params(model)), tiny.batch()
  bound = models.bind(model, params, {})
  ids_Bx2L = np.concatenate([batch['ids_BxL'], batch['target_BxL']], axis=1)
  zeros = np.zeros_like(ids_Bx2L)

  def run(ids_BxL, cache):
    n = ids_BxL.shape[1]
    batch = {
      'ids_BxL': ids_BxL,
      'segment_BxL': zeros[:, :n],
      'pos_BxL': zeros[:, :n],
      'row_B': np.arange(B, dtype=np.int32),
    }
    ctx = routers.context(batch, jax.random.key(0), 0, train=False)
    return bound.forward_with_cache(batch, ctx, cache)

  blank = bound.init_stream_cache(B)
  assert blank.shape == (3, B, 5, 16)
  whole, _, last = jax.jit(run)(ids_Bx2L, blank)
  first, _, cache = jax.jit(run)(ids_Bx2L[:, :L], blank)
  second, _, again = jax.jit(run)(ids_Bx2L[:, L:], cache)
  both = np.concatenate([first, second], axis=1)
  np.testing.assert_allclose(both, whole, atol=2e-5)
  np.testing.assert_allclose(again, last, atol=2e-5)
  alone, _, _ = jax.jit(run)(ids_Bx2L[:, L:], blank)
  assert np.abs(alone - second).max() > 1e-2


def test_only_raw_attention_has_a_cache():
  span = {'name': 'adaptive_span', 'span': 5}
  assert tiny.model().init_stream_cache(B) is None
  assert (
    tiny.model(attention=span).init_stream_cache(B) is None
  )  # reads what is normed
  assert (
    tiny.model(attention=span, block='post').init_stream_cache(B) is not None
  )


# Crossings: two systems in one model are config lines.

REUSED = {
  'N': 4,
  'layers_per_pool': 2,
  'router': {'name': 'rexmoe', 'k': 2, 'first': 4},
}
CROSSINGS = {
  'ReXMoE + CoE': {**REUSED, **CARRIED},
  'ReXMoE + CoE + momentum': {
    **REUSED,
    'iterations': 2,
    'residual': {'name': 'heavy_ball', 'mu': 0.7},
  },
  'latent attention + THOR + ReXMoE + robust': {
    **REUSED,
    'router': {'name': 'random', 'per': 'batch'},
    'attention': {
      'name': 'mla',
      'nope': 8,
      'rope': 4,
      'value': 8,
      'rank': 8,
    },
    'residual': {'name': 'robust'},
  },
}


@pytest.mark.parametrize('name', CROSSINGS)
def test_crossings_train(name):
  """Every parameter that a token can reach has a finite, non-zero gradient."""
  model = tiny.model(**CROSSINGS[name])
  _, grads = tiny.grads(model, tiny.params(model), tiny.batch())
  for path, d in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(d).all() and np.abs(d).max() > 0, path


@pytest.mark.parametrize(
  'rule', [{'name': 'adam', 'layers': 'all'}, {'name': 'complex'}]
)
def test_other_rules_cross_too(rule):
  """Their gradients are those of tests/layers/residual_test.py."""
  model = tiny.model(**REUSED, residual=rule)
  params = tiny.params(model)
  found = tiny.run(model, params, tiny.batch())[0]
  assert np.isfinite(found).all()
  assert np.abs(found - _logits(params, **REUSED)).max() > 1e-3


@pytest.mark.parametrize('rule', ['heavy_ball', 'adam', 'robust', 'complex'])
@pytest.mark.parametrize('link', ['add', 'init', 'upcycle'])
def test_two_carriers_of_one_residual_are_refused(rule, link):
  with pytest.raises(ValueError, match=f'{link}.*{rule}.*momentum'):
    tiny.model(iterations=2, inner_residual=link, residual={'name': rule})


def test_thor_with_one_expert_is_twice_the_plain_objective():
  """Without dropout its two passes are equal: R-Drop's regulariser is 0.

  The slopes are then those of tests/layers/objective_test.py.
  """
  router = {'name': 'random', 'per': 'batch'}
  model = tiny.model(E=1, router=router)
  params, batch = tiny.params(model), tiny.batch()

  @jax.jit
  def run(params, pass_):
    ctx = routers.context(batch, jax.random.key(0), 0, train=True, pass_=pass_)
    return models.bind(model, params, {})(batch, ctx)

  forward = lambda batch, pass_: run(params, np.int32(pass_))
  plain = objectives.objective('next_token')(losses={})
  thor = objectives.objective('consistency')(
    losses={}, alpha=5.0, smoothing=0.0
  )
  np.testing.assert_array_equal(
    2 * plain(forward, batch)[0], thor(forward, batch)[0]
  )


def test_a_block_that_cannot_cross_says_so():
  c = tiny.config(block='momentum_lm')
  with pytest.raises(ValueError, match=r"'momentum_lm'.*post, pre"):
    trunk.Trunk(c, parallel.Layout(), cross=True, rngs=nnx.Rngs(0))


def test_logits_have_the_vocabulary():
  model = tiny.model(tied=False, bias=True)
  forward = functools.partial(tiny.forward, model)
  logits_BxLxV, _ = jax.eval_shape(forward, tiny.params(model), tiny.batch())
  assert logits_BxLxV.shape == (B, L, V)
