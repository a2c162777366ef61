"""Which rows exist, and where they go: integers and gathers, no parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


class Plan(NamedTuple):
  """Rows grouped by expert.

  The first group_E[0] rows belong to expert 0, the next group_E[1] to expert
  1, and so on; rows from sum(group_E) on are dropped assignments, and what an
  expert writes there is undefined.
  """

  token_M: jax.Array  # int32, the token that each row is a copy of
  weight_M: jax.Array  # float, the gate of each row
  group_E: jax.Array  # int32, rows per expert
  home_TxK: jax.Array | None  # int32, the row of each choice of each token


def by_token(
  expert_TxK: jax.Array,
  weight_TxK: jax.Array,
  E: int,
  *,
  capacity: int | None = None,
  group: int | None = None,
) -> Plan:
  """The plan in which each token chose K experts; M = T * K rows.

  Args:
    expert_TxK: int32 in [0, E]; E means no expert: the choice is dropped.
    weight_TxK: the gates; gradients pass through them.
    E: number of experts.
    capacity: rows that an expert takes from one group of tokens; the rest is
      dropped. All first choices in token order come before any second choice
      (Switch, arXiv 2101.03961; V-MoE, arXiv 2106.05974). None keeps all.
    group: consecutive tokens that share a capacity; None takes all T.
  """
  T, K = expert_TxK.shape
  if capacity is not None:
    expert_TxK = _drop_overflow(expert_TxK, E, capacity, group or T)
  expert_M = expert_TxK.reshape(T * K)
  # Named, so that rematerialisation saves them and does not sort again.
  order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
  order_M = checkpoint_name(order_M, 'plan')
  home_M = checkpoint_name(_inverse(order_M), 'plan')
  return Plan(
    token_M=order_M // K,
    weight_M=_permute(weight_TxK.reshape(T * K), order_M, home_M),
    group_E=checkpoint_name(count(expert_M, E), 'plan'),
    home_TxK=home_M.reshape(T, K),
  )


def by_expert(token_ExC: jax.Array, weight_ExC: jax.Array) -> Plan:
  """The plan in which each expert chose C tokens; M = E * C rows."""
  E, C = token_ExC.shape
  return Plan(
    token_M=token_ExC.reshape(E * C),
    weight_M=weight_ExC.reshape(E * C),
    group_E=jnp.full((E,), C, jnp.int32),
    home_TxK=None,
  )


def dispatch(x_TxD: jax.Array, plan: Plan) -> jax.Array:
  """Copies tokens to rows_MxD; rows of dropped assignments are zero."""
  if plan.home_TxK is None:
    return x_TxD[plan.token_M]
  return _dispatch(x_TxD, plan.token_M, plan.home_TxK, plan.group_E)


def combine(y_MxD: jax.Array, plan: Plan, T: int) -> jax.Array:
  """y_TxD: the gated sum of each token's rows; a token without rows gets 0."""
  if plan.home_TxK is None:
    rows_MxD = _weighted(y_MxD, plan.weight_M)
    zeros_TxD = jnp.zeros((T, rows_MxD.shape[1]), rows_MxD.dtype)
    return zeros_TxD.at[plan.token_M].add(rows_MxD).astype(y_MxD.dtype)
  return _combine(
    y_MxD, plan.weight_M, plan.token_M, plan.home_TxK, plan.group_E
  )


def count(expert_M: jax.Array, E: int) -> jax.Array:
  """int32 [E]: how often each expert was chosen; the id E is not counted."""
  expert_ids_E = jnp.arange(E, dtype=expert_M.dtype)
  return jnp.sum(
    expert_M.reshape(1, -1) == expert_ids_E[:, None], axis=1, dtype=jnp.int32
  )


def dropped(plan: Plan) -> jax.Array:
  """float32 scalar: the fraction of the plan's M assignments without a row."""
  M = plan.token_M.shape[0]
  return (M - _rows(plan.group_E)).astype(jnp.float32) / M


def _drop_overflow(expert_TxK, E, capacity, group):
  """Gives id E to every choice beyond an expert's capacity in its group."""
  T, K = expert_TxK.shape
  if T % group:
    raise ValueError(f'{T} tokens are not a multiple of the group {group}')
  groups = T // group
  # Choices in order of precedence: group by group, first choices first.
  expert_P = expert_TxK.reshape(groups, group, K).swapaxes(1, 2).reshape(-1)
  group_P = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), group * K)
  # The place of a choice among those for the same expert, by one stable sort.
  bucket_P = group_P * (E + 1) + expert_P
  order_P = jnp.argsort(bucket_P, stable=True).astype(jnp.int32)
  sorted_P = bucket_P[order_P]
  start_P = jnp.searchsorted(sorted_P, sorted_P, side='left')
  place_P = jnp.arange(T * K, dtype=jnp.int32) - start_P.astype(jnp.int32)
  kept_P = (place_P < capacity)[_inverse(order_P)]
  expert_P = jnp.where(kept_P, expert_P, E)
  return expert_P.reshape(groups, K, group).swapaxes(1, 2).reshape(T, K)


def _inverse(order_M):
  M = order_M.shape[0]
  rows_M = jnp.arange(M, dtype=jnp.int32)
  return jnp.zeros((M,), jnp.int32).at[order_M].set(rows_M, unique_indices=True)


# A row has one token and a choice has one row, so the transpose of each gather
# below is a gather too: exact, in a fixed order, and faster than a scatter.


@jax.custom_vjp
def _permute(weight_M, order_M, home_M):
  return weight_M[order_M]


def _permute_fwd(weight_M, order_M, home_M):
  return weight_M[order_M], home_M


def _permute_bwd(home_M, d_weight_M):
  return d_weight_M[home_M], None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def _weighted(y_MxD, weight_M):
  """Rows times their gates, in the wider of the two types."""
  wide = np.promote_types(y_MxD.dtype, weight_M.dtype)
  return y_MxD.astype(wide) * weight_M[:, None].astype(wide)


def _rows(group_E):
  """int32 scalar: the rows that belong to an expert."""
  return jnp.sum(group_E, dtype=jnp.int32)


def _gather_sum(rows_MxD, home_TxK, group_E):
  """[T, D]: the sum of the kept rows of each token, choice by choice."""
  kept_TxK = home_TxK < _rows(group_E)
  total_TxD = None
  for k in range(home_TxK.shape[1]):
    y_TxD = jnp.where(kept_TxK[:, k, None], rows_MxD[home_TxK[:, k]], 0)
    total_TxD = y_TxD if total_TxD is None else total_TxD + y_TxD
  return total_TxD


def _gather_rows(x_TxD, token_M, group_E):
  """[M, D]: each row's token; zero from sum(group_E) on."""
  row_M = jnp.arange(token_M.shape[0], dtype=jnp.int32)
  return jnp.where((row_M < _rows(group_E))[:, None], x_TxD[token_M], 0)


@jax.custom_vjp
def _dispatch(x_TxD, token_M, home_TxK, group_E):
  return _gather_rows(x_TxD, token_M, group_E)


def _dispatch_fwd(x_TxD, token_M, home_TxK, group_E):
  return _gather_rows(x_TxD, token_M, group_E), (home_TxK, group_E)


def _dispatch_bwd(saved, d_rows_MxD):
  home_TxK, group_E = saved
  return _gather_sum(d_rows_MxD, home_TxK, group_E), None, None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(y_MxD, weight_M, token_M, home_TxK, group_E):
  weighted_MxD = _weighted(y_MxD, weight_M)
  return _gather_sum(weighted_MxD, home_TxK, group_E).astype(y_MxD.dtype)


def _combine_fwd(y_MxD, weight_M, token_M, home_TxK, group_E):
  y_TxD = _combine(y_MxD, weight_M, token_M, home_TxK, group_E)
  return y_TxD, (y_MxD, weight_M, token_M, group_E)


def _combine_bwd(saved, d_y_TxD):
  y_MxD, weight_M, token_M, group_E = saved
  d_rows_MxD = _gather_rows(d_y_TxD, token_M, group_E)
  # where, not a product with zero: rows past the groups may hold anything.
  row_M = jnp.arange(token_M.shape[0], dtype=jnp.int32)
  wide = np.promote_types(y_MxD.dtype, weight_M.dtype)
  dot_M = jnp.sum(y_MxD.astype(wide) * d_rows_MxD.astype(wide), axis=1)
  d_weight_M = jnp.where(row_M < _rows(group_E), dot_M, 0)
  d_y_MxD = _weighted(d_rows_MxD, weight_M).astype(y_MxD.dtype)
  return d_y_MxD, d_weight_M.astype(weight_M.dtype), None, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
