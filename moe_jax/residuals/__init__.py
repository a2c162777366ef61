"""How a layer's answer joins the stream, with memory over depth.

A file here defines `rule(...)`, a function of the rule's options to a
`Residual`, and MOMENTUM, whether it averages answers: then no inner residual
may carry the stream. It is found by its name, as a router is.

A rule is three functions, as optax's transformations are two:

  init(x) -> memory              for the first layer, all zeros
  lookahead(h, memory) -> h      what the layer looks at, the identity for most
  apply(x, memory, h, depth) -> x, memory

`depth` is int32, traced, and counts MoE layers from 0; memory has the shape of
x. The momentum rules are of MomentumSMoE (Teo and Nguyen 2024,
arXiv 2410.14574): depth is time, a layer's answer is a negative gradient.

An inner residual is how the answers of several iterations join in one layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import byname, ranges


class Residual(NamedTuple):
  init: Callable[[jax.Array], Any]
  apply: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple]
  lookahead: Callable[[jax.Array, Any], jax.Array] = lambda h, memory: h


class InnerResidual(NamedTuple):
  """join(h0, h, y, scale, last) -> h of the next iteration, or the answer.

  h0 is the layer's input, h the iteration's, y its answer; last is a bool.
  `learned`: scale is a learned scalar of the iteration, 0 at first; else None.
  """

  join: Callable[..., jax.Array]
  learned: bool = False


INNER_RESIDUALS = {
  'replace': InnerResidual(lambda h0, h, y, scale, last: y),
  'add': InnerResidual(lambda h0, h, y, scale, last: h + y),
  'init': InnerResidual(lambda h0, h, y, scale, last: h0 + y),
  # At first every iteration sees h0, so the last answers as a plain layer does.
  'upcycle': InnerResidual(
    lambda h0, h, y, scale, last: y if last else h0 + scale.astype(y.dtype) * y,
    learned=True,
  ),
}

# Links that carry the stream. A momentum rule would average what they have
# already added: two carriers of the same residual.
CARRIERS = ('add', 'init', 'upcycle')


def names() -> list[str]:
  """The rules that exist."""
  return byname.names(__name__)


def rule(name: str) -> Callable[..., Residual]:
  """The rule of that name, a function of its options; ValueError without."""
  return byname.find(__name__, 'residual rule', name).rule


def get(name: str, **options) -> Residual:
  """The rule of that name with these options; ValueError if there is none."""
  make = rule(name)
  ranges.check(make, options)
  return _wide(make(**options))


def momentum(name: str) -> bool:
  """Whether the rule of that name averages answers."""
  return byname.find(__name__, 'residual rule', name).MOMENTUM


def _wide(rule):
  """The same in at least float32, which its memory has: coefficients as 0.999
  are 1 in bfloat16."""
  wide = lambda a: a.astype(np.promote_types(a.dtype, jnp.float32))

  def lookahead(h, memory):
    return rule.lookahead(wide(h), memory).astype(h.dtype)

  def apply(x, memory, h, depth):
    new, memory = rule.apply(wide(x), memory, wide(h), depth)
    return new.astype(x.dtype), memory

  return Residual(lambda x: rule.init(wide(x)), apply, lookahead)


def check(inner: str, rule: str) -> None:
  """ValueError for an unknown inner residual, or one that the rule refuses."""
  if inner not in INNER_RESIDUALS:
    raise ValueError(
      f'no inner_residual {inner!r}; there are {", ".join(INNER_RESIDUALS)}'
    )
  if inner in CARRIERS and momentum(rule):
    raise ValueError(
      f'inner_residual {inner!r} with residual {rule!r}: momentum acts on'
      ' answers, not on a carried input'
    )
