"""The first operation that makes a bad number, among those that may."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.training import nonfinite


def _told(function, *args):
  return nonfinite.made(function, *args)


def test_good_numbers_and_masks_of_infinity_are_good():
  x = jnp.arange(4.0)
  assert _told(lambda x: jnp.exp(-x), x) is None
  masked = lambda x: jax.nn.softmax(jnp.where(x > 1, x, -jnp.inf))
  assert _told(masked, x) is None


def test_the_first_operation_is_told():
  x = jnp.arange(4.0)
  assert _told(lambda x: jnp.log(x - 1), x).startswith('log in ')
  assert _told(lambda x: jnp.exp(x * 1e3) * 0, x).startswith('exp in ')
  # NaN made of infinities, where the mask itself is good.
  empty = lambda x: jax.nn.softmax(jnp.where(x > 9, x, -jnp.inf))
  assert _told(empty, x).startswith('sub in ')


def test_a_nan_that_is_written_into_the_program_is_told():
  x = jnp.arange(4.0)
  assert _told(lambda x: x * jnp.nan, x).startswith('mul in ')
  kept = jnp.asarray(np.array([1, np.nan, 2, 3], np.float32))
  assert _told(lambda x: x * kept, x) is not None
  step = lambda total, a: (total + a * kept[1], a)
  looped = lambda x: jax.lax.scan(step, 0.0, x)
  assert _told(looped, x) is not None
