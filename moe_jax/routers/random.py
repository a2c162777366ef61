"""Random experts: a control for every learned router, and THOR's draws."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import ranges, routers

PER = ('token', 'sequence', 'batch', 'position', 'fixed', 'ensemble')


class Router(routers.Router):
  """k distinct experts, uniformly at random, each with gate 1 / k.

  Zuo et al. 2021 (THOR, arXiv 2110.04260): k = 1, per='batch', and its ways to
  dispatch at inference are `eval_per`.

  Args:
    k: experts per token; 1 with 'fixed' and 'ensemble'.
    per: what shares a draw: 'token', 'sequence', 'batch' (a microbatch), or
      'position', a place in the sequence, in all rows. Nothing is drawn with
      'fixed', one expert for all, nor with 'ensemble', the mean of all experts.
    eval_per: the same out of training; None is `per`.
    fixed: the expert of 'fixed'.
  """

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: ranges.Count = 1,
    per: Annotated[str, ranges.OneOf(PER)] = 'token',
    eval_per: Annotated[str, ranges.OneOf(PER)] | None = None,
    fixed: ranges.Natural = 0,
    rngs: nnx.Rngs,
  ):
    del D, rngs  # nothing is learned
    routers.check(E, k=k)
    eval_per = per if eval_per is None else eval_per
    for name, value in (('per', per), ('eval_per', eval_per)):
      if value in ('fixed', 'ensemble') and k > 1:
        raise ValueError(f'k is {k}, but {name}={value!r} draws none')
    if fixed >= E:
      raise ValueError(f'fixed is {fixed}, not one of the {E} experts')
    self.k = E if per == 'ensemble' else k
    self.E, self.drawn, self.fixed = E, k, fixed
    self.per, self.eval_per = per, eval_per
    # Else the draws are alike for all tokens of a sequence.
    self.equivariant = not {'token', 'position'} & {per, eval_per}

  def __call__(self, x_TxD, ctx, memory):
    T, E = x_TxD.shape[0], self.E
    per = self.per if ctx.train else self.eval_per
    k = E if per == 'ensemble' else self.drawn
    if per in ('fixed', 'ensemble'):
      score_E = jnp.arange(E, dtype=jnp.int32) == self.fixed
      score_TxE = jnp.broadcast_to(score_E.astype(jnp.float32), (T, E))
    else:
      draw = lambda key: jax.random.uniform(key, (E,))
      score_TxE = jax.vmap(draw)(_keys(per, ctx, T))
    expert_TxK = routers.choose(score_TxE, k, ctx)
    wide = np.promote_types(x_TxD.dtype, jnp.float32)
    gate_TxK = jnp.full((T, k), 1 / k, wide)
    decision = routers.by_token(expert_TxK, gate_TxK, E, ctx)
    probs_TxE = jnp.full((T, E), 1 / E, wide)
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    aux['losses'] = {}  # there is nothing to balance
    return decision, aux, memory


def _keys(per, ctx, T):
  """[T] keys, the same for tokens that share a draw."""
  if per == 'token':
    return ctx.token_keys()
  if per == 'batch':
    return jnp.broadcast_to(ctx.batch_key, (T,))
  if per == 'sequence':
    place_T = ctx.row_T
  else:
    place_T = ctx.place_T
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(ctx.key, place_T)
