"""Switch: one expert per token, with a capacity and noisy training."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import balance, ranges, routers


class Router(routers.Router):
  """Fedus et al. 2021, arXiv 2101.03961: the gate is the best probability.

  Args:
    capacity: factor on the mean load; None is dropless.
    group: tokens that share a capacity, see `topk`; None is one sequence.
    jitter: in training the tokens that the router sees are multiplied by
      uniform draws from [1 - jitter, 1 + jitter], a draw for each feature.
  """

  k = 1

  def __init__(
    self,
    D: int,
    E: int,
    *,
    capacity: ranges.Positive | None = 1.25,
    group: ranges.Count | None = None,
    jitter: Annotated[float, ranges.Within('[0, 1)')] = 0.0,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=1)
    self.capacity, self.group, self.jitter = capacity, group, jitter
    self.coupled = capacity is not None
    self.equivariant = capacity is None and not jitter
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    if self.jitter and ctx.train:
      # Wide, as bfloat16 would round draws, to outside of the bounds too.
      wide = np.promote_types(x_TxD.dtype, jnp.float32)
      draw = lambda key: jax.random.uniform(
        key,
        x_TxD.shape[1:],
        wide,
        minval=1 - self.jitter,
        maxval=1 + self.jitter,
      )
      x_TxD = x_TxD.astype(wide) * jax.vmap(draw)(ctx.token_keys())
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    E = logits_TxE.shape[1]
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    expert_Tx1 = routers.choose(probs_TxE, 1, ctx)
    gate_Tx1 = jnp.take_along_axis(probs_TxE, expert_Tx1, axis=1)
    decision = routers.by_token(
      expert_Tx1,
      gate_Tx1,
      E,
      ctx,
      rows=lambda n: routers.capacity_rows(self.capacity, n, 1, E),
      group=self.group,
    )
    aux = routers.report(decision, expert_Tx1, probs_TxE, ctx)
    aux['losses']['z'] = balance.z(logits_TxE, ctx.real_T)
    return decision, aux, memory
