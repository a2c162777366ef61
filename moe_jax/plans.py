"""Which rows exist, and where they go: integers and gathers, no parameters.

A router makes a plan: who goes where. Its arrays are cut where tokens are cut,
so every device has the plan of its tokens. `sort` makes rows of it.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


@flax.struct.dataclass
class TokenChoice:
  """Each token chose K experts; the id E is no expert."""

  expert_TxK: jax.Array  # int32 in [0, E]
  gate_TxK: jax.Array  # float, the gate of each choice
  E: int = flax.struct.field(pytree_node=False)

  def local_experts(self, first: jax.Array | int, E: int) -> 'TokenChoice':
    """The plan of E experts alone, from `first` on."""
    expert_TxK = self.expert_TxK - first
    here_TxK = (expert_TxK >= 0) & (expert_TxK < E)
    return TokenChoice(jnp.where(here_TxK, expert_TxK, E), self.gate_TxK, E)

  def num_routed(self) -> jax.Array:
    """int32 scalar: the choices that were not dropped."""
    return jnp.sum(self.expert_TxK < self.E, dtype=jnp.int32)

  def num_choices(self) -> int:
    """The choices, T * K."""
    return self.expert_TxK.size

  def max_rows(self, E: int) -> int:
    """The most rows that E experts can have, as a token's are distinct."""
    T, K = self.expert_TxK.shape
    return T * min(K, E)

  def choices(self, route_TxK: np.ndarray) -> dict[str, np.ndarray]:
    """The choices of each token, of a plan of numpy arrays.

    Args:
      route_TxK: what the router chose; a choice that the plan lacks was
        dropped.

    Returns:
      `expert_TxK`, -1 where a token has fewer, `kept_TxK` and `gate_TxK`.
    """
    there_TxK = route_TxK < self.E
    return {
      'expert_TxK': np.where(there_TxK, route_TxK, -1),
      'kept_TxK': self.expert_TxK < self.E,
      'gate_TxK': np.where(there_TxK, self.gate_TxK, 0),
    }


@flax.struct.dataclass
class ExpertChoice:
  """Of each of N spans of consecutive tokens each expert chose up to C."""

  place_NxExC: jax.Array  # int32, of a token in its span; `span` is none
  gate_NxExC: jax.Array  # float, the gate of each row
  span: int = flax.struct.field(pytree_node=False)  # its tokens

  @property
  def E(self) -> int:
    return self.place_NxExC.shape[1]

  def local_experts(self, first: jax.Array | int, E: int) -> 'ExpertChoice':
    """The plan of E experts alone, from `first` on."""
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, E, axis=1)
    return ExpertChoice(cut(self.place_NxExC), cut(self.gate_NxExC), self.span)

  def num_routed(self) -> jax.Array:
    """int32 scalar: the places that hold a token."""
    return jnp.sum(self.place_NxExC < self.span, dtype=jnp.int32)

  def num_choices(self) -> int:
    """N * E * C."""
    return self.place_NxExC.size

  def max_rows(self, E: int) -> int:
    """The most rows that E experts can have, N * E * C."""
    N, _, C = self.place_NxExC.shape
    return N * E * C

  def choices(self, route: np.ndarray) -> dict[str, np.ndarray]:
    """As those of TokenChoice: the experts that chose a token, by their gates.

    Args:
      route: the plan's own places.
    """
    del route
    place_NxExC, gate_NxExC = self.place_NxExC, self.gate_NxExC
    N, E, _ = place_NxExC.shape
    T = N * self.span
    group_N, expert_E = np.arange(N), np.arange(E)
    token_NxExC = place_NxExC + group_N[:, None, None] * self.span
    expert_NxExC = np.broadcast_to(expert_E[None, :, None], place_NxExC.shape)
    taken = place_NxExC < self.span
    token_M, expert_M, gate_M = (
      a[taken] for a in (token_NxExC, expert_NxExC, gate_NxExC)
    )
    order_M = np.lexsort((-gate_M, token_M))
    token_M = token_M[order_M]
    count_T = np.bincount(token_M, minlength=T)
    first_T = np.cumsum(count_T) - count_T
    slot_M = np.arange(len(token_M)) - first_T[token_M]
    K = max(int(count_T.max()), 1)
    expert_TxK = np.full((T, K), -1)
    gate_TxK = np.zeros((T, K))
    expert_TxK[token_M, slot_M] = expert_M[order_M]
    gate_TxK[token_M, slot_M] = gate_M[order_M]
    return {
      'expert_TxK': expert_TxK,
      'kept_TxK': expert_TxK >= 0,
      'gate_TxK': gate_TxK,
    }


Plan = TokenChoice | ExpertChoice


@flax.struct.dataclass
class Groups:
  """Tokens that share something, as a capacity; padding is in none.

  In each span of P consecutive tokens the first `size` that are no padding are
  a group, then the next. N counts the groups of all spans.
  """

  real_SxP: jax.Array  # bool, no padding; S * P may be more than T
  size: int = flax.struct.field(pytree_node=False)

  def count(self) -> jax.Array:
    """int32 [N]: tokens of each group."""
    real_TxX = self.real_SxP.reshape(-1, 1)
    return jnp.sum(self.cut(real_TxX, False), axis=(1, 2), dtype=jnp.int32)

  def cut(self, a_TxX: jax.Array, none: Any) -> jax.Array:
    """[N, size, X]: the tokens of each group, `none` where there is none."""
    (S, P), X = self.real_SxP.shape, a_TxX.shape[1]
    a_TxX = jnp.pad(a_TxX, ((0, S * P - len(a_TxX)), (0, 0)))
    a_SxPxX = jnp.where(self.real_SxP[..., None], a_TxX.reshape(S, P, X), none)
    if self.size < P:
      order_SxPx1 = self._order()[..., None]
      a_SxPxX = jnp.take_along_axis(a_SxPxX, order_SxPx1, axis=1)
    pad = (0, 0), (0, -P % self.size), (0, 0)
    a_SxQxX = jnp.pad(a_SxPxX, pad, constant_values=none)
    return a_SxQxX.reshape(-1, self.size, X)

  def join(self, a_NxGxX: jax.Array, T: int) -> jax.Array:
    """[T, X]: what `cut` cut; of padding it may be anything."""
    (S, P), X = self.real_SxP.shape, a_NxGxX.shape[2]
    a_SxPxX = a_NxGxX.reshape(S, -1, X)[:, :P]
    if self.size < P:
      back_SxPx1 = jnp.argsort(self._order(), axis=1)[..., None]
      a_SxPxX = jnp.take_along_axis(a_SxPxX, back_SxPx1, axis=1)
    return a_SxPxX.reshape(S * P, X)[:T]

  def place(self) -> jax.Array:
    """int32 [N, size]: the place in its span of each token; P is none."""
    S, P = self.real_SxP.shape
    place_SxP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (S, P))
    return self.cut(place_SxP.reshape(-1, 1), P)[..., 0]

  def _order(self):
    """int32 [S, P]: the places of a span, padding last."""
    order_SxP = jnp.argsort(~self.real_SxP, axis=1, stable=True)
    return order_SxP.astype(jnp.int32)


class Rows(NamedTuple):
  """Copies of tokens, M of them, grouped by expert.

  The first group_sizes_E[0] rows belong to expert 0, the next group_sizes_E[1]
  to expert 1, and so on; rows that hold no token may hold anything after an
  expert.
  """

  token_M: jax.Array  # int32, the token that each row is a copy of; T is none
  gate_M: jax.Array  # float, the gate of each row
  group_sizes_E: jax.Array  # int32, rows per expert
  row_TxK: jax.Array | None  # int32, the row of each choice; M is none


def by_token(
  expert_TxK: jax.Array,
  gate_TxK: jax.Array,
  E: int,
  real_T: jax.Array | None = None,
  *,
  capacity_N: jax.Array | None = None,
  groups: Groups | None = None,
) -> TokenChoice:
  """The plan in which each token chose K experts.

  Args:
    expert_TxK: int32 in [0, E]; E means no expert: there is no such choice.
    gate_TxK: the gates; gradients pass through them.
    E: number of experts.
    real_T: bool; padding gets no row. None: there is no padding.
    capacity_N: int32, rows that an expert takes from each group of tokens; the
      rest is dropped. All first choices in token order come before any second
      choice (Switch, arXiv 2101.03961; V-MoE, arXiv 2106.05974). None keeps
      all.
    groups: of the capacities.
  """
  expert_TxK = chosen(expert_TxK, E, real_T)
  if capacity_N is not None:
    expert_TxK = _drop_overflow(expert_TxK, E, capacity_N, groups)
  return TokenChoice(expert_TxK, gate_TxK, E)


def chosen(
  expert_TxK: jax.Array, E: int, real_T: jax.Array | None
) -> jax.Array:
  """The choices, E where a token is padding."""
  if real_T is None:
    return expert_TxK
  return jnp.where(real_T[:, None], expert_TxK, E)


def sort(plan: Plan, limit: int | None = None) -> Rows:
  """The rows of a plan, in the order of the tokens for each expert.

  M is T * K, or E * C * N; with a `limit` below it M is that, and what has no
  place, of the last experts, is lost.
  """
  if isinstance(plan, ExpertChoice):
    return _sort_by_expert(plan, limit)
  (T, K), E = plan.expert_TxK.shape, plan.E
  expert_N = plan.expert_TxK.reshape(T * K)
  M = min(T * K, limit or T * K)
  # Named, so that rematerialisation saves them and does not sort again.
  order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
  order_N = checkpoint_name(order_N, 'plan')
  home_N = checkpoint_name(_inverse(order_N), 'plan')
  group_sizes_E = checkpoint_name(_within(count(expert_N, E), M), 'plan')
  rows = jnp.sum(group_sizes_E, dtype=jnp.int32)
  row_M = jnp.arange(M, dtype=jnp.int32)
  weight_N = _permute(plan.gate_TxK.reshape(T * K), order_N, home_N)
  return Rows(
    token_M=jnp.where(row_M < rows, order_N[:M] // K, T),
    gate_M=weight_N[:M],
    group_sizes_E=group_sizes_E,
    row_TxK=jnp.where(home_N < rows, home_N, M).reshape(T, K),
  )


def _sort_by_expert(plan, limit):
  N, E, C = plan.place_NxExC.shape
  T = N * plan.span
  start_N = jnp.arange(N, dtype=jnp.int32) * plan.span
  used_NxExC = plan.place_NxExC < plan.span
  token_NxExC = jnp.where(
    used_NxExC, plan.place_NxExC + start_N[:, None, None], T
  )
  by_row = lambda a: a.swapaxes(0, 1).reshape(E * N * C)
  expert_1xEx1 = jnp.arange(E, dtype=jnp.int32)[None, :, None]
  expert_P = by_row(jnp.where(used_NxExC, expert_1xEx1, E))
  M = min(E * N * C, limit or E * N * C)
  # Places without a token go last, so that they are no rows.
  used_P = expert_P < E
  before_P = jnp.cumsum(used_P, dtype=jnp.int32) - used_P.astype(jnp.int32)
  place_P = jnp.arange(E * N * C, dtype=jnp.int32)
  empty_P = jnp.sum(used_P, dtype=jnp.int32) + place_P - before_P
  home_P = checkpoint_name(jnp.where(used_P, before_P, empty_P), 'plan')
  order_P = checkpoint_name(_inverse(home_P), 'plan')
  group_sizes_E = checkpoint_name(_within(count(expert_P, E), M), 'plan')
  rows = jnp.sum(group_sizes_E, dtype=jnp.int32)
  row_M = jnp.arange(M, dtype=jnp.int32)
  token_M = by_row(token_NxExC)[order_P][:M]
  weight_P = _permute(by_row(plan.gate_NxExC), order_P, home_P)
  return Rows(
    token_M=jnp.where(row_M < rows, token_M, T),
    gate_M=weight_P[:M],
    group_sizes_E=group_sizes_E,
    row_TxK=None,
  )


def pad_to_capacity(rows: Rows, C: int, T: int) -> Rows:
  """The same rows with C places for each expert; what is beyond them is lost.

  `group_sizes_E` counts all places, the empty ones too.
  """
  M, E = rows.token_M.shape[0], rows.group_sizes_E.shape[0]
  start_E = jnp.cumsum(rows.group_sizes_E, dtype=jnp.int32) - rows.group_sizes_E
  place_1xC = jnp.arange(C, dtype=jnp.int32)[None]
  from_P = (start_E[:, None] + place_1xC).reshape(E * C)
  used_P = (place_1xC < rows.group_sizes_E[:, None]).reshape(E * C)
  pick = lambda a: a.at[from_P].get(mode='clip')
  row_TxK = rows.row_TxK
  if row_TxK is not None:
    ends_E = start_E + rows.group_sizes_E
    expert_TxK = jnp.searchsorted(ends_E, row_TxK, side='right')
    expert_TxK = expert_TxK.astype(jnp.int32)
    place_TxK = row_TxK - start_E.at[expert_TxK].get(mode='clip')
    there_TxK = (row_TxK < M) & (place_TxK < C)
    row_TxK = jnp.where(there_TxK, expert_TxK * C + place_TxK, E * C)
  return Rows(
    token_M=jnp.where(used_P, pick(rows.token_M), T),
    gate_M=pick(rows.gate_M),
    group_sizes_E=jnp.full((E,), C, jnp.int32),
    row_TxK=row_TxK,
  )


def dispatch(x_TxD: jax.Array, rows: Rows) -> jax.Array:
  """Copies tokens to rows_MxD; rows without a token are zero."""
  if rows.row_TxK is None:
    return x_TxD.at[rows.token_M].get(mode='fill', fill_value=0)
  return _dispatch(x_TxD, rows.token_M, rows.row_TxK)


def combine(y_MxD: jax.Array, rows: Rows, T: int) -> jax.Array:
  """y_TxD: the gated sum of each token's rows; a token without rows gets 0."""
  if rows.row_TxK is None:
    return sum_by_token(y_MxD, rows, T, rows.gate_M)
  return _combine(y_MxD, rows.gate_M, rows.token_M, rows.row_TxK)


def sum_by_token(
  y_MxD: jax.Array, rows: Rows, T: int, gate_M: jax.Array | None = None
) -> jax.Array:
  """y_TxD: the sum of each token's rows, times gate_M if there is one.

  The transpose of `dispatch`, and of a plan by token a gather: its gradient,
  if one asks for it, would be a scatter. Of a plan by expert, where a token
  may have any number of rows, it is a scatter.
  """
  if rows.row_TxK is not None:
    return _gather_sum(y_MxD, rows.row_TxK, gate_M).astype(y_MxD.dtype)
  used_Mx1 = rows.token_M[:, None] < T
  y_wide_MxD = y_MxD if gate_M is None else _weighted(y_MxD, gate_M)
  rows_MxD = jnp.where(used_Mx1, y_wide_MxD, 0)
  zeros_TxD = jnp.zeros((T, rows_MxD.shape[1]), rows_MxD.dtype)
  sum_TxD = zeros_TxD.at[rows.token_M].add(rows_MxD, mode='drop')
  return sum_TxD.astype(y_MxD.dtype)


def count(expert_M: jax.Array, E: int) -> jax.Array:
  """int32 [E]: how often each expert was chosen; the id E is not counted."""
  expert_ids_E = jnp.arange(E, dtype=expert_M.dtype)
  return jnp.sum(
    expert_M.reshape(1, -1) == expert_ids_E[:, None], axis=1, dtype=jnp.int32
  )


def expert_of(group_sizes_E: jax.Array, M: int) -> jax.Array:
  """int32 [M]: the expert of each row; past the groups it is E."""
  end_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
  row_M = jnp.arange(M, dtype=jnp.int32)
  return jnp.searchsorted(end_E, row_M, side='right').astype(jnp.int32)


def dropped(plan: TokenChoice, expert_TxK: jax.Array) -> jax.Array:
  """float32 scalar: the fraction of these choices that have no row."""
  chosen_TxK = expert_TxK < plan.E
  lost_TxK = chosen_TxK & (plan.expert_TxK == plan.E)
  number = lambda a_TxK: jnp.sum(a_TxK.astype(jnp.float32))
  return number(lost_TxK) / jnp.maximum(number(chosen_TxK), 1)


def _within(group_sizes_E, M):
  """The groups cut so that there are M rows at most, the first first."""
  end_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), M)
  return jnp.diff(end_E, prepend=jnp.zeros((1,), jnp.int32))


def _drop_overflow(expert_TxK, E, capacity_N, groups):
  """Gives id E to every choice beyond an expert's capacity in its group."""
  T, K = expert_TxK.shape
  # Choices in order of precedence: first choices first. A sort for each group,
  # so that groups on different devices need nothing of each other.
  expert_NxGxK = groups.cut(expert_TxK, E)
  N, G, _ = expert_NxGxK.shape
  expert_NxP = expert_NxGxK.swapaxes(1, 2).reshape(N, K * G)
  kept_NxP = jax.vmap(_place)(expert_NxP) < capacity_N[:, None]
  expert_NxP = jnp.where(kept_NxP, expert_NxP, E)
  kept_TxK = groups.join(expert_NxP.reshape(N, K, G).swapaxes(1, 2), T)
  # Padding comes back as it may; it chose nothing.
  return jnp.where(expert_TxK < E, kept_TxK, E)


def _place(expert_P):
  """The place of each choice among those for the same expert."""
  order_P = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
  sorted_P = expert_P[order_P]
  start_P = jnp.searchsorted(sorted_P, sorted_P, side='left')
  place_P = jnp.arange(len(expert_P), dtype=jnp.int32)
  return (place_P - start_P.astype(jnp.int32))[_inverse(order_P)]


def _inverse(order_M):
  M = order_M.shape[0]
  rows_M = jnp.arange(M, dtype=jnp.int32)
  return jnp.zeros((M,), jnp.int32).at[order_M].set(rows_M, unique_indices=True)


# A row has one token and a choice has one row, so the transpose of each gather
# below is a gather too: exact, in a fixed order, and faster than a scatter.


@jax.custom_vjp
def _permute(gate_M, order_M, home_M):
  return gate_M[order_M]


def _permute_fwd(gate_M, order_M, home_M):
  return gate_M[order_M], home_M


def _permute_bwd(home_M, d_gate_M):
  return d_gate_M[home_M], None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def _weighted(y_MxD, gate_M):
  """Rows times their gates, in the wider of the two types."""
  wide = np.promote_types(y_MxD.dtype, gate_M.dtype)
  return y_MxD.astype(wide) * gate_M[:, None].astype(wide)


def _gather_sum(rows_MxD, row_TxK, gate_M=None):
  """[T, D]: the sum of the rows of each token, choice by choice."""
  here_TxK = row_TxK < rows_MxD.shape[0]
  total_TxD = None
  for k in range(row_TxK.shape[1]):
    y_TxD = rows_MxD[row_TxK[:, k]]
    if gate_M is not None:
      y_TxD = _weighted(y_TxD, gate_M[row_TxK[:, k]])
    y_TxD = jnp.where(here_TxK[:, k, None], y_TxD, 0)
    total_TxD = y_TxD if total_TxD is None else total_TxD + y_TxD
  return total_TxD


def _gather_rows(x_TxD, token_M):
  """[M, D]: each row's token; zero where there is none."""
  used_M = token_M < x_TxD.shape[0]
  return jnp.where(used_M[:, None], x_TxD[token_M], 0)


@jax.custom_vjp
def _dispatch(x_TxD, token_M, row_TxK):
  return _gather_rows(x_TxD, token_M)


def _dispatch_fwd(x_TxD, token_M, row_TxK):
  return _gather_rows(x_TxD, token_M), row_TxK


def _dispatch_bwd(row_TxK, d_rows_MxD):
  return _gather_sum(d_rows_MxD, row_TxK), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(y_MxD, gate_M, token_M, row_TxK):
  weighted_MxD = _weighted(y_MxD, gate_M)
  return _gather_sum(weighted_MxD, row_TxK).astype(y_MxD.dtype)


def _combine_fwd(y_MxD, gate_M, token_M, row_TxK):
  y_TxD = _combine(y_MxD, gate_M, token_M, row_TxK)
  return y_TxD, (y_MxD, gate_M, token_M)


def _combine_bwd(saved, d_y_TxD):
  y_MxD, gate_M, token_M = saved
  d_rows_MxD = _gather_rows(d_y_TxD, token_M)
  # where, not a product with zero: rows without a token may hold anything.
  wide = np.promote_types(y_MxD.dtype, gate_M.dtype)
  dot_M = jnp.sum(y_MxD.astype(wide) * d_rows_MxD.astype(wide), axis=1)
  d_gate_M = jnp.where(token_M < d_y_TxD.shape[0], dot_M, 0)
  d_y_MxD = _weighted(d_rows_MxD, gate_M).astype(y_MxD.dtype)
  return d_y_MxD, d_gate_M.astype(gate_M.dtype), None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
