"""Expert choice: each expert takes its best tokens, so loads are equal."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, plan, routers


class Router(routers.Router):
  """Zhou et al. 2022, arXiv 2202.09368: top tokens of softmax over experts.

  Not causal: a token's place depends on the tokens after it, so a language
  model trained with it sees the future.

  Args:
    k: experts per token in the mean: an expert takes ceil(k * group / E).
    group: tokens that an expert chooses among; None is one sequence.
  """

  causal = False

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: float = 2,
    group: int | None = None,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=k, group=group)
    self.k, self.group = k, group
    self.equivariant = group is None
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    T, E = logits_TxE.shape
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    if ctx.forced is None:
      group = min(self.group or ctx.length, T)
      capacity = min(group, routers.capacity_rows(1.0, group, self.k, E))
      token_ExC = _best_tokens(probs_TxE, group, capacity)
    else:
      token_ExC = ctx.forced
    token_ExC = checkpoint_name(token_ExC, 'route')
    gate_ExC = jnp.take_along_axis(probs_TxE.T, token_ExC, axis=1)
    left_T = jnp.ones((T,), bool).at[token_ExC.reshape(-1)].set(False)
    aux = {
      'load_E': jnp.full((E,), token_ExC.shape[1], jnp.int32),
      'dropped': jnp.mean(left_T.astype(jnp.float32)),  # of the tokens
      'route': token_ExC,
      'entropy': balance.entropy(jax.lax.stop_gradient(probs_TxE)),
      'losses': {'z': balance.z(logits_TxE)},
    }
    return plan.by_expert(token_ExC, gate_ExC), aux, memory


def _best_tokens(probs_TxE, group, capacity):
  """int32 [E, T / group * capacity]: the tokens each expert takes."""
  T, E = probs_TxE.shape
  if T % group:
    raise ValueError(f'{T} tokens are not a multiple of the group {group}')
  probs_NxExS = probs_TxE.reshape(-1, group, E).swapaxes(1, 2)
  place_NxExC = jax.lax.top_k(jax.lax.stop_gradient(probs_NxExS), capacity)[1]
  start_N = jnp.arange(0, T, group, dtype=jnp.int32)
  token_NxExC = place_NxExC + start_N[:, None, None]
  return token_NxExC.swapaxes(0, 1).reshape(E, -1)
