"""What is optimised: (forward, batch) -> loss, metrics.

`forward(batch, pass_)` returns the model's outputs and aux; an objective may
call it more than once, with another `pass_` for other random draws. Routers
report losses without weights; the weights are here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Forward = Callable[..., tuple[jax.Array, dict[str, Any]]]


def next_token(losses: dict[str, float]) -> Callable[..., tuple]:
  """Cross-entropy of the next token, and the routers' losses.

  Args:
    losses: weight of each router loss, summed over layers and iterations. A
      loss that the router in use does not report counts nothing.

  Returns:
    A function whose metrics are `nll_sum` (nats) and `tokens` over the targets
    with mask 1, and the model's `aux`. Its loss is the mean plus the router
    losses.
  """

  def objective(forward: Forward, batch: dict[str, jax.Array]):
    logits_BxLxV, aux = forward(batch, pass_=0)
    nll_BxL = cross_entropy(logits_BxLxV, batch['target_BxL'])
    mask_BxL = batch['mask_BxL'].astype(nll_BxL.dtype)
    nll_sum, tokens = jnp.sum(nll_BxL * mask_BxL), jnp.sum(mask_BxL)
    loss = nll_sum / jnp.maximum(tokens, 1) + weighted(losses, aux)
    return loss, {'nll_sum': nll_sum, 'tokens': tokens, 'aux': aux}

  return objective


def cross_entropy(logits_BxLxV: jax.Array, target_BxL: jax.Array) -> jax.Array:
  """nll_BxL in nats."""
  picked_BxL = jnp.take_along_axis(
    logits_BxLxV, target_BxL[..., None], axis=-1
  )[..., 0]
  return jax.nn.logsumexp(logits_BxLxV, axis=-1) - picked_BxL


def weighted(
  losses: dict[str, float], aux: dict[str, Any]
) -> jax.Array | float:
  """The router losses of all layers, each times its weight."""
  total = 0.0
  for name, weight in losses.items():
    if weight and name in aux.get('losses', {}):
      total += weight * jnp.sum(aux['losses'][name])
  return total


OBJECTIVES = {'next_token': next_token}


def get(name: str, **options) -> Callable[..., tuple]:
  """The objective of that name; ValueError if there is none."""
  if name not in OBJECTIVES:
    known = ', '.join(OBJECTIVES)
    raise ValueError(f'no objective {name!r}; there are {known}')
  return OBJECTIVES[name](**options)
