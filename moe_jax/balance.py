"""Balancing losses and bias updates: functions of a router's numbers.

Every loss is unweighted, and 1 at perfect balance (the z-loss and `spread` are
not), and sends gradients through the probabilities only: counts are constants.
"""

import jax
import jax.numpy as jnp


def switch(probs_TxE: jax.Array, load_E: jax.Array) -> jax.Array:
  """E * sum_e f_e P_e over all tokens (Fedus et al. 2021, eq. 4).

  Args:
    probs_TxE: probabilities of each token over all experts, rows sum to 1.
    load_E: assignments per expert, counted before dropping.
  """
  return _product(_share(load_E, probs_TxE.dtype), jnp.mean(probs_TxE, axis=0))


def sequence(probs_BxLxE: jax.Array, load_BxE: jax.Array) -> jax.Array:
  """The same per sequence, then the mean (DeepSeek-V2, arXiv 2405.04434)."""
  share_BxE = _share(load_BxE, probs_BxLxE.dtype)
  return jnp.mean(_product(share_BxE, jnp.mean(probs_BxLxE, axis=1)))


def kept(
  logits_TxE: jax.Array, load_E: jax.Array, keep_E: jax.Array
) -> jax.Array:
  """`switch` among the experts that are kept, as if there were no others.

  Args:
    logits_TxE: of all experts; those of the kept give their probabilities.
    load_E: assignments per expert, none to those that are not kept.
    keep_E: bool.
  """
  kept_TxE = jnp.where(keep_E[None], logits_TxE, -jnp.inf)
  part = jnp.mean(keep_E.astype(logits_TxE.dtype))
  return part * switch(jax.nn.softmax(kept_TxE, axis=-1), load_E)


def spread(score_GxTxE: jax.Array) -> jax.Array:
  """Squared coefficient of variation over experts of their summed scores.

  Of each group G of tokens, then the mean; 0 at perfect balance, E - 1 where
  one expert has all. Of probabilities it is the importance loss of V-MoE, of
  chances to be chosen its load loss (arXiv 2106.05974, appendix A).
  """
  mean_GxE = jnp.mean(score_GxTxE, axis=1)
  # The variance itself: the slope of a deviation has no value at zero.
  return jnp.mean(jnp.var(mean_GxE, axis=1) / jnp.mean(mean_GxE, axis=1) ** 2)


def z(logits_TxE: jax.Array) -> jax.Array:
  """Mean squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5)."""
  return jnp.mean(jax.nn.logsumexp(logits_TxE, axis=-1) ** 2)


def entropy(probs_TxE: jax.Array) -> jax.Array:
  """Mean entropy of a token's probabilities, 0 (sure) to 1 (uniform)."""
  E = probs_TxE.shape[-1]
  if E == 1:
    return jnp.zeros((), probs_TxE.dtype)
  nats_T = -jnp.sum(jax.scipy.special.xlogy(probs_TxE, probs_TxE), axis=-1)
  return jnp.mean(nats_T) / jnp.log(jnp.asarray(E, probs_TxE.dtype))


def nudge(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
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
