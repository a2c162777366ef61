"""Switch: one expert per token, with a capacity and noisy training."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import balance, plan, routers


class Router(routers.Router):
  """Fedus et al. 2021, arXiv 2101.03961: the gate is the best probability.

  Args:
    capacity: factor on the mean load; None is dropless.
    group: tokens that share a capacity; None is one sequence.
    jitter: in training the tokens that the router sees are multiplied by
      uniform draws from [1 - jitter, 1 + jitter], a draw for each feature.
  """

  k = 1

  def __init__(
    self,
    D: int,
    E: int,
    *,
    capacity: float | None = 1.25,
    group: int | None = None,
    jitter: float = 0.0,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=1, capacity=capacity, group=group)
    if not 0 <= jitter < 1:
      raise ValueError(f'jitter is {jitter}, not in [0, 1)')
    self.capacity, self.group, self.jitter = capacity, group, jitter
    self.equivariant = capacity is None and not jitter
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    if self.jitter and ctx.train:
      draw = lambda key: jax.random.uniform(
        key,
        x_TxD.shape[1:],
        x_TxD.dtype,
        minval=1 - self.jitter,
        maxval=1 + self.jitter,
      )
      x_TxD *= jax.vmap(draw)(ctx.token_keys())
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    T, E = logits_TxE.shape
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    expert_Tx1 = routers.choose(probs_TxE, 1, ctx)
    gate_Tx1 = jnp.take_along_axis(probs_TxE, expert_Tx1, axis=1)
    group = min(self.group or ctx.length, T)
    capacity = routers.capacity_rows(self.capacity, group, 1, E)
    decision = plan.by_token(
      expert_Tx1, gate_Tx1, E, capacity=capacity, group=group
    )
    aux = routers.report(decision, expert_Tx1, probs_TxE, ctx)
    aux['losses']['z'] = balance.z(logits_TxE)
    return decision, aux, memory
