"""Objectives: what is masked, what is weighted, what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moe_jax import objective

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
    return jnp.asarray(_logits()), {} if aux is None else aux

  loss, found = objective.get('next_token', losses=weights)(forward, batch)
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
  goal = objective.next_token({})
  f = lambda logits: goal(lambda batch, pass_: (logits, {}), batch)[0]
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
  alone, _ = _call({}, batch, {'losses': LOSSES})
  loss, found = _call(
    {'balance': 0.1, 'z': 2.0, 'sequence_balance': 9.0},
    batch,
    {'losses': LOSSES},
  )
  assert loss - alone == pytest.approx(0.1 * 4 + 2 * 0.75, rel=1e-5)
  assert float(found['nll_sum']) == pytest.approx(_nll(batch).sum(), rel=1e-6)
  assert found['aux']['losses'] is LOSSES


def test_a_weight_of_zero_hides_even_an_infinite_loss():
  infinite = {'losses': {'z': np.float32([np.inf])}}
  loss, _ = _call({'z': 0.0}, _batch(np.ones((B, L))), infinite)
  assert np.isfinite(loss)


def test_logits_too_large_for_exp_are_finite():
  logits = np.float32([[[1e4, 0.0]]])
  nll = objective.cross_entropy(logits, np.array([[1]], np.int32))
  np.testing.assert_allclose(nll, [[1e4]])


def test_unknown_names_are_told():
  with pytest.raises(ValueError, match="'masked'; there are next_token"):
    objective.get('masked')
  with pytest.raises(TypeError, match='alpha'):
    objective.get('next_token', losses={}, alpha=1.0)
