"""Random experts: a control for every learned router, and THOR's draw."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import plan, routers


class Router(routers.Router):
  """k distinct experts, uniformly at random, each with gate 1 / k.

  Zuo et al. 2021 (THOR, arXiv 2110.04260) with k = 1.

  Args:
    k: experts per token.
    per: what shares a draw: 'token', 'sequence' or 'batch'.
  """

  equivariant = False

  def __init__(
    self, D: int, E: int, *, k: int = 1, per: str = 'token', rngs: nnx.Rngs
  ):
    del D, rngs  # nothing is learned
    routers.check(E, k=k)
    if per not in ('token', 'sequence', 'batch'):
      raise ValueError(f"per is {per!r}, not 'token', 'sequence' or 'batch'")
    self.k, self.E, self.per = k, E, per

  def __call__(self, x_TxD, ctx, memory):
    T = x_TxD.shape[0]
    if self.per == 'batch':
      keys_T = jnp.broadcast_to(ctx.batch_key, (T,))
    elif self.per == 'sequence':
      fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
      keys_T = fold(ctx.key, ctx.row_T)
    else:
      keys_T = ctx.token_keys()
    wide = np.promote_types(x_TxD.dtype, jnp.float32)
    score_TxE = jax.vmap(lambda key: jax.random.uniform(key, (self.E,)))(keys_T)
    expert_TxK = routers.choose(score_TxE, self.k, ctx)
    gate_TxK = jnp.full((T, self.k), 1 / self.k, wide)
    decision = plan.by_token(expert_TxK, gate_TxK, self.E)
    probs_TxE = jnp.full((T, self.E), 1 / self.E, wide)
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    aux['losses'] = {}  # there is nothing to balance
    return decision, aux, memory
