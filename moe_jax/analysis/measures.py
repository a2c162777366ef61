"""What recorded routing says: numpy over who chose whom.

A choice is an expert's number; -1 is none. A routed step is one iteration of
one MoE layer; steps stand in the order in which tokens meet them.

Information is in bits, from counts. That of a finite sample is too high where
nothing is known, the more the more values a thing has, so each is given with
`chance`: the same of tokens that were shuffled. Bits above chance are a careful
estimate, for what is known leaves less to chance.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

SHUFFLES = 3  # whose mean is chance


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The T tokens that were routed, rows of texts one after another."""

  id_T: np.ndarray  # int32
  position_T: np.ndarray  # int32, in the document, from its start or the row's
  place_T: np.ndarray  # int32, in the row
  text_T: np.ndarray  # int32, which text
  texts: list[str]  # their names


@dataclasses.dataclass(frozen=True)
class Routing:
  """What the routers of a checkpoint decided about them in S steps.

  A token's choices begin with the one that it prefers.
  """

  step: int  # optimiser steps of the checkpoint
  names: list[str]  # S, of the routed steps
  experts: list[int]  # S, candidates of each
  expert_SxTxK: np.ndarray  # int16 or int32
  kept_SxTxK: np.ndarray  # bool: the expert had room
  gate_SxTxK: np.ndarray  # float32, 0 where there is no expert
  entropy_S: np.ndarray  # of the routers' probabilities, 1 = all alike
  nll_T: np.ndarray  # float32, nats, of the token that comes next


class Information(NamedTuple):
  """Bits that a choice tells of a thing, and those of shuffled tokens."""

  bits: float
  chance: float

  @property
  def above(self) -> float:
    return max(self.bits - self.chance, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
  """The numbers of one routed step; `following` ones are of it and the next."""

  name: str
  load_E: np.ndarray  # of all texts
  load_NxE: np.ndarray  # of each text
  load_entropy: float
  router_entropy: float
  first_gate: float  # mean of the first choice's gate
  unrouted: float  # tokens that reached no expert
  dropped: float  # of the choices
  dropped_L: np.ndarray  # by place in the row
  token: Information
  position: Information
  text: Information
  apart_NxN: np.ndarray  # divergence of two texts' loads, bits
  together_ExE: np.ndarray | None  # lift; None where a token has one expert
  following: Information | None = None
  following_ExF: np.ndarray | None = None


def study(tokens: Tokens, routing: Routing, seed: int = 0) -> list[Step]:
  """The numbers of every routed step."""
  steps = []
  # Of ids that occur, so that tables have no empty columns.
  _, id_T = np.unique(tokens.id_T, return_inverse=True)
  _, position_T = np.unique(tokens.position_T, return_inverse=True)
  N = len(tokens.texts)
  for s, name in enumerate(routing.names):
    expert_TxK, E = routing.expert_SxTxK[s], routing.experts[s]
    kept_TxK, gate_TxK = routing.kept_SxTxK[s], routing.gate_SxTxK[s]
    load_NxE = np.array(
      [load(expert_TxK[tokens.text_T == n], E) for n in range(N)]
    )
    about = lambda b_T, x=expert_TxK, E=E: information(x, b_T, E, seed)
    dropped_L = drops_by_place(expert_TxK, kept_TxK, tokens.place_T)
    load_E = load(expert_TxK, E)
    chosen = expert_TxK >= 0
    steps.append(
      Step(
        name=name,
        load_E=load_E,
        load_NxE=load_NxE,
        load_entropy=entropy(load_E),
        router_entropy=float(routing.entropy_S[s]),
        first_gate=float(gate_TxK[:, 0].mean(dtype=np.float64)),
        unrouted=float(np.mean(~np.any(chosen & kept_TxK, axis=1))),
        dropped=float(np.sum(chosen & ~kept_TxK) / max(np.sum(chosen), 1)),
        dropped_L=dropped_L,
        token=about(id_T),
        position=about(position_T),
        text=about(tokens.text_T),
        apart_NxN=divergences(load_NxE),
        together_ExE=coactivation(expert_TxK, E)[1]
        if expert_TxK.shape[1] > 1
        else None,
      )
    )
  pairs = itertools.pairwise(range(len(steps)))
  for s, t in pairs:
    a_TxK, b_TxK = routing.expert_SxTxK[s], routing.expert_SxTxK[t]
    sizes = routing.experts[s], routing.experts[t]
    steps[s] = dataclasses.replace(
      steps[s],
      following=affinity_information(a_TxK, b_TxK, *sizes, seed),
      following_ExF=affinity(a_TxK, b_TxK, *sizes)[1],
    )
  return steps


def numbers(step: Step) -> dict[str, Any]:
  """A step's numbers for JSON, without those of pairs of experts."""
  out = {'name': step.name}
  for field in dataclasses.fields(step):
    value = getattr(step, field.name)
    if isinstance(value, Information):
      out[field.name] = value._asdict()
    elif isinstance(value, float):
      out[field.name] = value
    elif field.name in ('load_E', 'load_NxE', 'dropped_L', 'apart_NxN'):
      out[field.name] = np.round(value, 6).tolist()
  return out


def load(expert_TxK: np.ndarray, E: int) -> np.ndarray:
  """float64 [E]: the share of all choices that each expert got."""
  count_E = np.bincount(expert_TxK[expert_TxK >= 0], minlength=E)
  return count_E / max(count_E.sum(), 1)


def entropy(p_E: np.ndarray) -> float:
  """Of a distribution, over its greatest: 1 is even, 0 is all in one place."""
  p = p_E[p_E > 0]
  if len(p_E) < 2:
    return 1.0
  return float(-np.sum(p * np.log(p)) / np.log(len(p_E)))


def coactivation(
  expert_TxK: np.ndarray, E: int
) -> tuple[np.ndarray, np.ndarray]:
  """Which experts serve the same token.

  Returns:
    conditional_ExE: P(column | row) over tokens, NaN for a row never chosen.
    lift_ExE: how often a pair is met, over how often it would be if experts
      chose their company by load alone. NaN on the diagonal, for a token has an
      expert once, and where none is expected.
  """
  count_ExE = _joint(expert_TxK, expert_TxK, E, E)
  with np.errstate(invalid='ignore', divide='ignore'):
    conditional_ExE = count_ExE / np.diag(count_ExE)[:, None]
    pairs_ExE = count_ExE * (1 - np.eye(E))
    lift_ExE = pairs_ExE / _by_load_alone(pairs_ExE.sum(axis=1))
  np.fill_diagonal(lift_ExE, np.nan)
  return conditional_ExE, lift_ExE


def _by_load_alone(pairs_E, rounds=200):
  """Pairs of distinct experts that are expected where only loads matter.

  Quasi-independence (Goodman 1968): a_i a_j off the diagonal with these sums.
  """
  a_E = np.sqrt(pairs_E)
  for _ in range(rounds):
    others_E = np.maximum(a_E.sum() - a_E, 1e-300)
    a_E = np.sqrt(a_E * pairs_E / others_E)  # halfway, in logarithms: converges
  return a_E[:, None] * a_E[None]


def affinity(
  a_TxK: np.ndarray, b_TxK: np.ndarray, E: int, F: int
) -> tuple[np.ndarray, np.ndarray]:
  """How the choice in one step goes with that in another one.

  Returns:
    conditional_ExF: P(column there | row here) over tokens, NaN for a row never
      chosen.
    lift_ExF: the same over P(column there), NaN for a column never chosen.
  """
  count_ExF = _joint(a_TxK, b_TxK, E, F)
  T = len(a_TxK)
  uses = lambda x_TxK, n: np.bincount(x_TxK[x_TxK >= 0], minlength=n)
  with np.errstate(invalid='ignore', divide='ignore'):
    conditional_ExF = count_ExF / uses(a_TxK, E)[:, None]
    return conditional_ExF, conditional_ExF / (uses(b_TxK, F)[None] / T)


def information(
  expert_TxK: np.ndarray, b_T: np.ndarray, E: int, seed: int = 0
) -> Information:
  """Mutual information of a choice with what is known of its token.

  Args:
    b_T: ints from 0.
    seed: of the shuffles, which leave a token's choices together.
  """
  bits = lambda b_T: table_information(_table(expert_TxK, b_T, E))
  return _with_chance(bits, b_T, seed)


def affinity_information(
  a_TxK: np.ndarray, b_TxK: np.ndarray, E: int, F: int, seed: int = 0
) -> Information:
  """Mutual information of a choice with one of the same token elsewhere."""
  bits = lambda b_TxK: table_information(_joint(a_TxK, b_TxK, E, F))
  return _with_chance(bits, b_TxK, seed)


def table_information(count_AxB: np.ndarray) -> float:
  """Mutual information, in bits, of the row and the column of a count."""
  p_AxB = count_AxB / max(count_AxB.sum(), 1)
  p_A, p_B = p_AxB.sum(axis=1), p_AxB.sum(axis=0)
  a, b = np.nonzero(p_AxB)
  p = p_AxB[a, b]
  return float(np.sum(p * np.log2(p / (p_A[a] * p_B[b]))))


def _with_chance(bits, b_T, seed):
  draw = np.random.default_rng(seed)
  chance = [bits(draw.permutation(b_T)) for _ in range(SHUFFLES)]
  return Information(bits(b_T), float(np.mean(chance)))


def _table(expert_TxK, b_T, E):
  """[E, B] counts of the choices of tokens."""
  B = int(b_T.max(initial=0)) + 1
  there = expert_TxK >= 0
  b_TxK = np.broadcast_to(b_T[:, None], expert_TxK.shape)
  place = expert_TxK[there].astype(np.int64) * B + b_TxK[there]
  return np.bincount(place, minlength=E * B).reshape(E, B)


def _joint(a_TxK, b_TxK, E, F):
  """[E, F] tokens that have the row's expert here, the column's there."""
  count_N = np.zeros((E + 1) * (F + 1), np.int64)
  for t in range(0, len(a_TxK), 65_536):
    # -1 is the last row and the last column.
    here_TxK, there_TxK = (
      x_TxK[t : t + 65_536].astype(np.int64) % (n + 1)
      for x_TxK, n in ((a_TxK, E), (b_TxK, F))
    )
    place = here_TxK[:, :, None] * (F + 1) + there_TxK[:, None, :]
    count_N += np.bincount(place.reshape(-1), minlength=len(count_N))
  return count_N.reshape(E + 1, F + 1)[:E, :F]


def divergences(p_NxE: np.ndarray) -> np.ndarray:
  """[N, N] Jensen-Shannon divergences in bits: 0 alike, 1 nothing in common."""
  N = len(p_NxE)
  out = np.zeros((N, N))
  for i, j in itertools.combinations(range(N), 2):
    # Of two equally likely texts and their experts.
    out[i, j] = out[j, i] = table_information(p_NxE[[i, j]])
  return out


def drops_by_place(
  expert_TxK: np.ndarray, kept_TxK: np.ndarray, place_T: np.ndarray
) -> np.ndarray:
  """float64 [L]: the share of the choices at each place that found no room."""
  L = int(place_T.max(initial=0)) + 1
  chosen_TxK = expert_TxK >= 0
  count = lambda x_TxK: np.bincount(
    place_T, weights=x_TxK.sum(axis=1), minlength=L
  )
  return count(chosen_TxK & ~kept_TxK) / np.maximum(count(chosen_TxK), 1)


class Change(NamedTuple):
  """Between two checkpoints, in each of S steps."""

  first: int  # their optimiser steps
  second: int
  moved_S: np.ndarray  # tokens whose preferred expert is another
  shared_S: np.ndarray  # mean Jaccard index of the sets of experts


def change(old: Routing, new: Routing) -> Change:
  """What happened to the same tokens between two checkpoints."""
  pairs = list(zip(old.expert_SxTxK, new.expert_SxTxK, strict=True))
  moved_S = [np.mean(a_TxK[:, 0] != b_TxK[:, 0]) for a_TxK, b_TxK in pairs]
  shared_S = [jaccard(a_TxK, b_TxK) for a_TxK, b_TxK in pairs]
  return Change(old.step, new.step, np.array(moved_S), np.array(shared_S))


def jaccard(a_TxK: np.ndarray, b_TxK: np.ndarray) -> float:
  """Mean over tokens of |both| / |either|; 1 for two empty sets."""
  same_TxKxK = a_TxK[:, :, None] == b_TxK[:, None, :]
  both_T = np.sum(same_TxKxK & (a_TxK >= 0)[:, :, None], axis=(1, 2))
  sizes_T = np.sum(a_TxK >= 0, axis=1) + np.sum(b_TxK >= 0, axis=1)
  either_T = sizes_T - both_T
  return float(np.mean(np.where(either_T, both_T / np.maximum(either_T, 1), 1)))
