"""V-MoE's router: noise, capacities, and losses of each group."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routers
from moe_jax.routers import vmoe
from tests.helpers import oracle

B, L, D, E, K = 2, 12, 8, 4, 2
T = B * L


def _ctx(*, train=True, rows=B):
  batch = {
    'ids_BxL': np.zeros((rows, L), np.int32),
    'pos_BxL': np.zeros((rows, L), np.int32),
    'row_B': np.arange(rows, dtype=np.int32),
  }
  return routers.context(batch, jax.random.key(0), 0, train=train).at(
    moe_layer=jnp.int32(0)
  )


def _router(scale=1.0, **options):
  router = vmoe.Router(D, E, rngs=nnx.Rngs(0), **{'k': K, **options})
  w_DxE = scale * np.random.default_rng(1).normal(size=(D, E))
  router.w_DxE[...] = jnp.asarray(w_DxE, jnp.float32)
  return router


def _routed(router, ctx, rows=B):
  route = jax.jit(lambda x_TxD, ctx: router(x_TxD, ctx, ())[:2])
  return route(_x(rows), ctx)


def _x(rows=B):
  x_TxD = np.random.default_rng(0).normal(size=(rows * L, D))
  x_TxD[:, 0] += 2  # most tokens like the same expert
  return jnp.asarray(x_TxD, jnp.float32)


def _logits(router):
  return np.float64(_x()) @ np.float64(router.w_DxE[...])


def _noise(ctx, scale):
  draw = lambda key: jax.random.normal(key, (E,))
  return scale * np.float64(jax.vmap(draw)(ctx.token_keys()))


@pytest.mark.parametrize('factor, rows', [(0.4, 4), (0.8, 8)])
@pytest.mark.parametrize('train', [True, False])
def test_gates_are_probabilities_over_all_experts(train, factor, rows):
  used, other = 'capacity', 'eval_capacity'
  if not train:
    used, other = other, used
  router = _router(noise=0.0, **{used: factor, other: 4.0})
  plan, aux = _routed(router, _ctx(train=train))
  probs_TxE = oracle.softmax(_logits(router))
  expert_TxK = np.array([oracle.best(probs_E, K) for probs_E in probs_TxE])
  np.testing.assert_array_equal(aux['route'], expert_TxK)
  kept_TxK = oracle.keep(expert_TxK, E, rows, L)
  assert 0 < (kept_TxK == E).sum() == round(float(aux['dropped']) * T * K)
  gate_TxE, found_TxE = np.zeros((T, E + 1)), np.zeros((T, E + 1))
  gate_TxK = np.take_along_axis(probs_TxE, expert_TxK, axis=1)
  np.put_along_axis(gate_TxE, kept_TxK, gate_TxK, axis=1)
  np.put_along_axis(found_TxE, plan.expert_TxK, plan.gate_TxK, axis=1)
  np.testing.assert_allclose(found_TxE[:, :E], gate_TxE[:, :E], 1e-5)


@pytest.mark.parametrize(
  'factor, group, rows',
  [(1.05, 12, 8), (1.0, 8, 4), (1.05, 8, 8), (0.1, 12, 4), (4.0, 12, 24)],
)
def test_rows_of_an_expert(factor, group, rows):
  assert _router(capacity=factor)._rows(group, E, train=True) == rows
  assert _router(eval_capacity=factor)._rows(group, E, train=False) == rows
  assert _router(capacity=None)._rows(group, E, train=True) is None


def test_noise_is_a_part_of_an_expert_and_of_training_alone():
  rows = 50
  router = _router(0.0, k=E, noise=2.0, capacity=None, eval_capacity=None)
  plan, _ = _routed(router, _ctx(rows=rows), rows)
  gate_TxE = np.zeros((rows * L, E))
  np.put_along_axis(gate_TxE, plan.expert_TxK, plan.gate_TxK, axis=1)
  draw_TxE = np.log(gate_TxE) - np.log(gate_TxE).mean(1, keepdims=True)
  expected = 2 / E * math.sqrt((E - 1) / E)  # with each token's mean taken off
  assert float(draw_TxE.std()) == pytest.approx(expected, 0.05)
  plan, _ = _routed(router, _ctx(rows=rows, train=False), rows)
  np.testing.assert_allclose(plan.gate_TxK, 1 / E, 1e-6)


def test_the_choice_is_of_the_noisy_scores():
  router, ctx = _router(0.1, noise=2.0, capacity=None), _ctx()
  noisy_TxE = _logits(router) + _noise(ctx, 2 / E)
  route_TxK = _routed(router, ctx)[1]['route']
  expected_TxK = [oracle.best(noisy_E, K) for noisy_E in noisy_TxE]
  np.testing.assert_array_equal(route_TxK, expected_TxK)


def _spread(score_TxE, group):
  """The squared deviation over the mean, of sums over each group's tokens."""
  total_GxE = [g.sum(0) for g in score_TxE.reshape(-1, group, E)]
  return np.mean([(s.std() / s.mean()) ** 2 for s in total_GxE])


@pytest.mark.parametrize('group', [None, 6, T])
def test_losses_by_hand(group):
  router, ctx = _router(0.3, noise=1.0, group=group), _ctx()
  losses = _routed(router, ctx)[1]['losses']
  logits_TxE = _logits(router)
  importance = _spread(oracle.softmax(logits_TxE), group or L)
  np.testing.assert_allclose(losses['importance'], importance, 1e-5)
  noise = 1 / E
  noisy_TxE = logits_TxE + _noise(ctx, noise)
  chance_TxE = np.zeros((T, E))
  for t, e in np.ndindex(T, E):
    least = sorted(noisy_TxE[t])[-K]
    lack = (least - logits_TxE[t, e]) / noise
    chance_TxE[t, e] = 0.5 * math.erfc(lack / math.sqrt(2))
  np.testing.assert_allclose(
    losses['smooth_load'], _spread(chance_TxE, group or L), 1e-4
  )


def test_the_load_is_examined_where_there_is_noise():
  quiet, noisy = _router(noise=0.0), _router()
  losses = lambda router, **ctx: jax.eval_shape(
    lambda x_TxD: router(x_TxD, _ctx(**ctx), ())[1]['losses'], _x()
  )
  assert 'smooth_load' not in losses(quiet)
  assert 'smooth_load' not in losses(noisy, train=False)
  assert 'smooth_load' in losses(noisy)


@pytest.mark.parametrize('loss', ['importance', 'smooth_load'])
@pytest.mark.parametrize('scale', [0.0, 1.0, 1e3])
def test_losses_have_finite_slopes(loss, scale):
  router = _router()
  graph, params = nnx.split(router)

  def value(params):
    return nnx.merge(graph, params)(_x(), _ctx(), ())[1]['losses'][loss]

  params = jax.tree.map(lambda a: scale * a, params)
  (slope_DxE,) = jax.tree.leaves(jax.jit(jax.grad(value))(params))
  assert np.isfinite(slope_DxE).all()
  assert np.abs(slope_DxE).max() > 0 or scale != 1.0


def test_negative_noise_is_refused():
  with pytest.raises(ValueError, match=r'noise=-1\.0 is not'):
    _router(noise=-1.0)
  with pytest.raises(ValueError, match=r'eval_capacity=0\.0 is not'):
    _router(eval_capacity=0.0)
