"""Expert choice: each expert takes its best tokens, so loads are equal."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, plans, ranges, routers


class Router(routers.Router):
  """Zhou et al. 2022, arXiv 2202.09368: top tokens of softmax over experts.

  Not causal: a token's place depends on the tokens after it, so a language
  model trained with it sees the future.

  Args:
    k: experts per token in the mean: an expert takes ceil(k * group / E).
    group: tokens that an expert chooses among, see `topk`; None is a sequence.
  """

  causal, coupled, writes = False, True, False

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: ranges.Positive = 2,
    group: ranges.Count | None = None,
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=k)
    self.k, self.group = k, group
    self.equivariant = group is None
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    E = logits_TxE.shape[1]
    probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
    groups = routers.groups(ctx, self.group)
    S, P = groups.real_SxP.shape
    if ctx.replay is None:
      place_SxExC = self._choose(jax.lax.stop_gradient(probs_TxE), groups)
    else:
      place_SxExC = ctx.replay
    place_SxExC = checkpoint_name(place_SxExC, 'route')
    pad = (0, S * P - len(probs_TxE)), (0, 0)
    probs_SxExP = jnp.pad(probs_TxE, pad).reshape(S, P, E).swapaxes(1, 2)
    gate_SxExC = jnp.take_along_axis(
      probs_SxExP, jnp.minimum(place_SxExC, P - 1), axis=2
    )
    used_SxExC = (place_SxExC < P).astype(jnp.int32)
    left_T = jax.vmap(_left, (0, None))(place_SxExC, P).reshape(-1)
    aux = {
      'load_E': jnp.sum(used_SxExC, axis=(0, 2), dtype=jnp.int32),
      'dropped': balance.mean(left_T, groups.real_SxP.reshape(-1)),
      'route': place_SxExC,
      'entropy': balance.entropy(jax.lax.stop_gradient(probs_TxE), ctx.real_T),
      'losses': {'z': balance.z(logits_TxE, ctx.real_T)},
    }
    return plans.ExpertChoice(place_SxExC, gate_SxExC, P), aux, memory

  def _choose(self, probs_TxE, groups):
    """int32 [S, E, C]: places in the spans of `groups`; P is none."""
    (S, P), E = groups.real_SxP.shape, probs_TxE.shape[1]
    # A place without a token is worse than any other.
    score_NxExG = groups.cut(probs_TxE, -1).swapaxes(1, 2)
    rows = lambda n: min(n, routers.capacity_rows(1.0, n, self.k, E))
    rows_n = [rows(n) for n in range(groups.size + 1)]
    C = rows_n[-1]
    best_NxExC = jax.lax.top_k(score_NxExG, C)[1]
    place_NxExG = groups.place()[:, None]
    place_NxExC = jnp.take_along_axis(place_NxExG, best_NxExC, axis=2)
    rows_N = jnp.asarray(rows_n, jnp.int32)[groups.count()]
    taken_NxC = jnp.arange(C, dtype=jnp.int32)[None] < rows_N[:, None]
    place_NxExC = jnp.where(taken_NxC[:, None], place_NxExC, P)
    return place_NxExC.reshape(S, -1, E, C).swapaxes(1, 2).reshape(S, E, -1)


def _left(place_ExC, P):
  """float32 [P]: 1 for a token that no expert took."""
  return jnp.ones((P,)).at[place_ExC.reshape(-1)].set(0, mode='drop')
