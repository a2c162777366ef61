"""How parameters start: one scheme per family of models.

`fan_in` and `fan_out` are numbers, not read off the shape, because a projection
[D, H, S] has the fans D and H * S.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Init(NamedTuple):
  """How the linear maps of one kind start."""

  weight: Callable[..., jax.Array]  # (key, shape, fan_in, fan_out)
  bias: Callable[..., jax.Array]  # (key, shape, fan_in)


class Scheme(NamedTuple):
  """How all linear maps of a model start, by their place."""

  experts: Init
  feed: Init  # feed-forwards of dense layers, shared experts
  attention: Init  # queries, keys and values
  out: Init  # attention's output projection
  shrinks: bool  # maps into the stream start smaller in a deeper model


def get(name: str) -> Scheme:
  """The scheme of this name; ValueError if there is none."""
  if name not in SCHEMES:
    raise ValueError(f'no scheme {name!r}; there are {", ".join(SCHEMES)}')
  return SCHEMES[name]


def _zero(key, shape, fan_in):
  del key, fan_in
  return jnp.zeros(shape)


def _uniform(key, shape, bound):
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _torch_bias(key, shape, fan_in):
  return _uniform(key, shape, fan_in**-0.5)


def _lecun(key, shape, fan_in, fan_out):
  """Normal of variance 1 / fan_in, after it is cut at 2 deviations."""
  del fan_out
  draw = jax.random.truncated_normal(key, -2, 2, shape)
  cast = lambda a: jnp.asarray(a, draw.dtype)
  return draw * (jnp.sqrt(cast(1 / fan_in)) / cast(_STD_OF_CUT_NORMAL))


_STD_OF_CUT_NORMAL = 0.87962566103423978  # of the standard normal within +-2


def _normal(key, shape, fan_in, fan_out):
  del fan_in, fan_out
  return 0.02 * jax.random.normal(key, shape)


def _torch(key, shape, fan_in, fan_out):
  del fan_out
  return _uniform(key, shape, fan_in**-0.5)


def _product(key, shape, fan_in, fan_out):
  return _uniform(key, shape, (fan_in * fan_out) ** -0.5)


def _xavier(gain):
  def weight(key, shape, fan_in, fan_out):
    return _uniform(key, shape, gain * math.sqrt(6 / (fan_in + fan_out)))

  return weight


LECUN = Init(_lecun, _zero)
NORMAL = Init(_normal, _zero)  # GPT-2, DeepSeek: N(0, 0.02)
TORCH = Init(_torch, _torch_bias)  # torch.nn.Linear
# torch's rule on the whole tensor [E, out, in]: FastMoE's experts.
PRODUCT = Init(_product, _zero)
XAVIER = Init(_xavier(1.0), _zero)  # Glorot, Bengio 2010, eq. 16

SCHEMES = {
  'lecun': Scheme(LECUN, LECUN, LECUN, LECUN, True),
  'normal': Scheme(NORMAL, NORMAL, NORMAL, NORMAL, False),
  'megatron': Scheme(NORMAL, NORMAL, NORMAL, NORMAL, True),  # arXiv 1909.08053
  'momentum_smoe': Scheme(
    PRODUCT, TORCH, TORCH, TORCH, False
  ),  # arXiv 2410.14574
  'thor': Scheme(
    TORCH, TORCH, Init(_xavier(0.5**0.5), _torch_bias), XAVIER, False
  ),  # fairseq
  'vit': Scheme(XAVIER, XAVIER, XAVIER, XAVIER, False),  # arXiv 2010.11929
}
