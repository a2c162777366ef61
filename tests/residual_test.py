"""Residual rules and links, against numbers worked out by hand."""

import numpy as np
import pytest

from moe_jax import residual

X = np.float32([1.0, -2.0])
ANSWERS = np.float32([[1.0, 1.0], [2.0, 0.0], [0.0, 4.0]])


def _run(rule):
  """The stream after each of three layers that answer ANSWERS."""
  x, memory, out = X, rule.init(X), []
  for depth, h in enumerate(ANSWERS):
    np.testing.assert_array_equal(rule.peek(h, memory), h)
    x, memory = rule.apply(x, memory, h, np.int32(depth))
    out.append(np.asarray(x))
  return np.stack(out)


def test_plain_adds():
  np.testing.assert_array_equal(
    _run(residual.get('plain')), X + ANSWERS.cumsum(0)
  )


def test_replace_takes_the_answer():
  np.testing.assert_array_equal(_run(residual.get('replace')), ANSWERS)


def test_heavy_ball_averages_over_depth():
  rule = residual.get('heavy_ball', mu=0.5, gamma=2.0, sign=-1.0)
  momentum = [[2, 2], [5, 1], [2.5, 8.5]]  # 0.5 m + 2 h
  expected = X - np.cumsum(momentum, axis=0, dtype=np.float32)
  np.testing.assert_array_equal(_run(rule), expected)


def test_heavy_ball_without_memory_is_plain_bit_for_bit():
  rule = residual.get('heavy_ball', mu=0.0, gamma=1.0, sign=1.0)
  np.testing.assert_array_equal(_run(rule), _run(residual.get('plain')))


def test_momentum_is_kept_in_the_type_of_the_stream():
  rule = residual.get('heavy_ball')
  low = X.astype(np.float16)
  x, memory = rule.apply(low, rule.init(low), low, np.int32(0))
  assert x.dtype == memory.dtype == np.float16


@pytest.mark.parametrize(
  'link, expected', [('replace', 4), ('add', 2 + 4), ('init', 1 + 4)]
)
def test_links(link, expected):
  assert residual.LINKS[link](1, 2, 4) == expected


@pytest.mark.parametrize('link', ['add', 'init'])
def test_two_carriers_of_the_residual_are_refused(link):
  with pytest.raises(ValueError, match=f"'{link}' with residual 'heavy_ball'"):
    residual.check(link, 'heavy_ball')


@pytest.mark.parametrize('link', residual.LINKS)
@pytest.mark.parametrize('rule', ['plain', 'replace'])
def test_other_crossings_are_allowed(link, rule):
  residual.check(link, rule)
  residual.check('replace', 'heavy_ball')


def test_unknown_names_are_told():
  with pytest.raises(ValueError, match="'adam'; there are plain"):
    residual.get('adam')
  with pytest.raises(ValueError, match="'sum'; there are replace"):
    residual.check('sum', 'plain')


def test_an_unknown_option_is_an_error():
  with pytest.raises(TypeError, match='nu'):
    residual.get('heavy_ball', nu=1.0)
