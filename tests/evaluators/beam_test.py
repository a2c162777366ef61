"""Beam search against all hypotheses, and against a beam of Python lists."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.evaluators import beam

B, BEGIN, END, PAD = 2, 2, 1, -1


def _table(seed, V, L, holes):
  """Logits [B, step, prefix, V]: they depend on every token of the prefix."""
  rng = np.random.default_rng(seed)
  table = rng.normal(0, 2, (B, L - 1, V ** (L - 1), V))
  table[rng.random(table.shape) < holes] = -np.inf
  return table


def _prefix(ids_NxL, V, step):
  """A number for the tokens after `begin` and up to `step`."""
  L = ids_NxL.shape[1]
  power_L = np.array([0, *(V**i for i in range(L - 1))], np.int32)
  seen_L = jnp.arange(L, dtype=jnp.int32) <= step
  digit_NxL = jnp.where(seen_L[None], ids_NxL, 0) * power_L[None]
  return jnp.sum(digit_NxL, axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=('W', 'penalty'))
def _search(table, W, penalty):
  rows, steps, _, V = table.shape

  def logits_of(ids_NxL, step):
    sentence_N = jnp.repeat(jnp.arange(rows), W)
    return table[sentence_N, step, _prefix(ids_NxL, V, step)]

  return beam.search(
    logits_of, rows, steps + 1,
    beam=W, begin=BEGIN, end=END, pad=PAD, penalty=penalty,
  )  # fmt: skip


def _log_probs(table):
  with np.errstate(divide='ignore', invalid='ignore'):
    top = np.max(table, axis=-1, keepdims=True)
    total = np.log(np.sum(np.exp(table - top), axis=-1, keepdims=True))
    return np.where(table == -np.inf, -np.inf, table - top - total)


def _code(tokens, V):
  return sum(token * V**i for i, token in enumerate(tokens))


def _every(logp, penalty):
  """All (score, tokens) of one sentence that end with `end`, best first."""
  steps, _, V = logp.shape
  others = [token for token in range(V) if token != END]
  found = []
  for size in range(steps):
    for body in itertools.product(others, repeat=size):
      tokens = (*body, END)
      terms = [
        logp[step, _code(tokens[:step], V), token]
        for step, token in enumerate(tokens)
      ]
      found.append((sum(terms) / len(tokens) ** penalty, tokens))
  return sorted((x for x in found if x[0] > -np.inf), reverse=True)


def _python_beam(logp, W, penalty):
  """(score, tokens), best first; it never stops early."""
  steps, _, V = logp.shape
  live, found = [(0.0, ())], []
  for step in range(steps):
    extended = [
      (total + logp[step, _code(tokens, V), token], (*tokens, token))
      for total, tokens in live
      for token in range(V)
      if token == END or step < steps - 1
    ]
    extended = sorted(extended, reverse=True)[:W]
    extended = [x for x in extended if x[0] > -np.inf]
    live = [x for x in extended if x[1][-1] != END]
    found += [
      (total / len(tokens) ** penalty, tokens)
      for total, tokens in extended
      if tokens[-1] == END
    ]
  return sorted(found, reverse=True)[:W]


def _check(actual, expected_B, W, L):
  ids_BxWxL, score_BxW = map(np.asarray, actual)
  assert ids_BxWxL.shape == (len(expected_B), W, L)
  assert ids_BxWxL.dtype == np.int32
  for ids_WxL, score_W, expected in zip(
    ids_BxWxL, score_BxW, expected_B, strict=True
  ):
    missing = W - len(expected)
    scores = [score for score, _ in expected] + [-np.inf] * missing
    np.testing.assert_allclose(score_W, scores, rtol=1e-9)
    rows = [
      [BEGIN, *tokens] + [PAD] * (L - 1 - len(tokens)) for _, tokens in expected
    ]
    assert ids_WxL.tolist() == rows + [[PAD] * L] * missing


seeds = st.integers(0, 2**32)
holes = st.sampled_from([0.0, 0.3, 0.7])


@pytest.mark.parametrize('penalty', [0.0, 1.0, 2.0, -0.5])
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seeds, holes)
def test_a_wide_beam_finds_every_hypothesis(penalty, seed, holes):
  V, L, W = 3, 4, 12  # 7 hypotheses; never more than 12 extensions
  table = _table(seed, V, L, holes)
  with jax.enable_x64(True):
    actual = _search(jnp.asarray(table), W, penalty)
  expected = [_every(logp, penalty) for logp in _log_probs(table)]
  _check(actual, expected, W, L)


@pytest.mark.parametrize(
  'W, penalty', [(1, 1.0), (2, 0.0), (2, 1.0), (2, 3.0), (3, -0.5), (5, 1.0)]
)
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seeds, holes)
def test_a_narrow_beam_is_a_beam_of_lists(W, penalty, seed, holes):
  V, L = 4, 5
  table = _table(seed, V, L, holes)
  with jax.enable_x64(True):
    actual = _search(jnp.asarray(table), W, penalty)
  expected = [_python_beam(logp, W, penalty) for logp in _log_probs(table)]
  _check(actual, expected, W, L)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seeds)
def test_a_beam_of_one_is_greedy(seed):
  V, L = 4, 5
  table = _table(seed, V, L, 0.0)
  with jax.enable_x64(True):
    actual = _search(jnp.asarray(table), 1, 1.0)
  expected = []
  for logp in _log_probs(table):
    tokens, total = [], 0.0
    while END not in tokens:
      step, code = len(tokens), _code(tokens, V)
      last = step == L - 2
      tokens.append(END if last else int(np.argmax(logp[step, code])))
      total += logp[step, code, tokens[-1]]
    expected.append([(total / len(tokens), tuple(tokens))])
  _check(actual, expected, 1, L)


def test_by_hand():
  """Length counts `end` and not `begin`; a longer answer wins by its mean."""
  first, then = np.log([0.5, 0.3, 0.2]), np.log([0.05, 0.9, 0.05])
  table = np.zeros((1, 2, 9, 3))
  table[0, 0], table[0, 1] = first, then
  with jax.enable_x64(True):
    ids, score = _search(jnp.asarray(table), 3, 1.0)
  assert ids.tolist() == [[[2, 0, 1], [2, 2, 1], [2, 1, -1]]]
  np.testing.assert_allclose(
    score[0],
    [np.log(0.5 * 0.9) / 2, np.log(0.2 * 0.9) / 2, np.log(0.3)],
    rtol=1e-9,
  )


def _alone(logits_of, L, *, W, V=3, penalty=0.0, rows=1):
  def whole(ids_NxL, step):
    assert ids_NxL.shape == (rows * W, L)
    return jnp.broadcast_to(logits_of(step), (rows * W, V))

  ids, score = beam.search(
    whole, rows, L, beam=W, begin=BEGIN, end=END, pad=PAD, penalty=penalty
  )
  return ids.tolist(), score


def test_equals_go_by_age_beam_and_token():
  ids, score = _alone(lambda step: jnp.zeros((1, 3)), 4, W=4, penalty=-3.0)
  # Ties within a length; the penalty puts short ones first.
  assert ids == [[[2, 1, -1, -1], [2, 0, 1, -1], [2, 0, 0, 1], [2, 0, 2, 1]]]
  even = jnp.array([[0, 0, -jnp.inf]])
  sure = jnp.array([[-jnp.inf, 0, -jnp.inf]])
  ids, score = _alone(lambda step: jnp.where(step < 1, even, sure), 4, W=2)
  assert score[0, 0] == score[0, 1]
  assert ids == [[[2, 1, -1, -1], [2, 0, 1, -1]]]


def test_stops_when_nothing_can_win():
  """Any step too many would meet NaN; the answers take two."""
  steady = jnp.log(jnp.array([[0.08, 0.9, 0.02]]))
  logits_of = lambda step: jnp.where(step < 2, steady, jnp.nan)
  ids, score = _alone(logits_of, 9, W=2)
  assert ids[0][0][:2] == [2, 1] and ids[0][1][:3] == [2, 0, 1]
  np.testing.assert_allclose(
    score[0], np.log([0.9, 0.08 * 0.9]).astype(np.float32), rtol=1e-5
  )


@pytest.mark.parametrize(
  'penalty, L, first, then, later, tokens',
  [
    # It wins at the last length; at the next it would not.
    (1.0, 10, [0.3, 0.6, 0.1], [0.1, 0.9, 0.0], [1.0, 0.0, 0.0], 9),
    # It wins at the next length; with a penalty below 0 not at the last.
    (-2.0, 7, [0.4, 0.6, 0.0], [0.99, 0.01, 0.0], [0.0, 1.0, 0.0], 3),
  ],
)
def test_goes_on_while_any_length_can_win(
  penalty, L, first, then, later, tokens
):
  table = np.array([first, then, *[later] * (L - 4), [0.0, 1.0, 0.0]])
  logits_of = lambda step: jnp.log(jnp.asarray(table))[step][None]
  ids, score = _alone(logits_of, L, W=2, penalty=penalty)
  answer = [BEGIN] + [0] * (tokens - 1) + [END] + [PAD] * (L - 1 - tokens)
  expected = np.log(first[0] * then[0]) / tokens**penalty
  np.testing.assert_allclose(
    score[0, ids[0].index(answer)], expected, rtol=1e-5
  )


def test_nan_is_seen():
  _, score = _alone(lambda step: jnp.full((1, 3), jnp.nan), 4, W=1)
  assert jnp.isnan(score).all()


def test_a_sentence_that_is_done_rests():
  """What the model says of it while others go on changes nothing."""
  V, L, W = 3, 5, 2
  table = _table(0, V, L, 0.0)
  table[0, :, :, 0], table[0, :, :, 1], table[0, :, :, 2] = 0, 6, -6
  table[1, :, :, END] = -9.0
  with jax.enable_x64(True):
    expected = _search(jnp.asarray(table), W, 0.0)
    table[0, 2:] = np.nan
    actual = _search(jnp.asarray(table), W, 0.0)
  for x, y in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(x, y)
  assert (np.asarray(actual[0])[1, 0] != PAD).all()  # the other did go on


def test_scores_are_float32_at_least():
  with jax.enable_x64(True):
    half = jnp.asarray(_table(1, 4, 5, 0.1)).astype(jnp.bfloat16)
    ids, score = _search(half, 3, 1.0)
    full_ids, full_score = _search(half.astype(jnp.float32), 3, 1.0)
  assert score.dtype == jnp.float32
  np.testing.assert_array_equal(ids, full_ids)
  np.testing.assert_array_equal(score, full_score)


def test_refuses_what_cannot_be():
  for sizes in ({'rows': 0, 'W': 1}, {'rows': 1, 'W': 0}):
    with pytest.raises(ValueError, match='must be at least 1, length=4'):
      _alone(lambda step: jnp.zeros((1, 3)), 4, **sizes)
  with pytest.raises(ValueError, match='length=1 at least 2'):
    _alone(lambda step: jnp.zeros((1, 3)), 1, W=1)
  with pytest.raises(ValueError, match='end=1 is not one of the 1 tokens'):
    _alone(lambda step: jnp.zeros((1, 1)), 4, W=1, V=1)
