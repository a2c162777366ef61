"""Norms over the last axis, computed in at least float32 and cast back."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class RMSNorm(nnx.Module):
  """x / rms(x) * scale (Zhang, Sennrich, 1910.07467)."""

  def __init__(self, D: int, eps: float = 1e-6):
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones((D,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = _wide(x)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * _last(self.scale_D, y)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean(x)) / std(x) * scale + bias (Ba et al. 2016, 1607.06450)."""

  def __init__(self, D: int, eps: float = 1e-6):
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones((D,)))
    self.bias_D = nnx.Param(jnp.zeros((D,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = _wide(x)
    # Not E[x^2] - E[x]^2, which loses all digits where the mean is large.
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * _last(self.scale_D, y) + _last(self.bias_D, y)).astype(x.dtype)


NORMS = {'rms': RMSNorm, 'layer': LayerNorm}


def _wide(x):
  return x.astype(np.promote_types(x.dtype, jnp.float32))


def _last(param_D, y):
  """The parameter in the dtype and rank of y."""
  return param_D[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
