"""The class of an image: a sequence with one target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import objectives


def objective(*, losses: objectives.Losses, sigmoid: bool = False) -> Callable:
  """The class of an image: a sequence with one target.

  Args:
    sigmoid: a binary cross-entropy for every class, summed (V-MoE, arXiv
      2106.05974), in place of the softmax's; metrics are the softmax's.

  Returns:
    An objective whose metrics also have `correct_sum`.
  """

  def loss_of(
    forward: objectives.Forward, batch: dict[str, jax.Array], tokens=None
  ):
    logits_BxLxV, aux = forward(batch, pass_=0)
    mask_BxL, found = objectives.nll(logits_BxLxV, batch)
    target_BxL = batch['target_BxL']
    loss_BxL = objectives.smoothed(logits_BxLxV, target_BxL, 0.0)
    if sigmoid:
      sign_BxLxV = (
        2
        * jax.nn.one_hot(
          target_BxL, logits_BxLxV.shape[-1], dtype=logits_BxLxV.dtype
        )
        - 1
      )
      loss_BxL = -jnp.sum(
        jax.nn.log_sigmoid(sign_BxLxV * logits_BxLxV), axis=-1
      )
    loss = jnp.sum(loss_BxL * mask_BxL) / objectives.count(
      found['tokens'], tokens
    )
    hit_BxL = jnp.argmax(logits_BxLxV, axis=-1) == target_BxL
    correct = jnp.sum(jnp.where(hit_BxL, mask_BxL, 0))
    found = {**found, 'correct_sum': correct, 'aux': aux}
    return loss + objectives.weighted(losses, aux), found

  return loss_of
