"""The layers of a model, dense and MoE in any pattern: (x, ctx, view) -> x.

Models put an embedding below and a head above.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import (
  attention,
  blocks,
  experts,
  init,
  norm,
  ops,
  ranges,
  residuals,
  routers,
)
from moe_jax.experts.mlp import ACTIVATIONS, Mlp
from moe_jax.parallel import Layout
from moe_jax.ranges import OneOf

DTYPES = ('float32', 'bfloat16', 'float64')
SEGMENTS = ('body', 'ragged')  # whole groups of layers, and what is left over


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of the layers; moe_jax/config.py says what each field means.

  Raises ValueError, with the values, for what cannot be built.
  """

  N: ranges.Count
  D: ranges.Count
  H: ranges.Count
  F: ranges.Count
  E: ranges.Count
  expert_F: ranges.Count
  shared_F: ranges.Natural
  pattern: str
  first_dense: ranges.Natural
  layers_per_pool: ranges.Count
  ragged_pool: bool
  iterations: ranges.Count
  routing: Annotated[str, OneOf(blocks.ROUTINGS)]
  inner_residual: Annotated[str, OneOf(residuals.INNER_RESIDUALS)]
  residual: dict[str, Any]
  router: dict[str, Any]
  attention: dict[str, Any]
  block: Annotated[str, OneOf(blocks.names())]
  norm: Annotated[str, OneOf(norm.NORMS)]
  eps: ranges.Positive
  activation: Annotated[str, OneOf(ACTIVATIONS)]
  bias: bool
  init: Annotated[str, OneOf(init.SCHEMES)]
  dropout: Annotated[float, ranges.Within('[0, 1)')]
  dtype: Annotated[str, OneOf(DTYPES)]
  remat: bool
  gmm: Annotated[str, OneOf(('auto', *ops.GMM))]

  def __post_init__(self):
    ranges.check(type(self), vars(self))
    require(
      self.pattern.count('m') <= 1
      and self.pattern
      and not set(self.pattern) - set('dm'),
      f"pattern={self.pattern!r} is not d's with at most one m",
    )
    require(
      self.first_dense <= self.N,
      f'first_dense={self.first_dense} is more than N={self.N} layers',
    )
    periods, cut = self._periods()
    if 'm' not in cut:
      divides(
        'the length of pattern',
        len(self.pattern),
        'N - first_dense',
        self.N - self.first_dense,
      )
    if self.depth and not self.ragged_pool:
      divides('layers_per_pool', self.layers_per_pool, 'MoE layers', self.depth)
    require(
      not cut or periods % self.layers_per_pool == 0,
      f'N={self.N} cuts pattern={self.pattern!r} off inside a pool of'
      f' layers_per_pool={self.layers_per_pool}',
    )
    residuals.check(self.inner_residual, self.residual.get('name'))

  @property
  def depth(self) -> int:
    """MoE layers."""
    periods, cut = self._periods()
    return (self.pattern * periods + cut).count('m')

  @property
  def first(self) -> int:
    """Dense layers before the pattern begins; all layers of a dense model."""
    return self.first_dense if self.depth else self.N

  @property
  def segments(self) -> tuple[tuple[int, int, str], ...]:
    """(G, R, pattern) of each segment: whole groups, then a ragged one if any.

    The ragged one has fewer MoE layers, or one with fewer dense layers.
    """
    periods, cut = self._periods()
    whole, left = divmod(periods, self.layers_per_pool)
    segments = (
      (whole, self.layers_per_pool, self.pattern),
      (1, left, self.pattern),
      (1, 1, cut),
    )
    return tuple(s for s in segments if all(s)) if self.depth else ()

  @property
  def out_scale(self) -> float:
    """Keeps the stream's variance at initialisation independent of depth."""
    return (2 * self.N) ** -0.5 if init.SCHEMES[self.init].shrinks else 1.0

  def _periods(self):
    """(whole patterns, the beginning of one that is cut off at its end)."""
    periods, left = divmod(self.N - self.first_dense, len(self.pattern))
    return periods, self.pattern[:left]


class Segment(nnx.Module):
  """G pools of R MoE layers each, with the dense layers of their pattern.

  Parameters are stacked: `moe` over [G, R] (its routers over [G, R, I]),
  `dense` over [G, R, d's in the pattern], `pools` over [G].
  """

  def __init__(
    self,
    c: Config,
    G: int,
    R: int,
    pattern: str,
    make_layer: Callable[..., nnx.Module],
    *,
    rngs: nnx.Rngs,
  ):
    self.c, self.G, self.R, self.pattern = c, G, R, pattern
    dense = pattern.count('d')
    routed = functools.partial(_routed, c, c.E * R)
    self.moe = blocks.stack(
      lambda rngs: make_layer(routed, rngs=rngs), (G, R), rngs
    )
    self.pools = blocks.stack(functools.partial(_pool, c, R), (G,), rngs)
    if dense:
      self.dense = blocks.stack(
        lambda rngs: make_layer(_dense(c), rngs=rngs), (G, R, dense), rngs
      )

  def first_router(self) -> nnx.Module:
    return blocks.at(blocks.at(blocks.at(self.moe, 0), 0).feed.routers, 0)

  def __call__(self, x_BxLxD, memory, cache, layer, depth, run):
    """Scans over pools and, inside, over the layers that share one.

    Args:
      cache: arrays [G * R * pattern, B, ...], or None.
      layer, depth: index of the first layer, and of the first MoE layer.
      run: a _Run.

    Returns:
      x, memory, aux with leading axes [G, R, I], and the next cache.
    """
    c, (G, R) = self.c, (self.G, self.R)
    graph_pool, pools = nnx.split(self.pools)
    graph_moe, moe = nnx.split(self.moe)
    graph_dense, dense = (
      nnx.split(self.dense) if 'd' in self.pattern else (None, None)
    )
    period = len(self.pattern)
    order = jnp.arange(G * R, dtype=jnp.int32).reshape(G, R)
    cache = jax.tree.map(lambda a: a.reshape(G, R, period, *a.shape[1:]), cache)

    def one_period(experts, carry, scanned):
      """The layers of one pattern, with the pool that they share."""
      (x, memory), (i, moe, dense, replay, cache) = carry, scanned
      ctx = run.ctx.at(moe_layer=run.ctx.depth + depth + i, replay=replay)
      caches, d = [], 0
      for j, kind in enumerate(self.pattern):
        here = ctx.at(layer=layer + i * period + j)
        old = jax.tree.map(lambda a, j=j: a[j], cache)
        if kind == 'd':
          module, d = blocks.at(nnx.merge(graph_dense, dense), d), d + 1
          x, memory, _, new = run.layer(module, x, memory, None, here, old)
        else:
          module = nnx.merge(graph_moe, moe)
          x, memory, aux, new = run.layer(module, x, memory, experts, here, old)
        caches.append(new)
      return (x, memory), (aux, jax.tree.map(lambda *a: jnp.stack(a), *caches))

    def pool(carry, scanned):
      pool, layers = scanned
      experts = nnx.merge(graph_pool, pool)
      body = remat(c, functools.partial(one_period, experts))
      with jax.named_scope('layer'):
        return jax.lax.scan(body, carry, layers)

    layers = (order, moe, dense, run.ctx.replay, cache)
    with jax.named_scope('pool'):
      (x_BxLxD, memory), (aux, cache) = jax.lax.scan(
        pool, (x_BxLxD, memory), (pools, layers)
      )
    cache = jax.tree.map(
      lambda a: a.reshape(G * R * period, *a.shape[3:]), cache
    )
    return x_BxLxD, memory, aux, cache

  def updated_state(self, load_GxRxIxE: jax.Array) -> dict[str, Any]:
    """The routers' state after an optimiser step with that load."""
    graph, old, rest = nnx.split(
      self.moe.feed.routers, routers.RouterState, ...
    )
    if self.c.routing != 'each':  # one router, however often it was asked
      load_GxRxIxE = jnp.sum(load_GxRxIxE, axis=2, keepdims=True)

    def update(old, rest, load_E):
      router = nnx.merge(graph, old, rest)
      return router.update(nnx.to_pure_dict(old), load_E)

    for _ in range(3):
      update = jax.vmap(update)
    return {'moe': {'feed': {'routers': update(old, rest, load_GxRxIxE)}}}


@dataclasses.dataclass(frozen=True)
class _Run:
  """What one call hands to every layer."""

  spec: blocks.LayerSpec
  ctx: routers.Ctx
  view: attention.View
  source: blocks.Source

  def layer(self, module, x_BxLxD, memory, experts, ctx, cache):
    """Returns x, memory, aux and the next cache."""
    view, cache = self._past(module, x_BxLxD, cache)
    x_BxLxD, memory, aux = module(
      x_BxLxD, memory, experts, self.spec, ctx, view, self.source
    )
    return self.spec.layout.rows(x_BxLxD), memory, aux, cache

  def _past(self, module, x_BxLxD, cache):
    """What the layer sees of the tokens before, and the next cache."""
    place_BxL = self.view.place_BxL
    if cache is None or place_BxL is None:
      view = self.view.replace(cache_BxCxD=cache)
      return view, _next_cache(cache, x_BxLxD)
    kv_cache = module.attention.update_kv_cache(
      cache, module.reads(x_BxLxD), place_BxL
    )
    return self.view.replace(kv_cache=kv_cache), kv_cache


class Trunk(nnx.Module):
  """N layers: dense ones in `first`, then the segments with MoE layers.

  Args:
    cross: each layer also attends to another sequence.
  """

  def __init__(
    self,
    c: Config,
    layout: Layout,
    *,
    cross: bool = False,
    rngs: nnx.Rngs,
  ):
    crossing = [n for n in blocks.names() if blocks.get(n).crosses]
    require(
      not cross or c.block in crossing,
      f'block={c.block!r} cannot attend to another sequence;'
      f' {", ".join(crossing)} can',
    )
    self.c = c
    self.spec = blocks.LayerSpec(
      residual=residuals.get(**c.residual),
      inner_residual=residuals.INNER_RESIDUALS[c.inner_residual],
      iterations=c.iterations,
      routing=c.routing,
      dropout=c.dropout,
      layout=layout,
    )
    options = dict(c.attention)
    name = options.pop('name')
    kind = attention.get(name)
    require(
      not cross or kind.crosses,
      f'attention={name!r} cannot attend to another sequence',
    )
    make_layer = functools.partial(_layer, c, kind, options, cross)
    if c.first:
      self.first = blocks.stack(
        lambda rngs: make_layer(_dense(c), rngs=rngs), (c.first,), rngs
      )
    for name, sizes in zip(SEGMENTS, c.segments, strict=False):
      setattr(self, name, Segment(c, *sizes, make_layer, rngs=rngs))
    shared = kind.shared(c.H, c.D, rngs, **options)
    self.shared = tuple(shared)  # the names of
    for name, param in shared.items():
      setattr(self, name, param)

  def __call__(
    self,
    x_BxLxD: jax.Array,
    ctx: routers.Ctx,
    view: attention.View,
    source: blocks.Source = None,
    cache: Any = None,
  ) -> tuple[jax.Array, routers.Aux, Any]:
    """Returns x, aux and the cache of the next block of the same rows.

    aux has one dict for each segment, what the routers report with leading
    axes [G, R, I]; it is empty in a dense model. `ctx.replay`, where given, is
    a list of such dicts' 'route'. `ctx.depth` counts the MoE layers of the
    model below this trunk.

    The cache is of the layers' inputs, [N, B, C, D], and carries no gradient;
    or, where the view has places, of what attention keeps, [N, B, M, ...].
    """
    c = self.c
    whole = self.spec.layout.whole
    shared = {
      name: whole(name, getattr(self, name)[...]) for name in self.shared
    }
    view = view.replace(shared=shared)
    x_BxLxD = self.spec.layout.rows(x_BxLxD)
    run = _Run(self.spec, ctx, view, source)
    memory, aux, caches = self._memory(x_BxLxD), routers.Aux(), []
    cut = lambda first, n: jax.tree.map(lambda a: a[first:][:n], cache)
    if c.first:
      x_BxLxD, memory, new = self._first(x_BxLxD, memory, cut(0, c.first), run)
      caches.append(new)
    layer, depth, routes = c.first, 0, ctx.replay or [None] * len(c.segments)
    for segment, route in zip(self.segments().values(), routes, strict=True):
      layers = segment.G * segment.R * len(segment.pattern)
      here = dataclasses.replace(run, ctx=ctx.replace(replay=route))
      x_BxLxD, memory, found, new = segment(
        x_BxLxD, memory, cut(layer, layers), layer, depth, here
      )
      aux.append(found)
      caches.append(new)
      layer, depth = layer + layers, depth + segment.G * segment.R
    return x_BxLxD, aux, jax.tree.map(lambda *a: jnp.concatenate(a), *caches)

  @property
  def layers(self) -> nnx.Module:
    """Layers, stacked: all are alike but for what they feed forward to."""
    return self.first if self.c.first else self.body.moe

  def segments(self) -> dict[str, Segment]:
    return {n: getattr(self, n) for n in SEGMENTS if hasattr(self, n)}

  def _memory(self, x_BxLxD):
    x_TxD = blocks.flat(x_BxLxD)
    routers = ()
    if self.segments():
      routers = self.body.first_router().memory(x_TxD)
    return self.spec.residual.init(x_TxD), routers

  def _first(self, x_BxLxD, memory, cache, run):
    graph, stacked = nnx.split(self.first)

    def layer(carry, scanned):
      (x, memory), (i, state, old) = carry, scanned
      module, ctx = nnx.merge(graph, state), run.ctx.at(layer=i)
      x, memory, _, new = run.layer(module, x, memory, None, ctx, old)
      return (x, memory), new

    order = jnp.arange(self.c.first, dtype=jnp.int32)
    with jax.named_scope('dense_layer'):
      (x_BxLxD, memory), cache = jax.lax.scan(
        remat(self.c, layer), (x_BxLxD, memory), (order, stacked, cache)
      )
    return x_BxLxD, memory, cache

  def updated_state(self, aux: routers.Aux) -> dict[str, Any]:
    """The router state after an optimiser step with the load in aux."""
    if not jax.tree.leaves(nnx.state(self, routers.RouterState)):
      return {}
    segments = zip(self.segments().items(), aux, strict=True)
    return {n: s.updated_state(found['load_E']) for (n, s), found in segments}

  def weights(self) -> tuple[int, float]:
    """(parameters of the pools, parameters that meet one token)."""
    c, expert, active = self.c, 0, size(self)
    for segment in self.segments().values():
      pool = size(segment.pools)
      uses = segment.G * segment.R * c.iterations * segment.moe.feed.routers.k
      one = pool / (segment.G * segment.R * c.E)  # weights of an expert
      expert, active = expert + pool, active + uses * one - pool
      if c.shared_F:
        active += (c.iterations - 1) * size(segment.moe.feed.shared)
    return expert, active


def remat(c: Config, body: Callable) -> Callable:
  """Recomputes the body in the backward pass, but never its routers."""
  if not c.remat:
    return body
  policy = jax.checkpoint_policies.save_only_these_names('route', 'plan')
  return jax.checkpoint(body, policy=policy, prevent_cse=False)


def size(module: nnx.Module) -> int:
  """The number of its parameters."""
  params = jax.tree.leaves(nnx.state(module, nnx.Param))
  return sum(math.prod(a.shape) for a in params)


def make_norm(c: Config, D: int) -> nnx.Module:
  """A norm of the kind that the layers have."""
  return norm.NORMS[c.norm](D, c.eps)


def require(holds: bool, message: str) -> None:
  if not holds:
    raise ValueError(message)


def divides(name: str, value: int, other_name: str, other: int) -> None:
  require(
    other % value == 0,
    f'{name} ({value}) does not divide {other_name} ({other})',
  )


def _layer(c, kind, options, cross, make_feed, *, rngs):
  """A layer of the block, with the feed-forward that `make_feed` makes."""
  make = functools.partial(
    kind,
    c.D,
    c.H,
    scheme=init.SCHEMES[c.init],
    out_scale=c.out_scale,
    **options,
  )
  feed = make_feed(rngs)
  return blocks.get(c.block)(
    c.D,
    functools.partial(make_norm, c),
    make(rngs=rngs),
    make(rngs=rngs) if cross else None,
    feed,
  )


def _dense(c):
  return functools.partial(_mlp, c, blocks.DenseLayer, c.F)


def _mlp(c, kind, F, rngs):
  return kind(
    c.D,
    F,
    activation=c.activation,
    bias=c.bias,
    init=init.SCHEMES[c.init].feed,
    out_scale=c.out_scale,
    rngs=rngs,
  )


def _routed(c, candidates, rngs):
  """The routers of one layer, over `candidates` experts."""
  options = dict(c.router)
  router = routers.get(options.pop('name'))
  make_router = lambda rngs: router(c.D, candidates, rngs=rngs, **options)
  count = c.iterations if c.routing == 'each' else 1
  scale_I = None
  if residuals.INNER_RESIDUALS[c.inner_residual].learned:
    scale_I = nnx.Param(jnp.zeros((c.iterations,)))
  return blocks.MoELayer(
    blocks.stack(make_router, (count,), rngs),
    _mlp(c, Mlp, c.shared_F, rngs) if c.shared_F else None,
    scale_I,
  )


def _pool(c, R, rngs):
  ops.check(c.gmm, c.dtype, c.D, c.expert_F)
  return experts.get('mlp')(
    c.E * R,
    c.D,
    c.expert_F,
    activation=c.activation,
    bias=c.bias,
    init=init.SCHEMES[c.init].experts,
    out_scale=c.out_scale,
    gmm=functools.partial(ops.gmm, impl=c.gmm),
    products=ops.products(c.gmm),
    rngs=rngs,
  )


def _next_cache(old_BxCxD, x_BxLxD):
  """The last C inputs of a layer."""
  if old_BxCxD is None:
    return None
  both = jnp.concatenate([old_BxCxD, x_BxLxD], axis=1)
  return jax.lax.stop_gradient(both[:, -old_BxCxD.shape[1] :])
