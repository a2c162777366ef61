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
    group = min(self.group or ctx.length, T)
    if T % group:
      raise ValueError(f'{T} tokens are not a multiple of the group {group}')
    probs_NxExS = probs_TxE.reshape(-1, group, E).swapaxes(1, 2)
    if ctx.forced is None:
      capacity = min(group, routers.capacity_rows(1.0, group, self.k, E))
      score_NxExS = jax.lax.stop_gradient(probs_NxExS)
      place_NxExC = jax.lax.top_k(score_NxExS, capacity)[1]
    else:
      place_NxExC = ctx.forced
    place_NxExC = checkpoint_name(place_NxExC, 'route')
    gate_NxExC = jnp.take_along_axis(probs_NxExS, place_NxExC, axis=2)
    N, _, C = place_NxExC.shape
    aux = {
      'load_E': jnp.full((E,), N * C, jnp.int32),
      'dropped': jnp.mean(jax.vmap(_left, (0, None))(place_NxExC, group)),
      'route': place_NxExC,
      'entropy': balance.entropy(jax.lax.stop_gradient(probs_TxE)),
      'losses': {'z': balance.z(logits_TxE)},
    }
    return plan.ByExpert(place_NxExC, gate_NxExC, group), aux, memory


def _left(place_ExC, group):
  """float32 [group]: 1 for a token that no expert took."""
  return jnp.ones((group,)).at[place_ExC.reshape(-1)].set(0)
