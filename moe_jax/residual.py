"""How a layer's answer joins the stream, with memory over depth.

A rule is three functions, as optax's transformations are two:

  init(x) -> memory              for the first layer
  peek(h, memory) -> h           what the layer looks at, the identity for most
  apply(x, memory, h, depth) -> x, memory

A link is how the answers of several iterations join inside one layer:
link(h0, h, y) -> h, with h0 the layer's input and y the newest answer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Residual(NamedTuple):
  init: Callable[[jax.Array], Any]
  peek: Callable[[jax.Array, Any], jax.Array]
  apply: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple]


def plain() -> Residual:
  """x + h."""
  return Residual(
    init=lambda x: (),
    peek=lambda h, memory: h,
    apply=lambda x, memory, h, depth: (x + h, memory),
  )


def replace() -> Residual:
  """h: the stream is carried by the link (Chain-of-Experts, 2506.18945)."""
  return Residual(
    init=lambda x: (),
    peek=lambda h, memory: h,
    apply=lambda x, memory, h, depth: (h, memory),
  )


def heavy_ball(mu: float = 0.7, gamma: float = 1.0, sign: float = 1.0):
  """m = mu m + gamma h; x + sign m (MomentumSMoE, arXiv 2410.14574).

  The authors' code subtracts, sign = -1. With mu = 0, gamma = sign = 1 this is
  `plain`, bit for bit.
  """

  def apply(x, memory, h, depth):
    del depth
    memory = mu * memory + gamma * h
    return x + sign * memory, memory

  return Residual(init=jnp.zeros_like, peek=lambda h, memory: h, apply=apply)


RULES = {'plain': plain, 'replace': replace, 'heavy_ball': heavy_ball}

LINKS = {
  'replace': lambda h0, h, y: y,
  'add': lambda h0, h, y: h + y,
  'init': lambda h0, h, y: h0 + y,
}

# Two carriers of the same residual: the answer that a momentum rule averages
# would contain the layer's own input, which a link has already added.
REFUSED = {
  ('add', 'heavy_ball'): 'momentum acts on answers, not on a carried input',
  ('init', 'heavy_ball'): 'momentum acts on answers, not on a carried input',
}


def get(name: str, **options) -> Residual:
  """The rule of that name; ValueError if there is none."""
  if name not in RULES:
    raise ValueError(f'no residual rule {name!r}; there are {", ".join(RULES)}')
  return RULES[name](**options)


def check(link: str, rule: str) -> None:
  """ValueError for an unknown link, or one that the rule cannot be with."""
  if link not in LINKS:
    raise ValueError(f'no link {link!r}; there are {", ".join(LINKS)}')
  if (link, rule) in REFUSED:
    reason = REFUSED[link, rule]
    raise ValueError(f'link {link!r} with residual {rule!r}: {reason}')
