"""The plan: which rows exist and where they go."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import plans
from tests.helpers import oracle


def _jit(f, *static):
  """By one program, with NumPy arrays as the answer."""
  program = jax.jit(f, static_argnames=static)
  return lambda *args, **kw: jax.device_get(program(*args, **kw))


def _by_token(expert_TxK, gate_TxK, E, capacity=None, group=None):
  """`by_token`, of groups of so many tokens of as many rows each."""
  if capacity is None:
    return plans.by_token(expert_TxK, gate_TxK, E)
  T = len(expert_TxK)
  groups = plans.Groups(jnp.ones((1, T), bool), group or T)
  capacity_N = jnp.full(T // groups.size, capacity)
  return plans.by_token(
    expert_TxK, gate_TxK, E, capacity_N=capacity_N, groups=groups
  )


make = _jit(_by_token, 'E', 'capacity', 'group')
sort = _jit(plans.sort, 'limit')
pad_to_capacity = _jit(plans.pad_to_capacity, 'C', 'T')
dropped = _jit(plans.dropped)
dispatch = _jit(plans.dispatch)
combine = _jit(plans.combine, 'T')


# Token t holds the value t, so that a row says where it came from.
EXPERT_4x2 = np.array([[2, 0], [0, 2], [2, 1], [0, 2]], np.int32)
GATE_4x2 = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)


def _values(T):
  return np.arange(T, dtype=np.float32)[:, None]


def _random(T, K, E, seed=0, none=0):
  """Choices in [0, E + none) and gates."""
  draw = np.random.default_rng(seed)
  expert_TxK = draw.integers(0, E + none, (T, K)).astype(np.int32)
  return expert_TxK, draw.normal(size=(T, K)).astype(np.float32)


def by_token(*args, **options):
  """The rows of a plan."""
  return sort(make(*args, **options))


def _expert_of_rows(rows):
  return np.repeat(np.arange(len(rows.group_sizes_E)), rows.group_sizes_E)


def test_rows_of_a_plan_by_hand():
  plan = by_token(EXPERT_4x2, GATE_4x2, 3)
  np.testing.assert_array_equal(plan.group_sizes_E, [3, 1, 4])
  np.testing.assert_array_equal(plan.token_M, [0, 1, 3, 2, 0, 1, 2, 3])
  np.testing.assert_array_equal(plan.gate_M, [2, 3, 7, 6, 1, 4, 5, 8])
  np.testing.assert_array_equal(plan.row_TxK, [[4, 0], [1, 5], [6, 3], [2, 7]])
  rows_MxD = dispatch(_values(4), plan)
  np.testing.assert_array_equal(rows_MxD[:, 0], plan.token_M)


def test_capacity_by_hand_first_choices_come_first():
  # Expert 0 takes the first choices of tokens 1 and 3, not 0's second choice;
  # expert 2 those of 0 and 2, and no second choice.
  plan = by_token(EXPERT_4x2, GATE_4x2, 3, capacity=2)
  np.testing.assert_array_equal(plan.group_sizes_E, [2, 1, 2])
  np.testing.assert_array_equal(plan.token_M[:5], [1, 3, 2, 0, 2])
  assert dropped(make(EXPERT_4x2, GATE_4x2, 3, capacity=2), EXPERT_4x2) == 3 / 8
  y_TxD = combine(dispatch(_values(4) + 1, plan), plan, 4)
  np.testing.assert_array_equal(y_TxD[:, 0], [1 * 1, 3 * 2, 11 * 3, 7 * 4])


def test_groups_have_capacities_of_their_own():
  expert_Tx1 = np.zeros((6, 1), np.int32)
  gate_Tx1 = np.ones((6, 1), np.float32)
  plan = by_token(expert_Tx1, gate_Tx1, 2, capacity=2, group=3)
  np.testing.assert_array_equal(plan.group_sizes_E, [4, 0])
  np.testing.assert_array_equal(plan.token_M[:4], [0, 1, 3, 4])


@pytest.mark.parametrize('capacity', [1, 3, 4, 24])
def test_capacity_boundaries_agree_with_the_loops(capacity):
  expert_TxK, gate_TxK = _random(16, 2, 4, seed=capacity)
  for group in (None, 4):
    plan = make(expert_TxK, gate_TxK, 4, capacity=capacity, group=group)
    kept_TxK = oracle.keep(expert_TxK, 4, capacity, group)
    np.testing.assert_array_equal(plan.expert_TxK, kept_TxK)
    np.testing.assert_array_equal(sort(plan).row_TxK < 32, kept_TxK < 4)
    assert round(float(dropped(plan, expert_TxK)) * 32) == (kept_TxK == 4).sum()


@pytest.mark.parametrize(
  'T, K, E, none',
  [(24, 2, 4, 0), (1, 1, 1, 0), (1, 2, 4, 0), (8, 1, 1, 0), (24, 3, 4, 1)],
)
def test_dispatch_then_combine_is_the_gated_sum(T, K, E, none):
  expert_TxK, gate_TxK = _random(T, K, E, none=none)
  x_TxD = np.random.default_rng(1).normal(size=(T, 4)).astype(np.float32)
  plan = by_token(expert_TxK, gate_TxK, E)
  y_TxD = combine(dispatch(x_TxD, plan), plan, T)
  total_T = np.where(expert_TxK < E, gate_TxK, 0).sum(axis=1)
  np.testing.assert_allclose(y_TxD, total_T[:, None] * x_TxD, 1e-5, 1e-6)


def test_an_expert_that_nobody_chose_has_no_rows():
  expert_Tx1 = np.array([[0], [2], [0], [2]], np.int32)
  plan = by_token(expert_Tx1, np.ones((4, 1), np.float32), 4)
  np.testing.assert_array_equal(plan.group_sizes_E, [2, 0, 2, 0])
  np.testing.assert_array_equal(plan.token_M, [0, 2, 1, 3])


def test_one_expert_may_take_everything():
  expert_TxK = np.full((8, 1), 3, np.int32)
  plan = by_token(expert_TxK, np.ones((8, 1), np.float32), 4)
  np.testing.assert_array_equal(plan.group_sizes_E, [0, 0, 0, 8])
  np.testing.assert_array_equal(plan.token_M, np.arange(8))


def test_the_id_E_is_dropped_and_takes_no_capacity():
  expert_TxK = np.array([[2, 2], [2, 0], [0, 2], [1, 0]], np.int32)
  plan = by_token(expert_TxK, GATE_4x2, 2, capacity=1)
  np.testing.assert_array_equal(plan.group_sizes_E, [1, 1])
  np.testing.assert_array_equal(plan.token_M[:2], [2, 3])
  y_TxD = combine(dispatch(_values(4) + 1, plan), plan, 4)
  np.testing.assert_array_equal(y_TxD[:, 0], [0, 0, 5 * 3, 7 * 4])


def test_rows_of_dropped_assignments_are_zero():
  expert_TxK, gate_TxK = _random(8, 2, 4, none=3)
  expert_TxK = np.minimum(expert_TxK, 4)
  plan = by_token(expert_TxK, gate_TxK, 4)
  rows = int(plan.group_sizes_E.sum())
  assert 0 < rows < 16 and (plan.token_M[rows:] == 8).all()
  rows_MxD = dispatch(_values(8) + 1, plan)
  assert (rows_MxD[:rows] > 0).all() and not rows_MxD[rows:].any()


@functools.partial(jax.jit, static_argnames=('capacity', 'poison'))
def _value_and_grads(args, expert_TxK, r_TxD, capacity, poison):
  """Of <r, combine(rows * scale)>: the gradients of x, scale and gate.

  `poison` writes NaN where an expert's answer is undefined, and lets NaN come
  back there, as a grouped matmul's gradient may.
  """

  def f(args):
    plan = _by_token(expert_TxK, args['gate_TxK'], 4, capacity=capacity)
    plan = plans.sort(plan)
    rows_MxD = plans.dispatch(args['x_TxD'], plan)
    defined_Mx1 = (jnp.arange(len(rows_MxD)) < plan.group_sizes_E.sum())[
      :, None
    ]
    if poison:
      rows_MxD = _nan_gradient(rows_MxD, defined_Mx1)
    y_MxD = rows_MxD * args['scale_MxD']
    if poison:
      y_MxD = jnp.where(defined_Mx1, y_MxD, jnp.nan)
    return jnp.sum(r_TxD * plans.combine(y_MxD, plan, len(r_TxD)))

  return jax.value_and_grad(f)(args)


@jax.custom_vjp
def _nan_gradient(rows_MxD, defined_Mx1):
  return rows_MxD


_nan_gradient.defvjp(
  lambda rows_MxD, defined_Mx1: (rows_MxD, defined_Mx1),
  lambda defined_Mx1, d_MxD: (jnp.where(defined_Mx1, d_MxD, jnp.nan), None),
)


def _arguments(T, K, D):
  draw = np.random.default_rng(5)
  args = {
    'x_TxD': draw.normal(size=(T, D)),
    'scale_MxD': draw.normal(size=(T * K, D)),
    'gate_TxK': draw.normal(size=(T, K)),
  }
  return args, _random(T, K, 4, seed=6)[0], draw.normal(size=(T, D))


@pytest.mark.parametrize('capacity', [None, 3])
def test_undefined_rows_never_leak(capacity):
  args, expert_TxK, r_TxD = _arguments(8, 2, 4)
  expert_TxK[2] = 4
  args, r_TxD = jax.tree.map(np.float32, (args, r_TxD))
  clean = _value_and_grads(args, expert_TxK, r_TxD, capacity, False)
  poisoned = _value_and_grads(args, expert_TxK, r_TxD, capacity, True)
  jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
  assert np.isfinite(clean[0])


@pytest.mark.parametrize('capacity', [None, 3])
def test_gradients_are_slopes(capacity):
  with jax.enable_x64(True):
    args, expert_TxK, r_TxD = _arguments(8, 2, 4)
    _, grads = _value_and_grads(args, expert_TxK, r_TxD, capacity, False)
    value = lambda args: float(
      _value_and_grads(args, expert_TxK, r_TxD, capacity, False)[0]
    )
    for name in args:
      toward = jax.tree.map(np.zeros_like, args)
      toward[name] = np.random.default_rng(7).normal(size=args[name].shape)
      expected = oracle.slope(value, args, toward)
      assert abs(expected) > 1e-2
      found = np.sum(grads[name] * toward[name])
      np.testing.assert_allclose(found, expected, 1e-7, err_msg=name)


def test_expert_choice_rows_by_hand():
  token_1xExC = np.array([[[3, 0], [0, 1]]], np.int32)
  gate_1xExC = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
  plan = sort(plans.ExpertChoice(token_1xExC, gate_1xExC, 4))
  np.testing.assert_array_equal(plan.group_sizes_E, [2, 2])
  rows_MxD = dispatch(_values(4), plan)
  np.testing.assert_array_equal(rows_MxD[:, 0], [3, 0, 0, 1])
  y_TxD = combine(rows_MxD + 1, plan, 4)
  np.testing.assert_array_equal(y_TxD[:, 0], [2 + 3, 4 * 2, 0, 1 * 4])


def test_groups_of_expert_choice_are_counted_from_their_first_token():
  place_2x2x1 = np.array([[[1], [0]], [[1], [1]]], np.int32)
  gate_2x2x1 = np.arange(4, dtype=np.float32).reshape(2, 2, 1)
  rows = sort(plans.ExpertChoice(place_2x2x1, gate_2x2x1, 3))
  np.testing.assert_array_equal(rows.token_M, [1, 4, 0, 4])
  np.testing.assert_array_equal(rows.gate_M, [0, 2, 1, 3])
  np.testing.assert_array_equal(rows.group_sizes_E, [2, 2])


@pytest.mark.parametrize('kind', ['token', 'expert'])
def test_a_limit_loses_the_rows_of_the_last_experts(kind):
  if kind == 'token':
    plan = make(EXPERT_4x2, GATE_4x2, 3)
  else:
    place_1x2x3 = np.array([[[0, 1, 2], [2, 3, 1]]], np.int32)
    plan = plans.ExpertChoice(place_1x2x3, np.ones((1, 2, 3), np.float32), 4)
  whole, rows = sort(plan), sort(plan, limit=5)
  assert len(rows.token_M) == 5 and rows.group_sizes_E.sum() == 5
  np.testing.assert_array_equal(rows.token_M, whole.token_M[:5])
  first_Mx1 = np.float32(_values(len(whole.token_M)) < 5)
  want_TxD = combine(first_Mx1, whole, 4)
  y_TxD = combine(np.ones((5, 1), np.float32), rows, 4)
  np.testing.assert_array_equal(y_TxD, want_TxD)
  total = jax.jit(lambda plan: plan.num_routed())(plan)
  assert int(total) - int(rows.group_sizes_E.sum()) == len(whole.token_M) - 5


@pytest.mark.parametrize('C, lost', [(1, 5), (3, 1), (4, 0)])
def test_padding_to_capacity_gives_every_expert_as_many_places(C, lost):
  rows = sort(make(EXPERT_4x2, GATE_4x2, 3))
  wide = pad_to_capacity(rows, C, 4)
  np.testing.assert_array_equal(wide.group_sizes_E, [C] * 3)
  assert int((wide.token_M < 4).sum()) == 8 - lost
  place_M = np.concatenate([np.arange(n) for n in rows.group_sizes_E])
  kept_M = np.float32(place_M < C)[:, None]
  want_TxD = combine(kept_M, rows, 4)
  used_Px1 = wide.token_M[:, None] < 4
  y_TxD = combine(np.where(used_Px1, 1, np.nan).astype(np.float32), wide, 4)
  np.testing.assert_array_equal(y_TxD, want_TxD)
  x_PxD = dispatch(_values(4) + 1, wide)
  np.testing.assert_array_equal(
    x_PxD[:, 0], np.where(wide.token_M < 4, wide.token_M + 1, 0)
  )


@pytest.mark.parametrize('kind', ['token', 'expert'])
def test_the_plan_of_some_experts(kind):
  if kind == 'token':
    plan = make(EXPERT_4x2, GATE_4x2, 3)
  else:
    place_1x3x2 = np.array([[[3, 0], [0, 1], [2, 1]]], np.int32)
    gate_1x3x2 = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    plan = plans.ExpertChoice(place_1x3x2, gate_1x3x2, 4)
  of_some = _jit(lambda plan, first: plans.sort(plan.local_experts(first, 2)))
  whole, part = sort(plan), of_some(plan, np.int32(1))
  first, rows = int(whole.group_sizes_E[0]), int(whole.group_sizes_E[1:].sum())
  np.testing.assert_array_equal(part.group_sizes_E, whole.group_sizes_E[1:])
  for name in ('token_M', 'gate_M'):
    found, want = getattr(part, name)[:rows], getattr(whole, name)[first:]
    np.testing.assert_array_equal(found, want)


def test_answers_keep_their_type_and_are_summed_in_the_gates():
  expert_TxK = np.zeros((1, 3), np.int32)
  gate_TxK = np.array([[1, 2**-8, 2**-8]], np.float32)
  plan = by_token(expert_TxK, gate_TxK, 1)
  y_TxD = combine(np.ones((3, 2), jnp.bfloat16), plan, 1)
  assert y_TxD.dtype == jnp.bfloat16
  # One by one, in bfloat16, both small gates would be rounded away.
  np.testing.assert_array_equal(np.float32(y_TxD), 1 + 2**-7)


def test_count_leaves_out_the_id_E():
  expert_M = np.array([0, 3, 1, 3, 0, 2], np.int32)
  found_E = _jit(plans.count, 'E')(expert_M, 3)
  np.testing.assert_array_equal(found_E, [2, 1, 1])


# Few shapes, so that few programs are compiled; what is in them is free.
SHAPES = [
  (1, 1, 1, None, None),
  (1, 2, 4, 1, None),
  (12, 1, 4, None, None),
  (12, 2, 4, 2, 4),
  (12, 3, 5, 1, 6),
  (12, 2, 1, 5, None),
]


@st.composite
def _routings(draw):
  T, K, E, capacity, group = draw(st.sampled_from(SHAPES))
  ids = st.integers(0, E) if draw(st.booleans()) else st.integers(0, 1)
  flat = draw(st.lists(ids, min_size=T * K, max_size=T * K))
  expert_TxK = np.array(flat, np.int32).reshape(T, K)
  return expert_TxK, E, capacity, group


@hypothesis.given(_routings())
@hypothesis.settings(
  deadline=None, max_examples=150, derandomize=True, database=None
)
def test_every_kept_choice_has_one_row_with_its_expert(routing):
  expert_TxK, E, capacity, group = routing
  T, K = expert_TxK.shape
  gate_TxK = np.arange(T * K, dtype=np.float32).reshape(T, K)
  plan = by_token(expert_TxK, gate_TxK, E, capacity=capacity, group=group)
  kept_TxK = expert_TxK
  if capacity is not None:
    kept_TxK = oracle.keep(expert_TxK, E, capacity, group)
  np.testing.assert_array_equal(
    plan.group_sizes_E, [(kept_TxK == e).sum() for e in range(E)]
  )
  # row_TxK names the row of each choice that has one, and no row twice.
  homes = plan.row_TxK[plan.row_TxK < T * K]
  assert sorted(homes) == list(range(plan.group_sizes_E.sum()))
  expert_of_row = _expert_of_rows(plan)
  for t in range(T):
    for k in range(K):
      row = plan.row_TxK[t, k]
      if kept_TxK[t, k] == E:
        assert row == T * K
        continue
      assert plan.token_M[row] == t
      assert plan.gate_M[row] == gate_TxK[t, k]
      assert expert_of_row[row] == kept_TxK[t, k]
