"""What a translator is worth: BLEU and chrF of its beam search."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import routers
from moe_jax.data import pairs
from moe_jax.evaluators import beam

Batch = dict[str, jax.Array]


def searcher(
  data: pairs.Pairs, width: int, penalty: float
) -> Callable[[nnx.Module, Batch, routers.Ctx], jax.Array]:
  """(model, batch, ctx) -> ids_BxL, the best translation of each source.

  Every step decodes the whole prefix again. All hypotheses of a sentence have
  its row number, so draws per sentence are the same for all of them. Routers
  have no capacity here: no sentence depends on another one.
  """

  def search(model, batch, ctx):
    B, L = batch['ids_BxL'].shape
    ctx = ctx.replace(writes=True)
    encoded, _ = model.encode(batch, ctx)
    wide = lambda a: jnp.repeat(a, width, axis=0)
    encoded, ctx = (
      jax.tree.map(wide, encoded),
      ctx.replace(row_B=wide(ctx.row_B)),
    )
    pos_NxL = jnp.tile(jnp.arange(L, dtype=jnp.int32), (B * width, 1))

    def logits_of(ids_NxL, step):
      segment_NxL = jnp.where(pos_NxL <= step, 0, -1)
      prefix = {
        'ids_BxL': ids_NxL,
        'pos_BxL': pos_NxL,
        'segment_BxL': segment_NxL,
      }
      logits_NxLxV, _ = model.decode(prefix, encoded, ctx)
      logits_NxV = jax.lax.dynamic_index_in_dim(
        logits_NxLxV, step, axis=1, keepdims=False
      )
      return logits_NxV.at[:, data.pad].set(-jnp.inf)

    ids_BxWxL, _ = beam.search(
      logits_of,
      B,
      L,
      beam=width,
      begin=data.begin,
      end=data.end,
      pad=data.pad,
      penalty=penalty,
    )
    return ids_BxWxL[:, 0]

  return search


def scores(
  data: pairs.Pairs,
  translate: Callable[[Batch, int], Any],
  batches: Iterable[Batch],
  references: list[dict[str, str]],
) -> dict[str, float]:
  """BLEU and chrF of the held-out pairs, beside those of copied sources.

  Args:
    translate: (batch, index of the batch) -> ids_BxL, of the whole batch.
    batches: what this process reads of them.
    references: what the whole batches hold, but for padding at their end.
  """
  hypotheses = []
  for index, batch in enumerate(batches):
    ids_BxL = np.asarray(translate(batch, index))
    hypotheses += [data.decode(ids_L[1:]) for ids_L in ids_BxL]
  hypotheses = hypotheses[: len(references)]
  targets = [pair['target'] for pair in references]
  sources = [pair['source'] for pair in references]
  found, copied = pairs.bleu(hypotheses, targets), pairs.bleu(sources, targets)
  return {
    **{f'eval_{name}': value for name, value in found.items()},
    **{f'copy_{name}': value for name, value in copied.items()},
  }
