"""What is optimised: (forward, batch, tokens) -> loss, metrics.

`forward(batch, pass_)` returns the model's outputs and aux; an objective may
call it more than once, with another `pass_` for other random draws. Routers
report losses without weights; the weights are here. `tokens` is what sums over
targets are divided by: those of the whole step, shared out over its
microbatches; None counts this batch's.

Metrics are sums over the targets with mask 1: `nll_sum` (nats), `tokens`,
whatever else an objective counts, and the model's `aux`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import ranges

Forward = Callable[..., tuple[jax.Array, list[dict[str, Any]]]]
Losses = dict[str, ranges.NonNegative]


def next_token(*, losses: Losses, smoothing: ranges.Fraction = 0.0) -> Callable:
  """Cross-entropy of the next token, and the routers' losses.

  Args:
    losses: weight of each router loss, summed over layers and iterations. One
      that the router does not report counts nothing here; config.resolve
      refuses it unless it is one of config.LOSSES.
    smoothing: of the labels, see `smoothed`; metrics stay without it.
  """

  def objective(forward: Forward, batch: dict[str, jax.Array], tokens=None):
    logits_BxLxV, aux = forward(batch, pass_=0)
    mask_BxL, found = _nll(logits_BxLxV, batch)
    loss_BxL = smoothed(logits_BxLxV, batch['target_BxL'], smoothing)
    loss = jnp.sum(loss_BxL * mask_BxL) / _count(found['tokens'], tokens)
    return loss + weighted(losses, aux), {**found, 'aux': aux}

  return objective


def consistency(
  *,
  losses: Losses,
  alpha: ranges.NonNegative = 5.0,
  smoothing: ranges.Fraction = 0.1,
) -> Callable:
  """Two passes that shall agree (THOR, Zuo et al. 2021, arXiv 2110.04260).

  The sum of both passes' smoothed cross-entropies and alpha times the
  symmetric divergence 1/2 sum (p - q)(log p - log q), over the targets. With
  one expert and dropout it is R-Drop (arXiv 2106.14448). Metrics are of the
  first pass, and `consistency_sum` is the divergence in nats.
  """

  def objective(forward: Forward, batch: dict[str, jax.Array], tokens=None):
    p_BxLxV, aux = forward(batch, pass_=0)
    q_BxLxV, other = forward(batch, pass_=1)
    mask_BxL, found = _nll(p_BxLxV, batch)
    target_BxL = batch['target_BxL']
    loss_BxL = smoothed(p_BxLxV, target_BxL, smoothing)
    loss_BxL += smoothed(q_BxLxV, target_BxL, smoothing)
    apart = jnp.sum(divergence(p_BxLxV, q_BxLxV) * mask_BxL)
    loss = jnp.sum(loss_BxL * mask_BxL) + alpha * apart
    loss = loss / _count(found['tokens'], tokens)
    loss += weighted(losses, aux) + weighted(losses, other)
    aux = [
      {**a, 'load_E': a['load_E'] + b['load_E']}
      for a, b in zip(aux, other, strict=True)
    ]
    return loss, {**found, 'consistency_sum': apart, 'aux': aux}

  return objective


def classification(*, losses: Losses, sigmoid: bool = False) -> Callable:
  """The class of an image: a sequence with one target.

  Args:
    sigmoid: a binary cross-entropy for every class, summed (V-MoE, arXiv
      2106.05974), in place of the softmax's; metrics are the softmax's.

  Returns:
    An objective whose metrics also have `correct_sum`.
  """

  def objective(forward: Forward, batch: dict[str, jax.Array], tokens=None):
    logits_BxLxV, aux = forward(batch, pass_=0)
    mask_BxL, found = _nll(logits_BxLxV, batch)
    target_BxL = batch['target_BxL']
    loss_BxL = smoothed(logits_BxLxV, target_BxL, 0.0)
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
    loss = jnp.sum(loss_BxL * mask_BxL) / _count(found['tokens'], tokens)
    hit_BxL = jnp.argmax(logits_BxLxV, axis=-1) == target_BxL
    correct = jnp.sum(jnp.where(hit_BxL, mask_BxL, 0))
    found = {**found, 'correct_sum': correct, 'aux': aux}
    return loss + weighted(losses, aux), found

  return objective


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


def divergence(p_BxLxV: jax.Array, q_BxLxV: jax.Array) -> jax.Array:
  """[B, L] 1/2 (KL(p || q) + KL(q || p)) of two sets of logits, in nats."""
  p, q = jax.nn.log_softmax(p_BxLxV), jax.nn.log_softmax(q_BxLxV)
  return 0.5 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)


def weighted(losses: Losses, aux: list[dict[str, Any]]) -> jax.Array | float:
  """The router losses of all layers, each times its weight."""
  total = 0.0
  for found in aux:
    for name, weight in losses.items():
      if weight and name in found['losses']:
        total += weight * jnp.sum(found['losses'][name])
  return total


def _nll(logits_BxLxV, batch):
  """(mask_BxL, the metrics that every objective has)."""
  nll_BxL = cross_entropy(logits_BxLxV, batch['target_BxL'])
  mask_BxL = batch['mask_BxL'].astype(nll_BxL.dtype)
  sums = {'nll_sum': jnp.sum(nll_BxL * mask_BxL), 'tokens': jnp.sum(mask_BxL)}
  return mask_BxL, sums


def _count(here, tokens):
  count = here if tokens is None else tokens.astype(here.dtype)
  return jnp.maximum(count, 1)


OBJECTIVES = {
  'next_token': next_token,
  'consistency': consistency,
  'classification': classification,
}


def get(name: str, **options) -> Callable[..., tuple]:
  """The objective of that name; ValueError if there is none such."""
  if name not in OBJECTIVES:
    known = ', '.join(OBJECTIVES)
    raise ValueError(f'no objective {name!r}; there are {known}')
  ranges.check(OBJECTIVES[name], options)
  return OBJECTIVES[name](**options)
