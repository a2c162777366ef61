"""Norms by hand, and in the precision that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import norm

B, L, D = 2, 7, 12


def _x():
  return np.float32(np.random.default_rng(1).normal(size=(B, L, D)))


def test_rms_by_hand():
  module = norm.RMSNorm(D)
  scale_D = np.arange(1, D + 1, dtype=np.float32)
  module.scale_D[...] = jnp.asarray(scale_D)
  x = 100 * _x() + 3
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * scale_D
  np.testing.assert_allclose(module(x), expected, 1e-5)


def test_layer_by_hand():
  module = norm.LayerNorm(D)
  scale_D = np.arange(1, D + 1, dtype=np.float32)
  bias_D = np.cos(scale_D)
  module.scale_D[...] = jnp.asarray(scale_D)
  module.bias_D[...] = jnp.asarray(bias_D)
  x = 100 * _x() + 3
  centred = x - x.mean(-1, keepdims=True)
  expected = centred / x.std(-1, keepdims=True) * scale_D + bias_D
  np.testing.assert_allclose(module(x), expected, 1e-4, 1e-5)


@pytest.mark.parametrize('name', norm.NORMS)
def test_eps_is_added_to_the_mean_square(name):
  """A vector whose mean is 0 and mean square eps loses a factor sqrt(2)."""
  module = norm.NORMS[name](D, eps=1e-2)
  x = np.float32([[0.1, -0.1] * (D // 2)])
  np.testing.assert_allclose(module(x), np.sign(x) / np.sqrt(2), 1e-5)
  assert (norm.NORMS[name](D)(np.zeros((1, D), np.float32)) == 0).all()


@pytest.mark.parametrize('name', norm.NORMS)
def test_bfloat16_is_computed_in_float32(name):
  module = norm.NORMS[name](D)
  x = jnp.asarray(_x(), jnp.bfloat16)
  y = module(x)
  assert y.dtype == jnp.bfloat16
  exact = module(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.float32(y), np.float32(exact))


@pytest.mark.parametrize('name', norm.NORMS)
def test_float64_is_computed_in_float64(name):
  with jax.enable_x64(True):
    x = jnp.asarray(_x(), jnp.float64)
    y = norm.NORMS[name](D)(x)
    assert y.dtype == jnp.float64
    x = np.float64(x) - (name == 'layer') * np.float64(x).mean(-1)[..., None]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, 1e-12)


def test_a_large_mean_costs_the_layer_norm_no_digits():
  """E[x^2] - E[x]^2 in float32 would be 0 here, or negative."""
  x = np.float32(np.arange(D)[None] + 10_000)
  exact = (np.arange(D) - np.arange(D).mean()) / np.arange(D).std()
  np.testing.assert_allclose(norm.LayerNorm(D)(x)[0], exact, 1e-4)
