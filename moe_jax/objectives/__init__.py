"""What is optimised: (forward, batch, tokens) -> loss, metrics.

A file here defines `objective(*, losses, ...)`, a function of the weights of
the routers' losses and of its own options to such a function. It is found by
its name, as a router is.

`forward(batch, pass_)` returns the model's outputs and aux; an objective may
call it more than once, with another `pass_` for other random draws. Routers
report losses without weights; the weights are here. `tokens` is what sums over
targets are divided by: those of the whole step, shared out over its
microbatches; None counts this batch's.

Metrics are sums over the targets with mask 1: `nll_sum` (nats), `tokens`,
whatever else an objective counts, and the model's `aux`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import byname, ranges, routers

Forward = Callable[..., tuple[jax.Array, routers.Aux]]
Losses = dict[str, ranges.NonNegative]


def cross_entropy(logits_BxLxV: jax.Array, target_BxL: jax.Array) -> jax.Array:
  """nll_BxL in nats."""
  picked_BxL = jnp.take_along_axis(
    logits_BxLxV, target_BxL[..., None], axis=-1
  )[..., 0]
  return jax.nn.logsumexp(logits_BxLxV, axis=-1) - picked_BxL


def smoothed(
  logits_BxLxV: jax.Array, target_BxL: jax.Array, smoothing: float
) -> jax.Array:
  """Cross-entropy with a target that gives `smoothing` to all other classes.

  Each of the V - 1 others gets smoothing / (V - 1), as in fairseq.
  """
  nll_BxL = cross_entropy(logits_BxLxV, target_BxL)
  if not smoothing:
    return nll_BxL
  V = logits_BxLxV.shape[-1]
  all_BxL = V * jax.nn.logsumexp(logits_BxLxV, axis=-1)
  all_BxL -= jnp.sum(logits_BxLxV, axis=-1)
  each = smoothing / (V - 1)
  return (1 - smoothing - each) * nll_BxL + each * all_BxL


def weighted(losses: Losses, aux: routers.Aux) -> jax.Array | float:
  """The router losses of all layers, each times its weight."""
  total = 0.0
  for found in aux:
    for name, weight in losses.items():
      if weight and name in found['losses']:
        total += weight * jnp.sum(found['losses'][name])
  return total


def nll(
  logits_BxLxV: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(mask_BxL, the metrics that every objective has)."""
  nll_BxL = cross_entropy(logits_BxLxV, batch['target_BxL'])
  mask_BxL = batch['mask_BxL'].astype(nll_BxL.dtype)
  sums = {'nll_sum': jnp.sum(nll_BxL * mask_BxL), 'tokens': jnp.sum(mask_BxL)}
  return mask_BxL, sums


def count(here: jax.Array, tokens: jax.Array | None) -> jax.Array:
  """What a sum over targets is divided by: `tokens`, or those `here`."""
  found = here if tokens is None else tokens.astype(here.dtype)
  return jnp.maximum(found, 1)


def names() -> list[str]:
  """The objectives that exist."""
  return byname.names(__name__)


def objective(name: str) -> Callable[..., Callable]:
  """The one of that name, a function of its options; ValueError without."""
  return byname.find(__name__, 'objective', name).objective


def get(name: str, **options) -> Callable[..., tuple]:
  """The objective of that name with these options; ValueError without."""
  make = objective(name)
  ranges.check(make, options)
  return make(**options)
