"""Balancing losses: 1 at balance, gradients through the probabilities alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import balance
from tests.helpers import oracle

E, B, L = 4, 3, 8


def _probs(*shape, scale=1.0, seed=0):
  draw = np.random.default_rng(seed)
  return np.float32(oracle.softmax(scale * draw.normal(size=shape)))


@pytest.mark.parametrize('load', [1, 7])
def test_every_loss_is_one_at_perfect_balance(load):
  # Probabilities need not be uniform for each token, only in the mean.
  probs_TxE = np.tile(np.eye(E, dtype=np.float32), (B * L // E, 1))
  load_E = np.full(E, load, np.int32)
  assert float(balance.switch(probs_TxE, load_E)) == pytest.approx(1)
  load_BxE = np.full((B, E), load, np.int32)
  probs_BxLxE = probs_TxE.reshape(B, L, E)
  assert float(balance.sequence(probs_BxLxE, load_BxE)) == pytest.approx(1)


@pytest.mark.parametrize('hot', [0, 3])
def test_all_on_one_expert_costs_E(hot):
  probs_TxE = np.eye(E, dtype=np.float32)[[hot] * 6]
  load_E = np.eye(E, dtype=np.int32)[hot] * 12
  assert float(balance.switch(probs_TxE, load_E)) == pytest.approx(E)


def test_switch_by_hand():
  probs_TxE = _probs(6, E)
  load_E = np.array([5, 1, 0, 6], np.int32)
  expected = E * (load_E / 12 * probs_TxE.mean(0)).sum()
  np.testing.assert_allclose(balance.switch(probs_TxE, load_E), expected, 1e-6)


def test_sequence_form_is_the_mean_of_switch_over_sequences():
  probs_BxLxE = _probs(B, L, E, scale=2)
  load_BxE = np.random.default_rng(1).integers(0, 9, (B, E), np.int32)
  each = [
    balance.switch(p, n) for p, n in zip(probs_BxLxE, load_BxE, strict=True)
  ]
  np.testing.assert_allclose(
    balance.sequence(probs_BxLxE, load_BxE), np.mean(each), 1e-6
  )


def test_sequences_out_of_balance_do_not_cancel():
  probs_BxLxE = np.eye(2, dtype=np.float32)[[[0] * L, [1] * L]]
  load_BxE = np.array([[L, 0], [0, L]], np.int32)
  whole = balance.switch(probs_BxLxE.reshape(-1, 2), load_BxE.sum(0))
  assert float(whole) == pytest.approx(1)
  assert float(balance.sequence(probs_BxLxE, load_BxE)) == pytest.approx(2)


def test_gradients_go_through_probabilities_alone():
  probs_TxE, load_E = _probs(6, E), np.float32([5, 1, 0, 6])
  d_probs_TxE, d_load_E = jax.grad(balance.switch, (0, 1))(probs_TxE, load_E)
  expected = np.broadcast_to(E * load_E / 12 / 6, (6, E))
  np.testing.assert_allclose(d_probs_TxE, expected, 1e-6)
  assert not d_load_E.any()
  load_BxE = np.float32([[5, 1, 0, 2], [2, 2, 2, 2], [0, 8, 0, 0]])
  d_probs, d_load = jax.grad(balance.sequence, (0, 1))(
    _probs(B, L, E), load_BxE
  )
  expected = np.broadcast_to(E * load_BxE[:, None] / 8 / L / B, (B, L, E))
  np.testing.assert_allclose(d_probs, expected, 1e-6)
  assert not d_load.any()


def test_kept_is_switch_among_the_kept():
  logits_TxE = np.float32(np.random.default_rng(0).normal(size=(6, E)))
  keep_E, load_E = np.array([1, 0, 1, 1], bool), np.array([5, 0, 1, 6])
  probs_TxE = np.float32(oracle.softmax(logits_TxE[:, keep_E]))
  np.testing.assert_allclose(
    balance.switch_among(logits_TxE, np.int32(load_E), keep_E),
    balance.switch(probs_TxE, np.int32(load_E[keep_E])),
    1e-6,
  )
  logits_TxE[:, ~keep_E] = 1e3  # the others count nothing, whatever they are
  slope_TxE = jax.grad(balance.switch_among)(
    logits_TxE, np.float32(load_E), keep_E
  )
  assert np.isfinite(slope_TxE).all() and not slope_TxE[:, ~keep_E].any()
  assert slope_TxE[:, keep_E].any()


def test_spread_by_hand():
  score_GxTxE = _probs(B, L, E, scale=2)
  total_GxE = np.float64(score_GxTxE).sum(1)
  expected = np.mean((total_GxE.std(1) / total_GxE.mean(1)) ** 2)
  np.testing.assert_allclose(balance.cv_squared(score_GxTxE), expected, 1e-5)


def test_spread_lies_between_none_and_all_on_one_expert():
  even = np.ones((B, L, E), np.float32)
  assert float(balance.cv_squared(even)) == 0
  np.testing.assert_array_equal(jax.grad(balance.cv_squared)(even), 0)
  one = np.broadcast_to(np.eye(E, dtype=np.float32)[1], (B, L, E))
  assert float(balance.cv_squared(one)) == pytest.approx(E - 1)


def test_no_load_at_all_is_finite():
  nothing = balance.switch(_probs(6, E), np.zeros(E, np.int32))
  assert float(nothing) == 0


def test_z_by_hand():
  logits_TxE = np.float32([[0, 0, 0, 0], [1, 2, 3, 4]])
  z_T = np.log(np.exp(logits_TxE).sum(1))
  np.testing.assert_allclose(balance.z(logits_TxE), (z_T**2).mean(), 1e-6)


def test_z_is_finite_for_large_logits():
  z = float(balance.z(np.full((2, E), 1e4, np.float32)))
  assert z == pytest.approx((1e4 + np.log(E)) ** 2, rel=1e-6)


def test_entropy_lies_between_sure_and_uniform():
  assert float(balance.entropy(np.eye(E, dtype=np.float32))) == 0
  uniform = np.full((3, E), 1 / E, np.float32)
  assert float(balance.entropy(uniform)) == pytest.approx(1)
  half = np.float32([[0.5, 0.5, 0, 0]])
  assert float(balance.entropy(half)) == pytest.approx(0.5)


def test_entropy_of_one_expert_is_zero():
  assert float(balance.entropy(np.ones((3, 1), np.float32))) == 0


def test_nudge_raises_the_idle_and_lowers_the_busy():
  bias_E = np.float32([0.5, 0.5, 0.5, -1])
  new_E = balance.update_expert_bias(
    bias_E, np.array([9, 0, 4, 3], np.int32), 0.01
  )
  np.testing.assert_allclose(new_E - bias_E, [-0.01, 0.01, 0, 0.01], atol=1e-6)


@pytest.mark.parametrize('bias_type', [jnp.float32, jnp.bfloat16])
def test_nudge_keeps_the_type_of_the_bias(bias_type):
  new_E = balance.update_expert_bias(
    jnp.zeros(2, bias_type), jnp.array([1, 3]), 0.5
  )
  assert new_E.dtype == bias_type
  np.testing.assert_array_equal(np.float32(new_E), [0.5, -0.5])
