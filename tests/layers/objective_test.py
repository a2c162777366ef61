"""Objectives: what is masked, what is weighted, what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import objectives
from tests.helpers import oracle

B, L, V = 2, 3, 5
LOSSES = {
  'balance': np.float32([[[1.0]], [[3.0]]]),  # [G, R, I]
  'z': np.float32([[[0.5]], [[0.25]]]),
}


def _logits():
  draw = np.random.default_rng(0)
  return np.float32(2 * draw.normal(size=(B, L, V)))


def _batch(mask_BxL):
  return {
    'target_BxL': np.array([[0, 4, 2], [1, 1, 3]], np.int32),
    'mask_BxL': np.asarray(mask_BxL, np.float32),
  }


def _nll(batch):
  probs = oracle.softmax(np.float64(_logits()))
  picked = np.take_along_axis(probs, batch['target_BxL'][..., None], axis=-1)
  return -np.log(picked[..., 0])


def _call(weights, batch, aux=None):
  passes = []

  def forward(batch, pass_):
    passes.append(pass_)
    return jnp.asarray(_logits()), [] if aux is None else aux

  loss, found = objectives.get('next_token', losses=weights)(forward, batch)
  assert passes == [0]
  return float(loss), found


def test_loss_is_the_mean_over_unmasked_targets():
  batch = _batch([[1, 0, 1], [1, 1, 0]])
  loss, found = _call({}, batch)
  total = (_nll(batch) * batch['mask_BxL']).sum()
  assert loss == pytest.approx(total / 4, rel=1e-6)
  assert float(found['nll_sum']) == pytest.approx(total, rel=1e-6)
  assert float(found['tokens']) == 4


def test_a_masked_target_has_no_gradient():
  batch = _batch([[1, 0, 1], [1, 1, 1]])
  goal = objectives.objective('next_token')(losses={})
  f = lambda logits: goal(lambda batch, pass_: (logits, []), batch)[0]
  d_BxLxV = jax.grad(f)(_logits())
  assert not d_BxLxV[0, 1].any() and np.abs(d_BxLxV).max(axis=2).sum() > 0.1
  probs = oracle.softmax(_logits())
  one_hot = np.eye(V)[batch['target_BxL']]
  expected = (probs - one_hot) * batch['mask_BxL'][..., None] / 5
  np.testing.assert_allclose(d_BxLxV, expected, 1e-4, 1e-6)


def test_a_batch_without_targets_costs_nothing():
  loss, found = _call({}, _batch(np.zeros((B, L))))
  assert loss == 0 and float(found['tokens']) == 0


def test_router_losses_are_weighted_and_summed_over_layers():
  batch = _batch(np.ones((B, L)))
  alone, _ = _call({}, batch, [{'losses': LOSSES}])
  loss, found = _call(
    {'balance': 0.1, 'z': 2.0, 'sequence_balance': 9.0},
    batch,
    [{'losses': LOSSES}, {'losses': {'z': LOSSES['z']}}],
  )
  assert loss - alone == pytest.approx(0.1 * 4 + 4 * 0.75, rel=1e-5)
  assert float(found['nll_sum']) == pytest.approx(_nll(batch).sum(), rel=1e-6)
  assert found['aux'][0]['losses'] is LOSSES


def test_a_weight_of_zero_hides_even_an_infinite_loss():
  infinite = [{'losses': {'z': np.float32([np.inf])}}]
  loss, _ = _call({'z': 0.0}, _batch(np.ones((B, L))), infinite)
  assert np.isfinite(loss)


def test_logits_too_large_for_exp_are_finite():
  logits = np.float32([[[1e4, 0.0]]])
  nll = objectives.cross_entropy(logits, np.array([[1]], np.int32))
  np.testing.assert_allclose(nll, [[1e4]])


def test_a_smoothed_label_leaves_a_little_to_every_other_class():
  batch, smoothing = _batch(np.ones((B, L))), 0.3
  log_BxLxV = np.log(oracle.softmax(np.float64(_logits())))
  target_BxLxV = np.eye(V)[batch['target_BxL']]
  other = smoothing / (V - 1)
  target_BxLxV = np.where(target_BxLxV > 0, 1 - smoothing, other)
  expected = -(target_BxLxV * log_BxLxV).sum(axis=-1)
  found = objectives.smoothed(_logits(), batch['target_BxL'], smoothing)
  np.testing.assert_allclose(found, expected, 1e-5)


def test_metrics_are_not_smoothed():
  batch = _batch([[1, 0, 1], [1, 1, 0]])
  forward = lambda batch, pass_: (jnp.asarray(_logits()), [])
  plain = objectives.objective('next_token')(losses={})(forward, batch)
  soft = objectives.objective('next_token')(losses={}, smoothing=0.2)(
    forward, batch
  )
  assert soft[0] != plain[0]
  assert soft[1]['nll_sum'] == plain[1]['nll_sum']


def test_a_step_divides_by_the_targets_of_all_its_microbatches():
  """Two halves with unequal numbers of targets add up to the whole."""
  whole = _batch([[1, 0, 0], [1, 1, 1]])
  logits_BxLxV = _logits()
  goal = objectives.objective('next_token')(losses={}, smoothing=0.1)

  def loss(rows, tokens):
    batch = {k: v[rows] for k, v in whole.items()}
    forward = lambda batch, pass_: (jnp.asarray(logits_BxLxV[rows]), [])
    return float(goal(forward, batch, tokens)[0])

  halves = [loss(rows, np.float32(2)) for rows in ([0], [1])]
  assert np.mean(halves) == pytest.approx(loss([0, 1], None), rel=1e-6)


def _two_passes(batch, p_BxLxV, q_BxLxV, aux=(), **options):
  logits = [jnp.asarray(p_BxLxV), jnp.asarray(q_BxLxV)]
  forward = lambda batch, pass_: (logits[pass_], list(aux))
  return objectives.objective('consistency')(losses={}, **options)(
    forward, batch
  )


def test_consistency_adds_both_losses_and_how_far_they_are_apart():
  batch = _batch([[1, 0, 1], [1, 1, 0]])
  p_BxLxV, q_BxLxV = _logits(), _logits()[:, ::-1]
  loss, found = _two_passes(batch, p_BxLxV, q_BxLxV, alpha=3.0, smoothing=0.0)
  p, q = (
    oracle.softmax(np.float64(p_BxLxV)),
    oracle.softmax(np.float64(q_BxLxV)),
  )
  kl = lambda p, q: (p * np.log(p / q)).sum(axis=-1)
  apart = ((kl(p, q) + kl(q, p)) / 2 * batch['mask_BxL']).sum()
  pick = lambda p: np.take_along_axis(p, batch['target_BxL'][..., None], -1)
  nll = -(np.log(pick(p)) + np.log(pick(q)))[..., 0] * batch['mask_BxL']
  assert float(found['consistency_sum']) == pytest.approx(apart, rel=1e-5)
  assert float(loss) == pytest.approx((nll.sum() + 3 * apart) / 4, rel=1e-5)


def test_consistency_of_equal_draws_is_twice_the_plain_objective():
  """Bit for bit, whatever alpha."""
  batch, goal = (
    _batch([[1, 0, 1], [1, 1, 0]]),
    objectives.objective('next_token')(losses={}),
  )
  plain = lambda z: goal(lambda batch, pass_: (z, []), batch)[0]
  twice = lambda z: _two_passes(batch, z, z, alpha=0.0, smoothing=0.0)[0]
  loss, d_BxLxV = jax.value_and_grad(plain)(jnp.asarray(_logits()))
  both, d_both_BxLxV = jax.value_and_grad(twice)(jnp.asarray(_logits()))
  assert both == 2 * loss
  np.testing.assert_array_equal(d_both_BxLxV, 2 * d_BxLxV)
  apart = _two_passes(batch, _logits(), _logits())[1]['consistency_sum']
  assert apart == 0


def test_two_passes_count_the_load_of_both():
  aux = [{'load_E': jnp.arange(3), 'losses': {'z': jnp.float32(1)}}]
  batch = _batch(np.ones((B, L)))
  goal = objectives.objective('consistency')(losses={'z': 0.5}, smoothing=0.0)
  forward = lambda batch, pass_: (jnp.asarray(_logits()), aux)
  loss, found = goal(forward, batch)
  np.testing.assert_array_equal(found['aux'][0]['load_E'], [0, 2, 4])
  assert float(loss) == pytest.approx(2 * (0.5 + _nll(batch).mean()), rel=1e-5)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_classification_counts_hits(sigmoid):
  batch = {k: v[:, :1] for k, v in _batch([[1, 0, 0], [0, 0, 0]]).items()}
  z_BxLxV = np.float64(_logits()[:, :1])
  forward = lambda batch, pass_: (jnp.asarray(_logits()[:, :1]), [])
  goal = objectives.objective('classification')(losses={}, sigmoid=sigmoid)
  loss, found = goal(forward, batch)
  target = batch['target_BxL'][0, 0]
  assert float(found['correct_sum']) == (z_BxLxV[0, 0].argmax() == target)
  expected = -np.log(oracle.softmax(z_BxLxV))[0, 0, target]
  assert float(found['nll_sum']) == pytest.approx(expected, rel=1e-5)
  if sigmoid:
    one = 1 / (1 + np.exp(-z_BxLxV[0, 0]))
    is_target = np.arange(V) == target
    expected = -np.log(np.where(is_target, one, 1 - one)).sum()
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_unknown_names_are_told():
  with pytest.raises(ValueError, match="'masked'; there are classification"):
    objectives.get('masked')
  with pytest.raises(TypeError, match='alpha'):
    objectives.get('next_token', losses={}, alpha=1.0)
