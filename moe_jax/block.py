"""The shape of a layer: where its norms and residuals sit.

A block owns its norms and its attention, and holds a feed-forward that is
`Dense` or `Routed`; it decides where the residual rule looks ahead:

  block(x, memory, experts, wiring, ctx, view, source) -> x, memory, aux

memory is the pair (residual memory, router memory); a dense layer passes it on
and has no aux. view is what attention may see, source what the attention to
another sequence reads: its tokens and their view.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import residuals
from moe_jax import routers as routing
from moe_jax.attention import Attention, View
from moe_jax.experts import Dense
from moe_jax.parallel import Layout

ROUTINGS = ('each', 'shared', 'once')
Memory = tuple[Any, Any]
Source = tuple[jax.Array, View] | None


@dataclasses.dataclass(frozen=True)
class Wiring:
  """What is the same for every layer and owns no parameters.

  Attributes:
    routing: an iteration has a router of its own ('each'); all share one and
      ask it again ('shared'); or the first plan serves all ('once').
  """

  residual: residuals.Residual
  link: residuals.Link
  iterations: int
  routing: str
  dropout: float
  layout: Layout


class Routed(nnx.Module):
  """The (router, same experts) steps of one layer (Chain-of-Experts).

  Args:
    routers: one, or one for each of the I iterations, stacked.
    shared: experts that see every token in every iteration, or None.
    scale_I: what a learned link multiplies answers by, or None.
  """

  def __init__(
    self, routers: nnx.Module, shared: Dense | None, scale_I: nnx.Param | None
  ):
    self.routers, self.shared, self.scale_I = routers, shared, scale_I

  def __call__(
    self,
    h0_TxD: jax.Array,
    memory: Any,
    experts: Callable[..., jax.Array],
    wiring: Wiring,
    ctx: routing.Ctx,
  ) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Returns h_TxD, the router memory, and aux with a leading axis I.

    `ctx.forced` has that axis too. With routing 'once' it is 1 long, but not
    that of `lost`, the rows for which the layout had no place. Out of training
    aux also has the `plan`, for who wants to look at it.
    """
    h_TxD, reports, losts, plan = h0_TxD, [], [], None
    for i in range(wiring.iterations):
      if plan is None or wiring.routing != 'once':
        router = at(self.routers, i if wiring.routing == 'each' else 0)
        plan, aux, memory = router(h_TxD, ctx.at_iteration(i), memory)
        # Not in training, where the gradient would carry it through the scans.
        reports.append(aux if ctx.train else {**aux, 'plan': plan})
      y_TxD, lost = wiring.layout(h_TxD, plan, experts)
      losts.append(lost)
      if self.shared is not None:
        y_TxD += self.shared(h_TxD)
      y_TxD = drop(y_TxD, wiring.dropout, ctx, 2 + i)
      scale = None if self.scale_I is None else self.scale_I[...][i]
      last = i == wiring.iterations - 1
      h_TxD = wiring.link.join(h0_TxD, h_TxD, y_TxD, scale, last)
    aux = jax.tree.map(lambda *a: jnp.stack(a), *reports)
    return h_TxD, memory, {**aux, 'lost': jnp.stack(losts)}


Feed = Dense | Routed


class Block(nnx.Module):
  """The contract, and what all blocks share.

  Args:
    norm: (D) -> a norm.
    cross: the attention to another sequence, or None.

  Attributes:
    normalised: the block's answer is normalised, so that the model needs no
      norm after its last layer.
    raw: attention reads the layer's input as it is, so that a cache of inputs
      is one of what attention has read.
    crosses: it can attend to another sequence too.
  """

  normalised, raw, crosses = False, False, False

  def __init__(
    self,
    D: int,
    norm: Callable[[int], nnx.Module],
    attention: Attention,
    cross: Attention | None,
    feed: Feed,
  ):
    self.attention, self.cross, self.feed = attention, cross, feed
    self.norm_attention, self.norm_feed = norm(D), norm(D)
    if cross is not None:
      self.norm_cross = norm(D)

  def __call__(
    self,
    x_BxLxD: jax.Array,
    memory: Memory,
    experts: Callable[..., jax.Array] | None,
    wiring: Wiring,
    ctx: routing.Ctx,
    view: View,
    source: Source = None,
  ) -> tuple[jax.Array, Memory, dict[str, Any] | None]:
    raise NotImplementedError

  def reads(self, x_BxLxD: jax.Array) -> jax.Array:
    """What attention sees of the layer's input."""
    return x_BxLxD if self.raw else self.norm_attention(x_BxLxD)

  def _attend(self, x_BxLxD, wiring, ctx, view):
    return _drop(self.attention(x_BxLxD, view), wiring, ctx, 0)

  def _cross(self, x_BxLxD, wiring, ctx, source):
    source_BxMxD, view = source
    return _drop(self.cross(x_BxLxD, view, source_BxMxD), wiring, ctx, 1)

  def _peek(self, h_BxLxD, memory, wiring):
    """The look-ahead of a routed layer; a dense one sees h as it is."""
    if isinstance(self.feed, Dense):
      return h_BxLxD
    return _peek(h_BxLxD, memory, wiring)

  def _join(self, x_BxLxD, h_BxLxD, memory, experts, wiring, ctx):
    """x with the answer to h: by the residual rule, or in a dense layer x + y.

    Returns x, memory, aux.
    """
    x_TxD, h_TxD = flat(x_BxLxD), flat(h_BxLxD)
    if isinstance(self.feed, Dense):
      x_TxD += drop(self.feed(h_TxD), wiring.dropout, ctx, 2)
      return x_TxD.reshape(x_BxLxD.shape), memory, None
    kept, router_memory = memory
    h_TxD, router_memory, aux = self.feed(
      h_TxD, router_memory, experts, wiring, ctx
    )
    x_TxD, kept = wiring.residual.apply(x_TxD, kept, h_TxD, ctx.depth)
    return x_TxD.reshape(x_BxLxD.shape), (kept, router_memory), aux


class PreNorm(Block):
  """x + attention(norm(x)), then x with the answer to norm(x)."""

  crosses = True

  def __call__(self, x, memory, experts, wiring, ctx, view, source=None):
    x += self._attend(self.norm_attention(x), wiring, ctx, view)
    if source is not None:
      x += self._cross(self.norm_cross(x), wiring, ctx, source)
    h = self._peek(self.norm_feed(x), memory, wiring)
    return self._join(x, h, memory, experts, wiring, ctx)


class PostNorm(Block):
  """norm(x + attention(x)), then norm of x with its answer (1706.03762)."""

  normalised, raw, crosses = True, True, True

  def __call__(self, x, memory, experts, wiring, ctx, view, source=None):
    x = self.norm_attention(x + self._attend(x, wiring, ctx, view))
    if source is not None:
      x = self.norm_cross(x + self._cross(x, wiring, ctx, source))
    h = self._peek(x, memory, wiring)
    x, memory, aux = self._join(x, h, memory, experts, wiring, ctx)
    return self.norm_feed(x), memory, aux


class AuthorsLM(Block):
  """MomentumSMoE's language model (2410.14574, the released code).

  norm(x + attention(x)), then norm(x + inner(x with the answer to x)): the
  residual is added twice. A dense layer is norm(x + y), as in their GLaM.
  """

  normalised, raw = True, True

  def __init__(self, D, norm, attention, cross, feed):
    super().__init__(D, norm, attention, cross, feed)
    if isinstance(feed, Routed):
      self.norm_inner = norm(D)

  def __call__(self, x, memory, experts, wiring, ctx, view, source=None):
    del source
    x = self.norm_attention(x + self._attend(x, wiring, ctx, view))
    if isinstance(self.feed, Dense):
      y, memory, aux = self._join(x, x, memory, experts, wiring, ctx)
    else:
      z, memory, aux = self._routed(x, memory, experts, wiring, ctx)
      y = x + z
    return self.norm_feed(y), memory, aux

  def _routed(self, x, memory, experts, wiring, ctx):
    h = self._peek(x, memory, wiring)
    z, memory, aux = self._join(x, h, memory, experts, wiring, ctx)
    return self.norm_inner(z), memory, aux


class AuthorsLMInside(AuthorsLM):
  """The same with the inner norm before the experts (`pre_lnorm` there)."""

  def _routed(self, x, memory, experts, wiring, ctx):
    h = self._peek(self.norm_inner(x), memory, wiring)
    return self._join(x, h, memory, experts, wiring, ctx)


class VMoE(Block):
  """Momentum V-MoE: pre-norm, and one more norm after each layer.

  The look-ahead follows the norm, in dense layers too. With the residual rule
  `plain` it is the baseline with as many norms.
  """

  def __init__(self, D, norm, attention, cross, feed):
    super().__init__(D, norm, attention, cross, feed)
    self.norm_after = norm(D)

  def __call__(self, x, memory, experts, wiring, ctx, view, source=None):
    del source
    x += self._attend(self.norm_attention(x), wiring, ctx, view)
    h = _peek(self.norm_feed(x), memory, wiring)
    x, memory, aux = self._join(x, h, memory, experts, wiring, ctx)
    return self.norm_after(x), memory, aux


BLOCKS = {
  'pre': PreNorm,
  'post': PostNorm,
  'authors_lm': AuthorsLM,
  'authors_lm_inside': AuthorsLMInside,
  'vmoe': VMoE,
}


def drop(
  x_TxD: jax.Array, rate: float, ctx: routing.Ctx, place: int
) -> jax.Array:
  """Dropout (Srivastava et al. 2014), drawn for each token of the batch.

  Args:
    place: tells apart the dropouts of one layer.
  """
  if not (rate and ctx.train):
    return x_TxD
  keys_T = ctx.token_keys(jax.random.fold_in(ctx.layer_key, place))
  keep = lambda key: jax.random.bernoulli(key, 1 - rate, x_TxD.shape[1:])
  # Wide, as bfloat16 would round the rate itself.
  wide = np.promote_types(x_TxD.dtype, jnp.float32)
  scaled_TxD = (x_TxD.astype(wide) / (1 - rate)).astype(x_TxD.dtype)
  return jnp.where(jax.vmap(keep)(keys_T), scaled_TxD, 0)


def stack(
  make: Callable[[nnx.Rngs], nnx.Module],
  sizes: tuple[int, ...],
  rngs: nnx.Rngs,
) -> nnx.Module:
  """A module made prod(sizes) times; its parameters get leading axes `sizes`.

  Not for calling as it is: index it with `at`, or scan over its `nnx.split`.
  """
  graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  init = lambda key: nnx.state(make(nnx.Rngs(key)))
  for _ in sizes:
    init = jax.vmap(init)
  return nnx.merge(graph, init(jax.random.split(rngs.params(), sizes)))


def at(stacked: nnx.Module, i: int) -> nnx.Module:
  """The i-th module along the first axis of a stack."""
  graph, state = nnx.split(stacked)
  return nnx.merge(graph, jax.tree.map(lambda a: a[i], state))


def flat(x_BxLxD: jax.Array) -> jax.Array:
  """x_TxD."""
  return x_BxLxD.reshape(-1, x_BxLxD.shape[-1])


def _peek(h_BxLxD, memory, wiring):
  h_TxD = wiring.residual.peek(flat(h_BxLxD), memory[0])
  return h_TxD.reshape(h_BxLxD.shape)


def _drop(y_BxLxD, wiring, ctx, place):
  y_TxD = drop(flat(y_BxLxD), wiring.dropout, ctx, place)
  return y_TxD.reshape(y_BxLxD.shape)
