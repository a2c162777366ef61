"""ReXMoE: who is a candidate at which step, and what the masked change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routers
from moe_jax.routers import rexmoe
from tests.helpers import oracle

B, L, D, E, K = 2, 6, 8, 12, 3
T = B * L
KEEP = np.isin(np.arange(E), [1, 2, 5, 7, 10])


def _ctx(step=0, *, steps=100, layer=0, train=True, replay=None, **where):
  batch = {
    'ids_BxL': np.zeros((B, L), np.int32),
    'pos_BxL': np.zeros((B, L), np.int32),
    'row_B': np.arange(B, dtype=np.int32),
  }
  ctx = routers.context(
    batch,
    jax.random.key(0),
    jnp.int32(step),
    train=train,
    steps=steps,
    **where,
  )
  return ctx.at(moe_layer=jnp.int32(layer), replay=replay)


def _router(**options):
  options = {'k': K, **options}
  router = rexmoe.Router(D, E, rngs=nnx.Rngs(0), **options)
  router.w_DxE[...] = jnp.asarray(_normal(D, E, seed=1), jnp.float32)
  return router


def _routed(router, x_TxD, ctx):
  return jax.jit(lambda x_TxD, ctx: router(x_TxD, ctx, ())[:2])(x_TxD, ctx)


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


# The schedules.


def _linear(step, first, E, start, end):
  """Equation 6 in Python's integers."""
  if step <= start:
    return first
  if step > end:
    return E
  return first + (E - first) * (step - start) // (end - start)


@pytest.mark.parametrize(
  'first, E, start, end',
  [
    (3, 12, 5, 18),
    (3, 12, 0, 4),  # several are let in by one step
    (7, 21, 10, 10),
    (12, 12, 2, 9),
  ],
)
def test_candidates_follow_the_equation_at_every_step(first, E, start, end):
  schedule = functools.partial(
    rexmoe.candidates, first=first, E=E, start=start, end=end
  )
  steps = np.arange(25, dtype=np.int32)
  np.testing.assert_array_equal(
    jax.vmap(schedule)(steps),
    [_linear(int(t), first, E, start, end) for t in steps],
  )


def test_candidates_are_exact_where_int32_and_float32_would_not_be():
  run = 64, 4096, 2_100_000, 9_999_999
  steps = np.random.default_rng(0).integers(0, 10**7, 400, np.int32)
  steps = np.append(steps, np.int32([2_100_000, 2_100_001, 9_999_998, 10**7]))
  found = jax.jit(jax.vmap(lambda t: rexmoe.candidates(t, *run)))(steps)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, [_linear(int(t), *run) for t in steps])


def test_stages_hold_from_their_step_on():
  stages = [(9, 12), (4, 6)]
  found = [int(rexmoe.staged(jnp.int32(t), 3, stages)) for t in range(11)]
  assert found == [3] * 4 + [6] * 5 + [12] * 2


def _number(router, **ctx):
  return int(router._keep(_ctx(**ctx)).sum())


@pytest.mark.parametrize(
  'options',
  [
    {'start': 0.2, 'end': 0.6},
    {'start': 20, 'end': 0.6},
    {'start': 20, 'end': 60},
  ],
)
def test_places_are_parts_of_the_run_or_steps(options):
  router = _router(first=3, **options)
  for step in (0, 20, 25, 40, 59, 60, 99):
    assert _number(router, step=step) == _linear(step, 3, E, 20, 60)


def test_stages_of_a_run():
  router = _router(first=3, schedule='stepwise', stages='0.5:6,80:12')
  numbers = [_number(router, step=t) for t in (0, 49, 50, 79, 80, 99)]
  assert numbers == [3, 3, 6, 6, 12, 12]


# The mask.


def test_a_mask_belongs_to_a_step_and_a_layer_alone():
  keep = jax.jit(_router(first=6)._keep)
  first = keep(_ctx())
  for same in (_ctx(), _ctx(microbatch=1), _ctx(pass_=1)):
    np.testing.assert_array_equal(keep(same), first)
  for other in (_ctx(step=1), _ctx(layer=1)):
    assert (keep(other) != first).any()


def test_masks_are_uniform_over_the_pool():
  router, n = _router(first=6, start=500, end=500), 400
  keep = jax.vmap(lambda step: router._keep(_ctx(step)))
  keep_SxE = np.asarray(keep(np.arange(n, dtype=np.int32)))
  assert (keep_SxE.sum(1) == 6).all()
  assert np.abs(keep_SxE.mean(0) - 0.5).max() < 5 * np.sqrt(0.25 / n)
  # Neighbours are let in independently of each other.
  both = keep_SxE[:, :2].all(1).mean()
  assert abs(both - 6 / 12 * 5 / 11) < 5 * np.sqrt(0.18 / n)


def test_evaluation_has_all_candidates():
  assert _number(_router(first=3), train=False) == E
  assert _number(_router(first=3), train=True) == 3
  assert _number(_router()) == E


# The choice and its gates.


def _by_hand(logits_TxE, renormalise, mask):
  """expert_TxK and gate_TxK, token by token."""
  expert_TxK, gate_TxK = [], []
  for logits_E in logits_TxE:
    if mask == 'neginf':
      score_E = np.zeros(E)
      score_E[KEEP] = oracle.softmax(logits_E[KEEP])
    else:
      score_E = oracle.softmax(logits_E) * KEEP
    chosen = oracle.best(score_E, K)
    gate_K = score_E[chosen]
    expert_TxK.append(chosen)
    gate_TxK.append(gate_K / gate_K.sum() if renormalise else gate_K)
  return np.array(expert_TxK), np.array(gate_TxK)


@pytest.mark.parametrize('renormalise', [False, True])
@pytest.mark.parametrize('mask', ['zero', 'neginf'])
def test_route_by_hand(renormalise, mask):
  options = {'renormalise': renormalise, 'mask': mask}
  logits_TxE = _normal(T, E)
  with jax.enable_x64(True):
    route = lambda a: rexmoe.route(a, jnp.asarray(KEEP), K, _ctx(), **options)
    expert_TxK, gate_TxK = jax.jit(route)(logits_TxE)
    r_TxK = _normal(T, K, seed=3)
    slope = jax.grad(lambda a: jnp.sum(r_TxK * route(a)[1]))
    slope_TxE = np.asarray(jax.jit(slope)(logits_TxE))
  by_hand = lambda logits_TxE: _by_hand(logits_TxE, **options)
  np.testing.assert_array_equal(expert_TxK, by_hand(logits_TxE)[0])
  np.testing.assert_allclose(gate_TxK, by_hand(logits_TxE)[1], 1e-12)
  value = lambda at: np.sum(r_TxK * by_hand(at['a'])[1])
  for seed in (4, 5):
    toward_TxE = _normal(T, E, seed=seed)
    expected = oracle.slope(value, {'a': logits_TxE}, {'a': toward_TxE})
    np.testing.assert_allclose(np.sum(slope_TxE * toward_TxE), expected, 1e-6)
  # As written, the masked learn by the softmax's sum.
  unmasked = not renormalise and mask == 'zero'
  assert np.abs(slope_TxE[:, ~KEEP]).max() > 1e-3 * unmasked
  if not unmasked:
    np.testing.assert_allclose(slope_TxE[:, ~KEEP], 0, atol=1e-15)


@pytest.mark.parametrize('mask', ['zero', 'neginf'])
def test_masked_experts_are_not_chosen_where_scores_vanish(mask):
  logits_TxE = np.float32(_normal(T, E) + np.where(KEEP, 0, 1e3))
  expert_TxK, gate_TxK = rexmoe.route(
    jnp.asarray(logits_TxE),
    jnp.asarray(KEEP),
    K,
    _ctx(),
    renormalise=True,
    mask=mask,
  )
  assert KEEP[np.asarray(expert_TxK)].all()
  np.testing.assert_allclose(gate_TxK.sum(1), 1, 1e-6)


@pytest.mark.parametrize('renormalise', [False, True])
def test_a_replay_of_masked_experts_has_finite_gates(renormalise):
  replay = np.broadcast_to(np.flatnonzero(~KEEP)[:K].astype(np.int32), (T, K))
  route = lambda a: rexmoe.route(
    a,
    jnp.asarray(KEEP),
    K,
    _ctx(replay=replay),
    renormalise=renormalise,
    mask='neginf',
  )[1]
  logits_TxE = jnp.asarray(_normal(T, E), jnp.float32)
  assert np.isfinite(route(logits_TxE)).all()
  assert np.isfinite(jax.grad(lambda a: route(a).sum())(logits_TxE)).all()


@pytest.mark.parametrize('options', [{}, {'first': E}])
def test_with_all_candidates_it_is_top_k_bit_for_bit(options):
  topk = routers.get('topk')(D, E, k=K, renormalise=False, rngs=nnx.Rngs(0))
  topk.w_DxE[...] = _router().w_DxE[...]
  x_TxD = jnp.asarray(_normal(T, D), jnp.float32)
  expected_plan, expected = _routed(topk, x_TxD, _ctx())
  plan, aux = _routed(_router(**options), x_TxD, _ctx())
  jax.tree.map(np.testing.assert_array_equal, plan, expected_plan)
  kept = aux['losses'].pop('balance_kept')
  jax.tree.map(np.testing.assert_array_equal, aux, expected)
  np.testing.assert_allclose(kept, expected['losses']['balance'], 1e-5)


def test_losses_are_over_the_pool_and_over_the_candidates():
  router, ctx = _router(first=5), _ctx()
  x_TxD = jnp.asarray(_normal(T, D), jnp.float32)
  _, aux = _routed(router, x_TxD, ctx)
  keep_E = np.asarray(router._keep(ctx))
  logits_TxE = np.float64(x_TxD) @ np.float64(router.w_DxE[...])
  share_E = np.bincount(aux['route'].reshape(-1), minlength=E) / (T * K)
  assert keep_E.sum() == 5 and not share_E[~keep_E].any()
  mean_E = oracle.softmax(logits_TxE).mean(0)
  np.testing.assert_allclose(
    aux['losses']['balance'], E * share_E @ mean_E, 1e-5
  )
  kept_E = oracle.softmax(logits_TxE[:, keep_E]).mean(0)
  np.testing.assert_allclose(
    aux['losses']['balance_kept'], 5 * share_E[keep_E] @ kept_E, 1e-5
  )


@pytest.mark.parametrize(
  'options, told',
  [
    ({'first': 2}, '2 candidates .* k=3 to E=12'),
    ({'first': 13}, '13 candidates'),
    ({'k': 13}, 'k is 13'),
    ({'schedule': 'cosine'}, "'cosine'"),
    ({'mask': 'half'}, "'half'"),
    ({'start': -0.1}, 'start=-0.1 is not'),
    ({'first': 4, 'stages': '5:6'}, "'5:6' with schedule='linear'"),
    ({'first': 4, 'schedule': 'stepwise'}, "'' with schedule='stepwise'"),
    ({'schedule': 'stepwise', 'stages': '5:6'}, 'first=None'),
    ({'first': 4, 'schedule': 'stepwise', 'stages': '5:20'}, '20 candidates'),
    ({'first': 4, 'schedule': 'stepwise', 'stages': '5-6'}, "'5-6'"),
    ({'first': 4, 'schedule': 'stepwise', 'stages': 'nan:6'}, "'nan:6' .*=nan"),
    ({'first': 4, 'schedule': 'stepwise', 'stages': '-1:6'}, "'-1:6' .*=-1.0"),
  ],
)
def test_options_that_cannot_be_followed_are_refused(options, told):
  with pytest.raises(ValueError, match=told):
    _router(**options)


def test_an_end_before_the_start_is_refused():
  with pytest.raises(ValueError, match='step 50 to 7'):
    _router(first=4, start=0.5, end=7)._keep(_ctx())
