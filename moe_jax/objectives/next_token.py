"""Cross-entropy of the next token, and the routers' losses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import objectives, ranges


def objective(
  *, losses: objectives.Losses, smoothing: ranges.Fraction = 0.0
) -> Callable:
  """Cross-entropy of the next token, and the routers' losses.

  Args:
    losses: weight of each router loss, summed over layers and iterations. One
      that the router does not report counts nothing here; config.resolve
      refuses it unless it is one of config.LOSSES.
    smoothing: of the labels, see `objectives.smoothed`; metrics have none.
  """

  def loss_of(
    forward: objectives.Forward, batch: dict[str, jax.Array], tokens=None
  ):
    logits_BxLxV, aux = forward(batch, pass_=0)
    mask_BxL, found = objectives.nll(logits_BxLxV, batch)
    loss_BxL = objectives.smoothed(logits_BxLxV, batch['target_BxL'], smoothing)
    loss = jnp.sum(loss_BxL * mask_BxL) / objectives.count(
      found['tokens'], tokens
    )
    return loss + objectives.weighted(losses, aux), {**found, 'aux': aux}

  return loss_of
