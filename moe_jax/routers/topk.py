"""Top-k of softmax or sigmoid scores: the router of most published models."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import balance, ranges, routers
from moe_jax.init import NORMAL, TORCH

INITS = {'normal': NORMAL, 'torch': TORCH}


class Router(routers.Router):
  """The k best experts of each token.

  softmax: Mixtral, OLMoE, Qwen3-MoE; with renormalise=False DeepSeek-V2
  (arXiv 2405.04434) and CoE (2506.18945); with bias MomentumSMoE (2410.14574).
  sigmoid with bias_rate > 0: DeepSeek-V3 (2412.19437). Experts in groups, of
  which few are chosen from: DeepSeek-V2 (sec. 2.2.2) and V3.

  Args:
    k: experts per token.
    score: 'softmax' over all experts, or 'sigmoid' of each.
    renormalise: gates are divided by their sum over the k chosen.
    scale: gates are multiplied by it, after renormalising.
    bias: the logits have a learned bias, unlike `bias_rate` in the gates too.
    init: 'normal' draws the matrix from N(0, 0.02), the bias is 0; 'torch'
      draws both from U(-1, 1) / sqrt(D), as PyTorch's Linear does.
    bias_rate: step of the loss-free bias (2408.15664), which is added to the
      scores for the choice, never to the gates; 0 keeps no bias.
    expert_groups: into so many groups of neighbours experts are cut.
    groups_kept: from so many groups, the best, a token chooses its experts.
    group_best: how many of a group's best scores are summed to judge it.
    capacity: factor on the mean load; None is dropless.
    group: tokens that share a capacity: a part of a sequence, or as many whole
      sequences as have so many; None is one sequence.
  """

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: ranges.Count = 2,
    score: Literal['softmax', 'sigmoid'] = 'softmax',
    renormalise: bool = True,
    scale: ranges.Positive = 1.0,
    bias: bool = False,
    init: Annotated[str, ranges.OneOf(INITS)] = 'normal',
    bias_rate: ranges.NonNegative = 0.0,
    expert_groups: ranges.Count = 1,
    groups_kept: ranges.Count = 1,
    group_best: ranges.Count = 1,
    capacity: ranges.Positive | None = None,
    group: ranges.Count | None = None,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=k)
    _check_groups(E, k, expert_groups, groups_kept, group_best)
    self.k, self.score, self.renormalise = k, score, renormalise
    self.scale, self.bias, self.bias_rate = scale, bias, bias_rate
    self.capacity, self.group = capacity, group
    self.expert_groups, self.groups_kept = expert_groups, groups_kept
    self.group_best = group_best
    # A later token's first choice takes the place of an earlier one's second.
    self.causal = capacity is None or k == 1
    self.coupled = capacity is not None
    self.equivariant = capacity is None
    draw = INITS[init]
    self.w_DxE = nnx.Param(draw.weight(rngs.params(), (D, E), D, E))
    if bias:
      self.bias_logit_E = nnx.Param(draw.bias(rngs.params(), (E,), D))
    if bias_rate:
      self.bias_E = routers.RouterState(jnp.zeros((E,), jnp.float32))

  def __call__(self, x_TxD, ctx, memory):
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    E = logits_TxE.shape[1]
    if self.bias:
      logits_TxE += self.bias_logit_E[...].astype(logits_TxE.dtype)[None]
    # In logarithms: sigmoids may all be too small for a sum to divide by.
    if self.score == 'softmax':
      log_TxE = jax.nn.log_softmax(logits_TxE, axis=-1)
    else:
      log_TxE = jax.nn.log_sigmoid(logits_TxE)
    choice_TxE = jnp.exp(log_TxE)
    if self.bias_rate:
      choice_TxE += self.bias_E[...].astype(choice_TxE.dtype)[None]
    choice_TxE = self._within_groups(choice_TxE)
    expert_TxK = routers.choose(choice_TxE, self.k, ctx)
    log_TxK = jnp.take_along_axis(log_TxE, expert_TxK, axis=1)
    if self.renormalise:
      gate_TxK = jax.nn.softmax(log_TxK, axis=1)
    else:
      gate_TxK = jnp.exp(log_TxK)
    decision = routers.by_token(
      expert_TxK,
      gate_TxK * self.scale,
      E,
      ctx,
      rows=lambda n: routers.capacity_rows(self.capacity, n, self.k, E),
      group=self.group,
    )
    probs_TxE = jax.nn.softmax(log_TxE, axis=-1)
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    aux['losses']['z'] = balance.z(logits_TxE, ctx.real_T)
    return decision, aux, memory

  def _within_groups(self, choice_TxE):
    """The same, -inf outside of the groups that a token chooses from."""
    T, E = choice_TxE.shape
    N = self.expert_groups
    if self.groups_kept == N:
      return choice_TxE
    best = jax.lax.top_k(choice_TxE.reshape(T, N, E // N), self.group_best)[0]
    kept = jax.lax.top_k(jnp.sum(best, axis=2), self.groups_kept)[1]
    kept_TxN = jnp.any(jax.nn.one_hot(kept, N, dtype=bool), axis=1)
    return jnp.where(jnp.repeat(kept_TxN, E // N, axis=1), choice_TxE, -jnp.inf)

  def update(self, state, load_E):
    if not self.bias_rate:
      return state
    bias_E = balance.update_expert_bias(state['bias_E'], load_E, self.bias_rate)
    return {'bias_E': bias_E}


def _check_groups(E, k, groups, kept, best):
  """ValueError, with the values, for groups that no token could choose from."""
  if E % groups:
    raise ValueError(f'expert_groups={groups} does not divide {E} experts')
  size = E // groups
  if kept > groups or kept * size < k:
    raise ValueError(
      f'groups_kept={kept} of {groups} groups of {size} experts; k is {k}'
    )
  if best > size:
    raise ValueError(f'group_best={best} is not between 1 and {size} experts')
