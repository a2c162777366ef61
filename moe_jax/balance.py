"""Balancing losses and bias updates: functions of a router's numbers.

Every loss is 1 at perfect balance (the z-loss apart), is unweighted, and sends
gradients through the probabilities only: counts are constants.
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
