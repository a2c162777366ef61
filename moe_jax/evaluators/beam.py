"""Beam search over any next-token model.

A hypothesis is `begin`, some tokens and `end`. Its score is the sum of its
tokens' log-probabilities over (number of tokens ** penalty); `end` is a token
of it, `begin` is not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class State(NamedTuple):
  """What the search knows after position `step`."""

  step: jax.Array  # int32 []
  live_BxWxL: jax.Array  # hypotheses without an end
  sum_BxW: jax.Array  # their log-probabilities, best first; -inf is none
  ids_BxWxL: jax.Array  # the best hypotheses with an end
  score_BxW: jax.Array  # their scores, best first; -inf is none


def search(
  logits_of: Callable[[jax.Array, jax.Array], jax.Array],
  batch_rows: int,
  length: int,
  *,
  beam: int,
  begin: int,
  end: int,
  pad: int,
  penalty: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """The `beam` best hypotheses found for each of `batch_rows` sentences.

  Each step takes the W = `beam` best one-token extensions of a sentence's live
  hypotheses, so W = 1 is greedy. Those that end leave the beam, and the best W
  of them are kept. A sentence is done once no live hypothesis can score better
  than the worst one kept, whatever follows; the search, once all are. The last
  of the `length` positions can only be `end`. Among equals the one that ended
  earlier wins, then the better beam, then the smaller token.

  Args:
    logits_of: (ids_NxL int32, step int32 []) -> logits_NxV of the token at
      step + 1. N = B * W; rows b*W .. b*W+W-1 are sentence b. Positions after
      `step` hold `pad`; rows without a hypothesis hold anything. A token with
      logit -inf is never taken.
    length: L >= 2, `begin` and `end` included.
    pad: fills what follows `end`. It is a token like any other to the search.

  Returns:
    ids_BxWxL int32 and score_BxW in the logits' type, but at least float32;
    best first. Where fewer than W were found, ids are all `pad` and the score
    is -inf.

  Raises:
    ValueError: a size is too small, or `end` is not in the vocabulary.
  """
  B, W, L = batch_rows, beam, length
  if min(B, W) < 1 or L < 2:
    raise ValueError(
      f'batch_rows={B} and beam={W} must be at least 1, length={L} at least 2'
    )
  blank_BxWxL = jnp.full((B, W, L), pad, jnp.int32)
  live_BxWxL = blank_BxWxL.at[:, :, 0].set(begin)
  logits = jax.eval_shape(
    logits_of, live_BxWxL.reshape(B * W, L), jnp.zeros((), jnp.int32)
  )
  V = logits.shape[-1]
  if not 0 <= end < V:
    raise ValueError(f'end={end} is not one of the {V} tokens')
  dtype = np.promote_types(logits.dtype, jnp.float32)
  none_BxW = jnp.full((B, W), -jnp.inf, dtype)
  start = State(
    step=jnp.zeros((), jnp.int32),
    live_BxWxL=live_BxWxL,
    sum_BxW=none_BxW.at[:, 0].set(0),  # one hypothesis, not W times the same
    ids_BxWxL=blank_BxWxL,
    score_BxW=none_BxW,
  )
  # By the number of tokens, from 1.
  norm_L = jnp.asarray(np.arange(1, L, dtype=np.float64) ** penalty, dtype)

  def go_on(state):
    return (state.step < L - 1) & jnp.any(state.sum_BxW != -jnp.inf)

  def extend(state):
    logits_NxV = logits_of(state.live_BxWxL.reshape(B * W, L), state.step)
    logp_BxWxV = _log_softmax(logits_NxV.astype(dtype)).reshape(B, W, V)
    may_V = (jnp.arange(V) == end) | (state.step < L - 2)
    may_BxWxV = (state.sum_BxW != -jnp.inf)[:, :, None] & may_V[None, None, :]
    sum_BxWxV = jnp.where(
      may_BxWxV, state.sum_BxW[:, :, None] + logp_BxWxV, -jnp.inf
    )
    sum_BxW, place_BxW = jax.lax.top_k(sum_BxWxV.reshape(B, W * V), W)
    token_BxW = place_BxW % V
    live_BxWxL = _rows(state.live_BxWxL, place_BxW // V)
    live_BxWxL = live_BxWxL.at[:, :, state.step + 1].set(token_BxW)

    ended_BxW = token_BxW == end
    found_BxW = jnp.where(ended_BxW, sum_BxW / norm_L[state.step], -jnp.inf)
    score_BxW, kept_BxW = jax.lax.top_k(
      jnp.concatenate([state.score_BxW, found_BxW], axis=1), W
    )
    ids_BxWxL = _rows(
      jnp.concatenate([state.ids_BxWxL, live_BxWxL], axis=1), kept_BxW
    )

    sum_BxW = jnp.where(ended_BxW, -jnp.inf, sum_BxW)
    # At best the other tokens cost nothing: then the score is extreme at one
    # of the two lengths that are left, the next or the last.
    next_norm = norm_L[jnp.minimum(state.step + 1, L - 2)]
    best_BxW = jnp.maximum(sum_BxW / next_norm, sum_BxW / norm_L[-1])
    # NaN is not hopeless: it lives on, to be seen in the score.
    hopeless_BxW = best_BxW <= score_BxW[:, -1:]
    done_Bx1 = jnp.all(hopeless_BxW, axis=1, keepdims=True)
    return State(
      step=state.step + 1,
      live_BxWxL=live_BxWxL,
      sum_BxW=jnp.where(done_Bx1, -jnp.inf, sum_BxW),
      ids_BxWxL=ids_BxWxL,
      score_BxW=score_BxW,
    )

  last = jax.lax.while_loop(go_on, extend, start)
  return last.ids_BxWxL, last.score_BxW


def _rows(x_BxMxL: jax.Array, index_BxW: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BxMxL, index_BxW[:, :, None], axis=1)


def _log_softmax(logits_NxV: jax.Array) -> jax.Array:
  """log_softmax in which -inf stays -inf, also where a row has nothing else."""
  return jnp.where(
    logits_NxV == -jnp.inf, -jnp.inf, jax.nn.log_softmax(logits_NxV)
  )
