"""Text and images that the study of momentum over depth spoils."""

import numpy as np

from experiments.studies.momentum import measure

SPOTS = np.zeros((2, 28, 28), np.float32)
SPOTS[0, 10, 12] = 200.0


def test_a_fortieth_of_the_words_are_swapped_and_one_at_least():
  lines = ['a tree of oak', 'to be or not', ' '.join(['wood', 'of'] * 200)]
  first, second, third = measure.swap('\n'.join(lines)).splitlines()
  assert first == 'a AAA of oak'
  assert second == lines[1]  # has no long word
  assert third.split().count('AAA') == 10 and third.split().count('of') == 200


def test_what_is_moved_comes_from_nowhere_else():
  shifted = measure.SPOILT['shift'](SPOTS)
  assert shifted[0, 13, 15] == 200.0 and shifted.sum() == 200.0
  edge = np.zeros_like(SPOTS)
  edge[0, -1, -1] = 200.0
  assert not measure.SPOILT['shift'](edge).any()


def test_blur_stays_in_its_image():
  first, second = measure.SPOILT['blur'](SPOTS)
  np.testing.assert_allclose(first.sum(), 200.0, rtol=1e-4)
  assert not second.any()
  from_centre = np.arange(28) - 10
  variance = (first.sum(axis=1) * from_centre**2).sum() / first.sum()
  np.testing.assert_allclose(variance, 4.0, rtol=0.05)


def test_noise_is_the_same_for_every_arm_and_as_strong_as_said():
  noise, again = (measure.SPOILT['noise'](SPOTS) - SPOTS for _ in range(2))
  np.testing.assert_array_equal(noise, again)
  np.testing.assert_allclose(noise.std(), 100, rtol=0.05)
  assert abs(noise.mean()) < 10 and (noise[0] != noise[1]).any()


def test_contrast_is_three_tenths():
  np.testing.assert_allclose(measure.SPOILT['contrast'](SPOTS), 0.3 * SPOTS)
