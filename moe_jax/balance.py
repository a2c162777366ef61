"""Balancing losses and bias updates: functions of a router's numbers.

Every loss is unweighted, and 1 at perfect balance (the z-loss and `cv_squared`
are not), and sends gradients through the probabilities only: counts are
constants.
"""

import jax
import jax.numpy as jnp


def switch(
  probs_TxE: jax.Array, load_E: jax.Array, real_T: jax.Array | None = None
) -> jax.Array:
  """E * sum_e f_e P_e over all tokens (Fedus et al. 2021, eq. 4).

  Args:
    probs_TxE: probabilities of each token over all experts, rows sum to 1.
    load_E: assignments per expert, counted before dropping.
    real_T: bool; padding has no weight in P.
  """
  share_E = _share(load_E, probs_TxE.dtype)
  return _product(share_E, mean(probs_TxE, real_T))


def sequence(
  probs_BxLxE: jax.Array,
  load_BxE: jax.Array,
  real_BxL: jax.Array | None = None,
) -> jax.Array:
  """The same per sequence, then the mean (DeepSeek-V2, arXiv 2405.04434).

  Sequences of padding alone have no weight.
  """
  share_BxE = _share(load_BxE, probs_BxLxE.dtype)
  if real_BxL is None:
    return jnp.mean(_product(share_BxE, jnp.mean(probs_BxLxE, axis=1)))
  probs_BxE = jax.vmap(mean)(probs_BxLxE, real_BxL)
  return mean(_product(share_BxE, probs_BxE), jnp.any(real_BxL, axis=1))


def switch_among(
  logits_TxE: jax.Array,
  load_E: jax.Array,
  keep_E: jax.Array,
  real_T: jax.Array | None = None,
) -> jax.Array:
  """`switch` among the experts that are kept, as if there were no others.

  Args:
    logits_TxE: of all experts; those of the kept give their probabilities.
    load_E: assignments per expert, none to those that are not kept.
    keep_E: bool.
    real_T: as there.
  """
  kept_TxE = jnp.where(keep_E[None], logits_TxE, -jnp.inf)
  part = jnp.mean(keep_E.astype(logits_TxE.dtype))
  return part * switch(jax.nn.softmax(kept_TxE, axis=-1), load_E, real_T)


def cv_squared(
  score_GxTxE: jax.Array, count_G: jax.Array | None = None
) -> jax.Array:
  """Squared coefficient of variation over experts of their summed scores.

  Of each group G of tokens, then the mean; 0 at perfect balance, E - 1 where
  one expert has all. Of probabilities it is the importance loss of V-MoE, of
  chances to be chosen its load loss (arXiv 2106.05974, appendix A).

  Args:
    count_G: tokens of each group, beside which scores are 0; a group that has
      none has no weight. None: all are tokens.
  """
  if count_G is None:
    count_G = jnp.full(len(score_GxTxE), score_GxTxE.shape[1], jnp.int32)
  real_G = count_G > 0
  count_Gx1 = jnp.maximum(count_G, 1).astype(score_GxTxE.dtype)[:, None]
  mean_GxE = jnp.sum(score_GxTxE, axis=1) / count_Gx1
  mean_GxE = jnp.where(real_G[:, None], mean_GxE, 1)
  # The variance itself: the slope of a deviation has no value at zero.
  squared_G = jnp.var(mean_GxE, axis=1) / jnp.mean(mean_GxE, axis=1) ** 2
  return mean(squared_G, real_G)


def z(logits_TxE: jax.Array, real_T: jax.Array | None = None) -> jax.Array:
  """Mean squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5)."""
  return mean(jax.nn.logsumexp(logits_TxE, axis=-1) ** 2, real_T)


def entropy(probs_TxE: jax.Array, real_T: jax.Array | None = None) -> jax.Array:
  """Mean entropy of a token's probabilities, 0 (sure) to 1 (uniform)."""
  E = probs_TxE.shape[-1]
  if E == 1:
    return jnp.zeros((), probs_TxE.dtype)
  nats_T = -jnp.sum(jax.scipy.special.xlogy(probs_TxE, probs_TxE), axis=-1)
  part = mean(nats_T, real_T) / jnp.log(jnp.asarray(E, probs_TxE.dtype))
  return jnp.minimum(part, 1)  # rounding may exceed it


def mean(a_TxX: jax.Array, real_T: jax.Array | None = None) -> jax.Array:
  """[X]: the mean over the tokens that are no padding; 0 where all are."""
  if real_T is None:
    return jnp.mean(a_TxX, axis=0)
  real_TxX = jnp.expand_dims(real_T, range(1, a_TxX.ndim))
  count = jnp.maximum(jnp.sum(real_T.astype(a_TxX.dtype)), 1)
  return jnp.sum(jnp.where(real_TxX, a_TxX, 0), axis=0) / count


def update_expert_bias(
  bias_E: jax.Array, load_E: jax.Array, rate: float
) -> jax.Array:
  """One loss-free step: more bias for experts below the mean load, less above.

  Wang et al. 2024, arXiv 2408.15664, algorithm 1.
  """
  load_E = load_E.astype(bias_E.dtype)
  return bias_E + rate * jnp.sign(jnp.mean(load_E) - load_E)


def _share(load, dtype):
  load = jax.lax.stop_gradient(load).astype(dtype)
  return load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)


def _product(share, mean_probs):
  return share.shape[-1] * jnp.sum(share * mean_probs, axis=-1)
