"""Two passes that shall agree: THOR (arXiv 2110.04260)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import objectives, ranges, routers


def objective(
  *,
  losses: objectives.Losses,
  alpha: ranges.NonNegative = 5.0,
  smoothing: ranges.Fraction = 0.1,
) -> Callable:
  """Two passes that shall agree (THOR, Zuo et al. 2021, arXiv 2110.04260).

  The sum of both passes' smoothed cross-entropies and alpha times the
  symmetric divergence 1/2 sum (p - q)(log p - log q), over the targets. With
  one expert and dropout it is R-Drop (arXiv 2106.14448). Metrics are of the
  first pass, and `consistency_sum` is the divergence in nats.
  """

  def loss_of(
    forward: objectives.Forward, batch: dict[str, jax.Array], tokens=None
  ):
    p_BxLxV, aux = forward(batch, pass_=0)
    q_BxLxV, other = forward(batch, pass_=1)
    mask_BxL, found = objectives.nll(p_BxLxV, batch)
    target_BxL = batch['target_BxL']
    loss_BxL = objectives.smoothed(p_BxLxV, target_BxL, smoothing)
    loss_BxL += objectives.smoothed(q_BxLxV, target_BxL, smoothing)
    apart = jnp.sum(divergence(p_BxLxV, q_BxLxV) * mask_BxL)
    loss = jnp.sum(loss_BxL * mask_BxL) + alpha * apart
    loss = loss / objectives.count(found['tokens'], tokens)
    loss += objectives.weighted(losses, aux) + objectives.weighted(
      losses, other
    )
    aux = routers.Aux(
      {**a, 'load_E': a['load_E'] + b['load_E']}
      for a, b in zip(aux, other, strict=True)
    )
    return loss, {**found, 'consistency_sum': apart, 'aux': aux}

  return loss_of


def divergence(p_BxLxV: jax.Array, q_BxLxV: jax.Array) -> jax.Array:
  """[B, L] 1/2 (KL(p || q) + KL(q || p)) of two sets of logits, in nats."""
  p, q = jax.nn.log_softmax(p_BxLxV), jax.nn.log_softmax(q_BxLxV)
  return 0.5 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)
