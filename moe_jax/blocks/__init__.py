"""Blocks: where the norms and residuals of a layer sit. One block per file.

A file here defines one class `Block(blocks.Block)`; `block='pre'` in a config
makes layers of pre.Block. A block owns its norms and its attention, and holds a
feed-forward that is a `DenseLayer` or a `MoELayer`; it decides where the
residual rule looks ahead:

  block(x, memory, experts, spec, ctx, view, source) -> x, memory, aux

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

from moe_jax import byname, residuals, routers
from moe_jax.attention import Attention, View
from moe_jax.experts.mlp import Mlp
from moe_jax.parallel import Layout

ROUTINGS = ('each', 'shared', 'once')
Memory = tuple[Any, Any]
Source = tuple[jax.Array, View] | None


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """What is the same for every layer and owns no parameters.

  Attributes:
    routing: an iteration has a router of its own ('each'); all share one and
      ask it again ('shared'); or the first plan serves all ('once').
  """

  residual: residuals.Residual
  inner_residual: residuals.InnerResidual
  iterations: int
  routing: str
  dropout: float
  layout: Layout


class DenseLayer(Mlp):
  """A feed-forward for all tokens: x + y, with no part in the residual rule."""

  routed = False

  def lookahead(
    self, h_TxD: jax.Array, memory: Memory, spec: LayerSpec
  ) -> jax.Array:
    """h as it is."""
    del memory, spec
    return h_TxD

  def join(
    self,
    x_TxD: jax.Array,
    h_TxD: jax.Array,
    memory: Memory,
    experts: Any,
    spec: LayerSpec,
    ctx: routers.Ctx,
  ) -> tuple[jax.Array, Memory, None]:
    """x with the answer to h; memory as it is, and no aux."""
    del experts
    return x_TxD + drop(self(h_TxD), spec.dropout, ctx, 2), memory, None


class MoELayer(nnx.Module):
  """The (router, same experts) steps of one layer (Chain-of-Experts).

  Its answer joins the stream by the residual rule.

  Args:
    routers: one, or one for each of the I iterations, stacked.
    shared: experts that see every token in every iteration, or None.
    scale_I: what a learned inner residual multiplies answers by, or None.
  """

  routed = True

  def __init__(
    self, routers: nnx.Module, shared: Mlp | None, scale_I: nnx.Param | None
  ):
    self.routers, self.shared, self.scale_I = routers, shared, scale_I

  def __call__(
    self,
    h0_TxD: jax.Array,
    memory: Any,
    experts: Callable[..., jax.Array],
    spec: LayerSpec,
    ctx: routers.Ctx,
  ) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Returns h_TxD, the router memory, and aux with a leading axis I.

    `ctx.replay` has that axis too. With routing 'once' it is 1 long, and
    `overflow`, the rows for which the layout had no place, is summed over
    iterations. Out of training aux also has the `plan`.
    """
    h_TxD, reports, overflows, plan = h0_TxD, [], [], None
    for i in range(spec.iterations):
      if plan is None or spec.routing != 'once':
        router = at(self.routers, i if spec.routing == 'each' else 0)
        plan, aux, memory = router(h_TxD, ctx.at(iteration=i), memory)
        # Not in training, where the gradient would carry it through the scans.
        reports.append(aux if ctx.train else {**aux, 'plan': plan})
      y_TxD, overflow = spec.layout(h_TxD, plan, experts)
      overflows.append(overflow)
      if self.shared is not None:
        y_TxD += self.shared(h_TxD)
      y_TxD = drop(y_TxD, spec.dropout, ctx, 2 + i)
      scale = None if self.scale_I is None else self.scale_I[...][i]
      last = i == spec.iterations - 1
      h_TxD = spec.inner_residual.join(h0_TxD, h_TxD, y_TxD, scale, last)
    aux = jax.tree.map(lambda *a: jnp.stack(a), *reports)
    overflow_I = jnp.stack(overflows).reshape(len(reports), -1).sum(axis=1)
    return h_TxD, memory, {**aux, 'overflow': overflow_I}

  def lookahead(
    self, h_TxD: jax.Array, memory: Memory, spec: LayerSpec
  ) -> jax.Array:
    """What the residual rule makes of h before the experts see it."""
    return spec.residual.lookahead(h_TxD, memory[0])

  def join(
    self,
    x_TxD: jax.Array,
    h_TxD: jax.Array,
    memory: Memory,
    experts: Callable[..., jax.Array],
    spec: LayerSpec,
    ctx: routers.Ctx,
  ) -> tuple[jax.Array, Memory, dict[str, Any]]:
    """x with the answer to h by the residual rule, the memory, and aux."""
    kept, router_memory = memory
    h_TxD, router_memory, aux = self(h_TxD, router_memory, experts, spec, ctx)
    x_TxD, kept = spec.residual.apply(x_TxD, kept, h_TxD, ctx.depth)
    return x_TxD, (kept, router_memory), aux


Feed = DenseLayer | MoELayer


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
    spec: LayerSpec,
    ctx: routers.Ctx,
    view: View,
    source: Source = None,
  ) -> tuple[jax.Array, Memory, dict[str, Any] | None]:
    raise NotImplementedError

  def reads(self, x_BxLxD: jax.Array) -> jax.Array:
    """What attention sees of the layer's input."""
    return x_BxLxD if self.raw else self.norm_attention(x_BxLxD)

  def _attend(self, x_BxLxD, spec, ctx, view):
    return _drop(self.attention(x_BxLxD, view), spec, ctx, 0)

  def _cross(self, x_BxLxD, spec, ctx, source):
    source_BxMxD, view = source
    return _drop(self.cross(x_BxLxD, view, source_BxMxD), spec, ctx, 1)

  def _lookahead(self, h_BxLxD, memory, spec):
    """The look-ahead of a routed layer; a dense one sees h as it is."""
    h_TxD = self.feed.lookahead(flat(h_BxLxD), memory, spec)
    return h_TxD.reshape(h_BxLxD.shape)

  def _join(self, x_BxLxD, h_BxLxD, memory, experts, spec, ctx):
    """x with the answer to h: by the residual rule, or in a dense layer x + y.

    Returns x, memory, aux.
    """
    x_TxD, memory, aux = self.feed.join(
      flat(x_BxLxD), flat(h_BxLxD), memory, experts, spec, ctx
    )
    return x_TxD.reshape(x_BxLxD.shape), memory, aux


def names() -> list[str]:
  """The blocks that exist."""
  return byname.names(__name__)


def get(name: str) -> type[Block]:
  """The block of that name; ValueError without."""
  return byname.find(__name__, 'block', name).Block


def drop(
  x_TxD: jax.Array, rate: float, ctx: routers.Ctx, place: int
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


def _drop(y_BxLxD, spec, ctx, place):
  y_TxD = drop(flat(y_BxLxD), spec.dropout, ctx, place)
  return y_TxD.reshape(y_BxLxD.shape)
