"""V-MoE: noisy top-k, with losses for importance and load."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import balance, ranges, routers


class Router(routers.Router):
  """Riquelme et al. 2021, arXiv 2106.05974, section 2 and appendix A.

  In training the logits get noise from N(0, (noise / E)^2), a draw for each
  token and expert. Gates are the probabilities over all experts, not
  renormalised. The losses 'importance' and 'smooth_load' are 0 at perfect
  balance; the latter is there in training with noise alone.

  Args:
    k: experts per token.
    noise: standard deviation, times the number of experts.
    capacity: factor on the mean load in training; None is dropless. Rows are
      rounded up to a multiple of 4.
    eval_capacity: the same out of training.
    group: tokens that share a capacity, and among which the losses balance, see
      `topk`; None is one sequence.
  """

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: ranges.Count = 2,
    noise: ranges.NonNegative = 1.0,
    capacity: ranges.Positive | None = 1.05,
    eval_capacity: ranges.Positive | None = 4.0,
    group: ranges.Count | None = None,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=k)
    self.k, self.noise, self.group = k, noise, group
    self.capacity, self.eval_capacity = capacity, eval_capacity
    dropless = capacity is None and eval_capacity is None
    # A later token's first choice takes the place of an earlier one's second.
    self.causal = dropless or k == 1
    self.coupled = eval_capacity is not None
    self.equivariant = dropless and not noise
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    logits_TxE = noisy_TxE = routers.logits(x_TxD, self.w_DxE[...])
    E = logits_TxE.shape[1]
    noise = self.noise / E if ctx.train else 0.0
    if noise:
      draw = lambda key: jax.random.normal(key, (E,), logits_TxE.dtype)
      noisy_TxE += noise * jax.vmap(draw)(ctx.token_keys())
    chance_TxE = jax.nn.softmax(noisy_TxE, axis=-1)
    expert_TxK = routers.choose(chance_TxE, self.k, ctx)
    decision = routers.by_token(
      expert_TxK,
      jnp.take_along_axis(chance_TxE, expert_TxK, axis=1),
      E,
      ctx,
      rows=lambda n: self._rows(n, E, ctx.train),
      group=self.group,
    )
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    groups = routers.groups(ctx, self.group)
    spread = lambda a: balance.cv_squared(groups.cut(a, 0), groups.count())
    aux['losses']['z'] = balance.z(logits_TxE, ctx.real_T)
    aux['losses']['importance'] = spread(probs_TxE)
    if noise:
      least_Tx1 = jnp.take_along_axis(noisy_TxE, expert_TxK[:, -1:], axis=1)
      again_TxE = jax.scipy.special.ndtr((logits_TxE - least_Tx1) / noise)
      aux['losses']['smooth_load'] = spread(again_TxE)
    return decision, aux, memory

  def _rows(self, tokens, E, train):
    factor = self.capacity if train else self.eval_capacity
    rows = routers.capacity_rows(factor, tokens, self.k, E)
    return rows and rows + -rows % 4
