"""How a layer's answer joins the stream, with memory over depth.

A rule is three functions, as optax's transformations are two:

  init(x) -> memory              for the first layer, all zeros
  peek(h, memory) -> h           what the layer looks at, the identity for most
  apply(x, memory, h, depth) -> x, memory

`depth` is int32, traced, and counts MoE layers from 0; memory has the shape of
x. The momentum rules are of MomentumSMoE (Teo and Nguyen 2024,
arXiv 2410.14574): depth is time, a layer's answer is a negative gradient.

A link is how the answers of several iterations join inside one layer.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import ranges


class Residual(NamedTuple):
  init: Callable[[jax.Array], Any]
  apply: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple]
  peek: Callable[[jax.Array, Any], jax.Array] = lambda h, memory: h


def plain() -> Residual:
  """x + h."""
  return Residual(
    init=lambda x: (),
    apply=lambda x, memory, h, depth: (x + h, memory),
  )


def replace() -> Residual:
  """h: the stream is carried by the link (Chain-of-Experts, 2506.18945)."""
  return Residual(
    init=lambda x: (),
    apply=lambda x, memory, h, depth: (h, memory),
  )


def heavy_ball(
  mu: ranges.Real = 0.7, gamma: ranges.Real = 1.0, sign: ranges.Real = 1.0
) -> Residual:
  """m = mu m + gamma h; x + sign m.

  The authors' code subtracts, sign = -1; their "negative momentum" is mu < 0.
  With mu = 0, gamma = sign = 1 this is `plain`, bit for bit.
  """

  def apply(x, memory, h, depth):
    del depth
    memory = mu * memory + gamma * h
    return x + sign * memory, memory

  return Residual(jnp.zeros_like, apply)


def adam(
  gamma: ranges.Real = 1.0,
  b1: ranges.Decay = 0.9,
  b2: ranges.Decay = 0.999,
  mu: ranges.Real = 0.7,
  momentum_gamma: ranges.Real = 1.0,
  layers: Literal['first', 'all'] = 'first',
  decay: ranges.Fraction = 1.0,
  eps: ranges.Positive = 1e-8,
) -> Residual:
  """p = b1 p + (1 - b1) h; v = b2 v + (1 - b2) h^2; eps inside the root:

    (1 - decay) x - gamma p / sqrt(v + eps), without a correction of the bias.

  With layers='first' that is the first MoE layer, and those above it go on with
  m = mu m + momentum_gamma h; x - m, in which the first answer counts too; so
  has it the authors' code, and decay 1. With 'all' it is every layer.
  """

  def apply(x, memory, h, depth):
    p, v, m = memory
    here = depth == 0 if layers == 'first' else True
    p = jnp.where(here, b1 * p + (1 - b1) * h, p)
    v = jnp.where(here, b2 * v + (1 - b2) * h * h, v)
    m = mu * m + momentum_gamma * h
    step = gamma * p / jnp.sqrt(v + eps)
    return jnp.where(here, (1 - decay) * x - step, x - m), (p, v, m)

  return Residual(lambda x: (jnp.zeros_like(x),) * 3, apply)


def robust(
  rho: Annotated[float, ranges.Within('(0, 1)')] = 0.2,
  kappa: Annotated[float, ranges.Within('(1, inf)')] = 1.25,
) -> Residual:
  """m = alpha m - h; x + beta m, with h answered at what peek shows.

  The robust momentum method (Cyrus et al. 2018, arXiv 1710.04753) of rate rho
  for condition numbers up to kappa and curvatures up to 1: ValueError unless
  1 - 1 / sqrt(kappa) <= rho <= 1 - 1 / kappa.
  """
  low, high = 1 - kappa**-0.5, 1 - 1 / kappa
  if not low - 1e-9 <= rho <= high + 1e-9:
    between = f'[{low:.4f}, {high:.4f}]'
    raise ValueError(f'rho is {rho}, not in {between} of kappa={kappa}')
  alpha = kappa * rho**3 / (kappa - 1)
  beta = kappa * (1 - rho) ** 2 * (1 + rho)
  ahead = rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho)) * beta

  def apply(x, memory, h, depth):
    del depth
    memory = alpha * memory - h
    return x + beta * memory, memory

  return Residual(jnp.zeros_like, apply, lambda h, memory: h + ahead * memory)


def complex_momentum(
  b1: ranges.Real = 0.7, b2: ranges.Real = 0.1, gamma: ranges.Real = 1.0
) -> Residual:
  """m = (b1 + i b2) m + gamma h; x - Re m, with m as a pair of real arrays."""

  def apply(x, memory, h, depth):
    del depth
    real, imaginary = memory
    real, imaginary = (
      b1 * real - b2 * imaginary + gamma * h,
      b1 * imaginary + b2 * real,
    )
    return x - real, (real, imaginary)

  return Residual(lambda x: (jnp.zeros_like(x),) * 2, apply)


MOMENTUM = {
  'heavy_ball': heavy_ball,
  'adam': adam,
  'robust': robust,
  'complex': complex_momentum,
}
RULES = {'plain': plain, 'replace': replace, **MOMENTUM}


class Link(NamedTuple):
  """join(h0, h, y, scale, last) -> h of the next iteration, or the answer.

  h0 is the layer's input, h the iteration's, y its answer; last is a bool.
  `learned`: scale is a learned scalar of the iteration, 0 at first; else None.
  """

  join: Callable[..., jax.Array]
  learned: bool = False


LINKS = {
  'replace': Link(lambda h0, h, y, scale, last: y),
  'add': Link(lambda h0, h, y, scale, last: h + y),
  'init': Link(lambda h0, h, y, scale, last: h0 + y),
  # At first every iteration sees h0, so the last answers as a plain layer does.
  'upcycle': Link(
    lambda h0, h, y, scale, last: y if last else h0 + scale.astype(y.dtype) * y,
    learned=True,
  ),
}

# Two carriers of the same residual: the answer that a momentum rule averages
# would contain the layer's own input, which a link has already added.
_CARRIED = 'momentum acts on answers, not on a carried input'
REFUSED = {
  (link, rule): _CARRIED
  for link in ('add', 'init', 'upcycle')
  for rule in MOMENTUM
}


def get(name: str, **options) -> Residual:
  """The rule of that name; ValueError if there is none such."""
  if name not in RULES:
    raise ValueError(f'no residual rule {name!r}; there are {", ".join(RULES)}')
  ranges.check(RULES[name], options)
  return _wide(RULES[name](**options))


def _wide(rule):
  """The same in at least float32, which its memory has: coefficients as 0.999
  are 1 in bfloat16."""
  wide = lambda a: a.astype(np.promote_types(a.dtype, jnp.float32))

  def peek(h, memory):
    return rule.peek(wide(h), memory).astype(h.dtype)

  def apply(x, memory, h, depth):
    new, memory = rule.apply(wide(x), memory, wide(h), depth)
    return new.astype(x.dtype), memory

  return Residual(lambda x: rule.init(wide(x)), apply, peek)


def check(link: str, rule: str) -> None:
  """ValueError for an unknown link, or one that the rule cannot be with."""
  if link not in LINKS:
    raise ValueError(f'no link {link!r}; there are {", ".join(LINKS)}')
  if (link, rule) in REFUSED:
    reason = REFUSED[link, rule]
    raise ValueError(f'link {link!r} with residual {rule!r}: {reason}')
