"""Schemes: the spread, the bounds and the fans that each promises."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import init

IN, OUT = 100, 300
PARTS = ['experts', 'feed', 'attention', 'out']
LIMITS = {  # of the weights' uniform draws, by scheme and part
  ('momentum_smoe', 'experts'): (IN * OUT) ** -0.5,
  ('momentum_smoe', 'feed'): IN**-0.5,
  ('momentum_smoe', 'attention'): IN**-0.5,
  ('momentum_smoe', 'out'): IN**-0.5,
  ('thor', 'experts'): IN**-0.5,
  ('thor', 'feed'): IN**-0.5,
  ('thor', 'attention'): (3 / (IN + OUT)) ** 0.5,
  ('thor', 'out'): (6 / (IN + OUT)) ** 0.5,
  ('vit', 'experts'): (6 / (IN + OUT)) ** 0.5,
  ('vit', 'feed'): (6 / (IN + OUT)) ** 0.5,
  ('vit', 'attention'): (6 / (IN + OUT)) ** 0.5,
  ('vit', 'out'): (6 / (IN + OUT)) ** 0.5,
}
BIASED = {  # where biases are drawn too
  ('momentum_smoe', 'feed'),
  ('momentum_smoe', 'attention'),
  ('momentum_smoe', 'out'),
  ('thor', 'experts'),
  ('thor', 'feed'),
  ('thor', 'attention'),
}


def _draw(scheme, part):
  return getattr(init.get(scheme), part).weight(
    jax.random.key(0), (IN, 5, OUT // 5), IN, OUT
  )


def _is_uniform(draw, limit):
  assert limit * 0.99 < np.abs(draw).max() <= limit
  assert np.abs(np.mean(draw)) < 0.02 * limit
  assert np.std(draw) == pytest.approx(limit / 3**0.5, rel=0.02)


@pytest.mark.parametrize('scheme, part', LIMITS)
def test_uniform_weights_have_their_limit(scheme, part):
  _is_uniform(_draw(scheme, part), LIMITS[scheme, part])


@pytest.mark.parametrize('part', PARTS)
def test_lecun_is_cut_at_two_deviations_and_keeps_its_variance(part):
  draw = _draw('lecun', part)
  assert np.std(draw) == pytest.approx(IN**-0.5, rel=0.02)
  assert 1.9 < np.abs(draw).max() * IN**0.5 * 0.8796 <= 2


@pytest.mark.parametrize('part', PARTS)
def test_normal_has_one_deviation_whatever_the_fans(part):
  draw = _draw('normal', part)
  assert np.std(draw) == pytest.approx(0.02, rel=0.02)
  assert np.abs(draw).max() > 3 * 0.02


@pytest.mark.parametrize('scheme', init.SCHEMES)
@pytest.mark.parametrize('part', PARTS)
def test_biases_are_zero_or_uniform_in_the_fan(scheme, part):
  draw = getattr(init.get(scheme), part).bias(jax.random.key(1), (5, 900), IN)
  assert draw.shape == (5, 900)
  if (scheme, part) in BIASED:
    _is_uniform(draw, IN**-0.5)
  else:
    np.testing.assert_array_equal(draw, 0)


def test_lecun_draws_what_flax_draws_for_each_expert():
  key, shape = jax.random.key(3), (4, 12, 20)
  expected = nnx.initializers.lecun_normal(batch_axis=0)(key, shape)
  got = init.get('lecun').feed.weight(key, shape, 12, 20)
  np.testing.assert_array_equal(got, expected)


def test_the_shape_of_a_projection_does_not_change_its_draw():
  weight = init.get('lecun').attention.weight
  flat = weight(jax.random.key(3), (8, 12), 8, 12)
  heads = weight(jax.random.key(3), (8, 3, 4), 8, 12)
  np.testing.assert_array_equal(heads.reshape(8, 12), flat)


def test_an_unknown_scheme_is_refused_with_those_that_exist():
  with pytest.raises(ValueError, match=r"'lecum'.*lecun, .*, vit"):
    init.get('lecum')
