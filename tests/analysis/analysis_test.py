"""What is said of routing, against loops and cases whose answer is known."""

import itertools
import json
import math

import numpy as np
import pytest

from moe_jax.analysis import measures

T, E, K = 600, 5, 3


def choices(seed, T=T, E=E, K=K):
  """Distinct experts of each token, some of them none."""
  draw = np.random.default_rng(seed)
  expert_TxK = np.argsort(draw.random((T, E)), axis=1)[:, :K]
  return np.where(draw.random((T, K)) < 0.2, -1, expert_TxK)


def sets(expert_TxK):
  return [set(x[x >= 0].tolist()) for x in expert_TxK]


def in_pairs(weight_E, T, seed=0):
  """Two experts a token, each pair as likely as the product of weights."""
  pairs = [*itertools.combinations(range(len(weight_E)), 2)]
  p = np.array([weight_E[i] * weight_E[j] for i, j in pairs])
  draw = np.random.default_rng(seed)
  return np.array(pairs)[draw.choice(len(pairs), T, p=p / p.sum())]


def test_load_counts_choices_and_not_what_is_none():
  expert_TxK = np.array([[0, 2], [0, -1], [3, -1]])
  np.testing.assert_allclose(
    measures.load(expert_TxK, 5), [0.5, 0, 0.25, 0.25, 0]
  )


@pytest.mark.parametrize(
  'p, value',
  [
    ([0.25] * 4, 1.0),
    ([0, 1, 0, 0], 0.0),
    ([0.5, 0.5, 0, 0], 0.5),
    ([1.0], 1.0),
  ],
)
def test_entropy(p, value):
  assert measures.entropy(np.array(p)) == pytest.approx(value)


def test_coactivation_counts_tokens():
  expert_TxK = choices(0)
  found_ExE, _ = measures.coactivation(expert_TxK, E + 1)  # one is never chosen
  for i, j in np.ndindex(E, E + 1):
    here = [x for x in sets(expert_TxK) if i in x]
    assert found_ExE[i, j] == pytest.approx(np.mean([j in x for x in here]))
  assert np.isnan(found_ExE[E]).all()


def test_company_by_load_alone_is_no_lift():
  weight_E = np.array([1, 2, 3, 4, 8.0])
  _, lift_ExE = measures.coactivation(in_pairs(weight_E, 200_000), 5)
  apart = ~np.eye(5, dtype=bool)
  np.testing.assert_allclose(lift_ExE[apart], 1, atol=0.05)
  assert np.isnan(np.diag(lift_ExE)).all()


def test_company_that_is_sought_is_lift():
  expert_TxK = in_pairs(np.ones(12), 4000)
  expert_TxK[:200] = [1, 4]
  _, lift_ExE = measures.coactivation(expert_TxK, 12)
  assert np.nanargmax(lift_ExE) == 1 * 12 + 4
  assert lift_ExE[1, 4] == lift_ExE[4, 1] > 2


def test_affinity_counts_tokens():
  a_TxK, b_TxK = choices(0), choices(1, E=4)
  found_ExF, lift_ExF = measures.affinity(a_TxK, b_TxK, E, 4)
  both = [*zip(sets(a_TxK), sets(b_TxK), strict=True)]
  for i, j in np.ndindex(E, 4):
    there = [j in b for a, b in both if i in a]
    assert found_ExF[i, j] == pytest.approx(np.mean(there))
    share = np.mean([j in b for _, b in both])
    assert lift_ExF[i, j] == pytest.approx(np.mean(there) / share)


def test_counts_of_many_tokens_are_those_of_parts():
  a_TxK, b_TxK = choices(0, T=70_000), choices(1, T=70_000)
  parts = [slice(0, 100), slice(100, None)]
  whole_ExE = measures._joint(a_TxK, b_TxK, E, E)
  in_parts = [measures._joint(a_TxK[p], b_TxK[p], E, E) for p in parts]
  np.testing.assert_array_equal(whole_ExE, sum(in_parts))


def test_information_of_a_table():
  count_AxB = np.random.default_rng(0).integers(0, 9, (4, 6))
  p_AxB = count_AxB / count_AxB.sum()
  total = 0.0
  for a, b in np.ndindex(4, 6):
    if p_AxB[a, b]:
      alone = sum(p_AxB[a, :]) * sum(p_AxB[:, b])
      total += p_AxB[a, b] * math.log2(p_AxB[a, b] / alone)
  assert measures.table_information(count_AxB) == pytest.approx(total)


def test_what_decides_the_expert_is_told_whole():
  id_T = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 1000))
  expert_Tx1 = id_T[:, None] // 2
  found = measures.information(expert_Tx1, id_T, 4)
  assert found.bits == pytest.approx(2.0)  # log2 of 4 experts
  assert found.above == pytest.approx(2.0, abs=0.01)


def test_what_has_nothing_to_do_with_it_is_chance():
  """Of many rare tokens much seems known."""
  draw = np.random.default_rng(0)
  id_T = draw.integers(0, 1000, 4000)
  found = measures.information(choices(0, T=4000), id_T, E)
  assert found.bits > 0.2
  assert found.chance == pytest.approx(found.bits, rel=0.05)
  assert found.above < 0.02


def test_shuffles_leave_a_token_s_choices_together():
  """Two experts that are always chosen together know no more than one."""
  draw = np.random.default_rng(0)
  one_T = draw.integers(0, 4, 3000)
  id_T = draw.integers(0, 500, 3000)
  pair_Tx2 = np.stack([one_T, one_T + 4], axis=1)
  one = measures.information(one_T[:, None], id_T, 4)
  pair = measures.information(pair_Tx2, id_T, 8)
  assert pair.bits == pytest.approx(one.bits)
  assert pair.chance == pytest.approx(one.chance)


def test_a_path_that_is_fixed_is_told_whole():
  a_Tx1 = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 500))
  a_Tx1 = a_Tx1[:, None]
  found = measures.affinity_information(a_Tx1, (a_Tx1 + 1) % 4, 4, 4)
  assert found.bits == pytest.approx(2.0)
  free = measures.affinity_information(choices(0), choices(1), E, E)
  assert free.bits == pytest.approx(free.chance, abs=0.01)


def test_divergences():
  p_NxE = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1], [0.5, 0, 0.5]])
  found_NxN = measures.divergences(p_NxE)
  middle = np.array([0.5, 0.25, 0.25])
  kl = lambda p: sum(
    x * math.log2(x / m) for x, m in zip(p, middle, strict=True) if x
  )
  expected = (kl(p_NxE[0]) + kl(p_NxE[3])) / 2
  np.testing.assert_allclose(found_NxN[0], [0, 0, 1, expected], atol=1e-12)
  np.testing.assert_array_equal(found_NxN, found_NxN.T)


def test_drops_by_place():
  expert_TxK = np.array([[0, 1], [2, -1], [0, 1], [1, -1], [0, 1], [-1, -1]])
  kept_TxK = np.array([[1, 1], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0]], bool)
  place_T = np.array([0, 1, 0, 1, 0, 2])
  np.testing.assert_allclose(
    measures.drops_by_place(expert_TxK, kept_TxK, place_T), [3 / 6, 1 / 2, 0]
  )


def routing(step, expert_SxTxK, kept_SxTxK=None, E=E):
  S, T, _ = expert_SxTxK.shape
  there = expert_SxTxK >= 0
  return measures.Routing(
    step=step,
    names=[f'MoE layer {s}' for s in range(S)],
    experts=[E] * S,
    expert_SxTxK=expert_SxTxK,
    kept_SxTxK=there if kept_SxTxK is None else kept_SxTxK,
    gate_SxTxK=np.where(there, 0.5, 0).astype(np.float32),
    entropy_S=np.linspace(0.9, 0.5, S),
    nll_T=np.full(T, 2.0, np.float32),
  )


def tokens(T=T, texts=('a', 'b')):
  draw = np.random.default_rng(7)
  return measures.Tokens(
    id_T=draw.integers(0, 10, T) * 50,
    position_T=np.arange(T) % 20,
    place_T=np.arange(T) % 20,
    text_T=np.arange(T) * len(texts) // T,
    texts=list(texts),
  )


def test_change_of_sets():
  old = routing(3, np.array([[[0, 1], [2, 3], [4, -1], [-1, -1]]]))
  new = routing(6, np.array([[[1, 0], [2, 4], [0, 1], [-1, -1]]]))
  found = measures.change(old, new)
  assert (found.first, found.second) == (3, 6)
  np.testing.assert_allclose(found.moved_S, [2 / 4])
  np.testing.assert_allclose(found.shared_S, [(1 + 1 / 3 + 0 + 1) / 4])


def test_a_study_says_of_each_step_what_is_planted_there():
  """Step 0 follows the token, 1 the text, 2 step 1; step 1 drops."""
  seen = tokens()
  by_id_T = seen.id_T // 50 % E
  by_text_T = seen.text_T * 2
  expert_SxTxK = np.stack([by_id_T, by_text_T, by_text_T + 1])[:, :, None]
  kept_SxTxK = np.ones_like(expert_SxTxK, bool)
  kept_SxTxK[1, seen.place_T == 19] = False
  made = routing(9, expert_SxTxK, kept_SxTxK)
  steps = measures.study(seen, made)
  first, second, third = steps
  assert first.token.above > 2.2 > 0.1 > second.token.above
  assert second.text.above == pytest.approx(1, abs=0.01)
  assert first.text.above < 0.1
  assert first.apart_NxN[0, 1] < 0.1 < second.apart_NxN[0, 1] == 1
  assert first.following.above < 0.1 < second.following.above
  assert third.following is None and third.following_ExF is None
  assert [s.dropped for s in steps] == pytest.approx([0, 0.05, 0])
  assert second.unrouted == second.dropped
  np.testing.assert_allclose(second.dropped_L, [0] * 19 + [1])
  np.testing.assert_allclose(second.load_E, [0.5, 0, 0.5, 0, 0])
  np.testing.assert_allclose(second.load_NxE[1], [0, 0, 1, 0, 0])
  assert second.load_entropy == pytest.approx(math.log(2) / math.log(E))
  assert [s.router_entropy for s in steps] == pytest.approx([0.9, 0.7, 0.5])
  assert first.first_gate == 0.5
  assert first.together_ExE is None  # a token has one expert


def test_numbers_are_json_and_without_matrices_of_experts():
  made = routing(9, np.stack([choices(0), choices(1)]))
  values = [measures.numbers(s) for s in measures.study(tokens(), made)]
  again = json.loads(json.dumps(values, allow_nan=False))
  assert again[0]['token'].keys() == {'bits', 'chance'}
  assert len(again[0]['load_E']) == E and 'following' not in again[1]
  assert not [k for k in again[0] if k.endswith('ExE') or k.endswith('ExF')]
