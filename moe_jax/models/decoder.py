"""A decoder-only language model: dense and MoE layers in any pattern."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import block, ops
from moe_jax import residual as residuals
from moe_jax import routers as routing
from moe_jax.attention import Attention, Norm
from moe_jax.experts import ACTIVATIONS, Dense, Experts

DTYPES = ('float32', 'bfloat16', 'float64')


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of the model; config.default() says what each field means.

  Raises ValueError, with the values, for what cannot be built.
  """

  V: int
  N: int
  D: int
  H: int
  J: int
  F: int
  E: int
  expert_F: int
  shared_F: int
  pattern: str
  first_dense: int
  layers_per_pool: int
  iterations: int
  link: str
  residual: dict[str, Any]
  router: dict[str, Any]
  block: str
  activation: str
  bias: bool
  tied: bool
  theta: float
  dtype: str
  remat: bool
  gmm: str

  def __post_init__(self):
    sizes = ('V', 'N', 'D', 'H', 'J', 'F', 'E', 'expert_F')
    for name in (*sizes, 'layers_per_pool', 'iterations'):
      _require(getattr(self, name) >= 1, f'{name}={getattr(self, name)} is < 1')
    for name in ('shared_F', 'first_dense'):
      _require(getattr(self, name) >= 0, f'{name}={getattr(self, name)} is < 0')
    _divides('H', self.H, 'D', self.D)
    _divides('J', self.J, 'H', self.H)
    _require(
      self.D // self.H % 2 == 0,
      f'D={self.D} over H={self.H} heads gives the odd size {self.D // self.H},'
      ' which rotary positions cannot pair',
    )
    _require(
      self.pattern.count('m') <= 1
      and self.pattern
      and not set(self.pattern) - set('dm'),
      f"pattern={self.pattern!r} is not d's with at most one m",
    )
    _require(
      self.first_dense <= self.N,
      f'first_dense={self.first_dense} is more than N={self.N} layers',
    )
    rest = self.N - self.first_dense
    _divides(
      'the length of pattern', len(self.pattern), 'N - first_dense', rest
    )
    if 'm' in self.pattern:
      layers = rest // len(self.pattern)
      _divides('layers_per_pool', self.layers_per_pool, 'MoE layers', layers)
    for name, known in (
      ('activation', ACTIVATIONS),
      ('dtype', DTYPES),
      ('block', block.BLOCKS),
    ):
      value = getattr(self, name)
      _require(
        value in known, f'{name}={value!r}; there are {", ".join(known)}'
      )
    residuals.check(self.link, self.residual.get('name'))

  @property
  def pools(self) -> int:
    """G: groups of layers that share their experts; 0 in a dense model."""
    return (self.N - self.first) // len(self.pattern) // self.layers_per_pool

  @property
  def first(self) -> int:
    """Dense layers before the pattern begins; all layers of a dense model."""
    return self.first_dense if 'm' in self.pattern else self.N

  @property
  def out_scale(self) -> float:
    """Keeps the stream's variance at initialisation independent of depth."""
    return (2 * self.N) ** -0.5


class Decoder(nnx.Module):
  """ids to logits.

  MoE layers are in G pools of R layers, and each layer has I routers.
  Parameters are stacked: `moe` over [G, R] (its routers over [G, R, I]),
  `dense` over [G, R, d's in the pattern], `pools` over [G], and `first` over
  the dense layers before all these, which in a dense model are all layers.
  """

  def __init__(
    self,
    c: Config,
    strategy: Callable[..., jax.Array],
    *,
    rngs: nnx.Rngs,
  ):
    self.c = c
    self.wiring = block.Wiring(
      residual=residuals.get(**c.residual),
      link=residuals.LINKS[c.link],
      iterations=c.iterations,
      strategy=strategy,
    )
    self.norm = Norm(c.D)
    init = nnx.initializers.normal(0.02)
    self.embed_VxD = nnx.Param(init(rngs.params(), (c.V, c.D)))
    if not c.tied:
      self.head_DxV = nnx.Param(init(rngs.params(), (c.D, c.V)))
    layers, dense = (c.pools, c.layers_per_pool), c.pattern.count('d')
    make_dense = functools.partial(_dense_layer, c)
    if c.first:
      self.first = block.stack(make_dense, (c.first,), rngs)
    if c.pools:
      self.moe = block.stack(functools.partial(_moe_layer, c), layers, rngs)
      self.pools = block.stack(functools.partial(_pool, c), layers[:1], rngs)
    if c.pools and dense:
      self.dense = block.stack(make_dense, (*layers, dense), rngs)

  def __call__(
    self, batch: dict[str, jax.Array], ctx: routing.Ctx
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns logits_BxLxV, in at least float32, and aux.

    aux is what the routers report with leading axes [G, R, I], or {} in a
    dense model. `ctx.forced`, where given, is such an aux's 'route'.

    Args:
      batch: `ids_BxL`, `segment_BxL` (documents, which attention keeps apart).
      ctx: from routers.context.
    """
    c, aux = self.c, {}
    x_BxLxD = self.embed_VxD[...].astype(c.dtype)[batch['ids_BxL']]
    if c.first:
      x_BxLxD = self._first(x_BxLxD, batch['segment_BxL'])
    if c.pools:
      x_BxLxD, aux = self._pools(x_BxLxD, batch['segment_BxL'], ctx)
    head_DxV = self.embed_VxD[...].T if c.tied else self.head_DxV[...]
    logits_BxLxV = self.norm(x_BxLxD) @ head_DxV.astype(c.dtype)
    wide = np.promote_types(logits_BxLxV.dtype, jnp.float32)
    return logits_BxLxV.astype(wide), aux

  def _first(self, x_BxLxD, segment_BxL):
    graph, stacked = nnx.split(self.first)

    def layer(x_BxLxD, state):
      return nnx.merge(graph, state)(x_BxLxD, segment_BxL), None

    return jax.lax.scan(self._remat(layer), x_BxLxD, stacked)[0]

  def _pools(self, x_BxLxD, segment_BxL, ctx):
    """Scans over pools and, inside, over the layers that share one."""
    c = self.c
    graph_pool, pools = nnx.split(self.pools)
    graph_moe, moe = nnx.split(self.moe)
    graph_dense, dense = (
      nnx.split(self.dense) if 'd' in c.pattern else (None, None)
    )
    depth_GxR = jnp.arange(c.pools * c.layers_per_pool, dtype=jnp.int32)
    depth_GxR = depth_GxR.reshape(c.pools, c.layers_per_pool)
    x_TxD = x_BxLxD.reshape(-1, c.D)
    first_router = nnx.merge(graph_moe, _first_of(moe, 2)).routers
    memory = (
      self.wiring.residual.init(x_TxD),
      block.at(first_router, 0).memory(x_TxD),
    )

    def period(experts, carry, scanned):
      """The layers of one pattern, with the pool that they share."""
      (x_BxLxD, memory), (depth, moe, dense, forced) = carry, scanned
      i = 0
      for kind in c.pattern:
        if kind == 'd':
          layer = block.at(nnx.merge(graph_dense, dense), i)
          x_BxLxD, i = layer(x_BxLxD, segment_BxL), i + 1
        else:
          x_BxLxD, memory, aux = nnx.merge(graph_moe, moe)(
            x_BxLxD,
            memory,
            experts,
            self.wiring,
            ctx.at_layer(depth, forced),
            segment_BxL,
          )
      return (x_BxLxD, memory), aux

    def pool(carry, scanned):
      pool, layers = scanned
      experts = nnx.merge(graph_pool, pool)
      body = self._remat(functools.partial(period, experts))
      return jax.lax.scan(body, carry, layers)

    layers = (depth_GxR, moe, dense, ctx.forced)
    carry, aux = jax.lax.scan(pool, (x_BxLxD, memory), (pools, layers))
    return carry[0], aux

  def _remat(self, body):
    """Recomputes the body in the backward pass, but never its routing."""
    if not self.c.remat:
      return body
    policy = jax.checkpoint_policies.save_only_these_names('route', 'plan')
    return jax.checkpoint(body, policy=policy, prevent_cse=False)

  def updated_state(self, load_GxRxIxE: jax.Array) -> dict[str, Any]:
    """The model's router state after an optimiser step with that load."""
    whole = nnx.to_pure_dict(nnx.state(self, routing.RouterState))
    if not whole:
      return whole
    graph, old, rest = nnx.split(self.moe.routers, routing.RouterState, ...)

    def update(old, rest, load_E):
      router = nnx.merge(graph, old, rest)
      return router.update(nnx.to_pure_dict(old), load_E)

    for _ in range(3):
      update = jax.vmap(update)
    whole['moe']['routers'] = update(old, rest, load_GxRxIxE)
    return whole


build = Decoder


def cost(model: Decoder, length: int) -> dict[str, float]:
  """Counts parameters and work, from shapes alone.

  Returns:
    params_total. expert_params: those of the pools. params_active: those that
    meet one token, the embedding included; a weight used twice counts twice.
    flops_per_token: forward and backward of the matmuls, 6 for each active
    weight, and of causal attention over `length`; recomputation not counted.
  """
  c = model.c
  total, expert, active = _size(model), 0, _size(model)
  if c.pools:
    expert = _size(model.pools)
    uses = c.pools * c.layers_per_pool * c.iterations
    k = model.moe.routers.k
    active += uses * k * expert / (c.pools * c.E * c.layers_per_pool) - expert
    if c.shared_F:
      active += (c.iterations - 1) * _size(model.moe.shared)
  lookup = 0 if c.tied else c.V * c.D
  attention = 2 * c.N * c.D * (length + 1) / 2
  return {
    'params_total': total,
    'expert_params': expert,
    'params_active': round(active),
    'flops_per_token': round(6 * (active - lookup + attention)),
  }


def _size(module):
  params = jax.tree.leaves(nnx.state(module, nnx.Param))
  return sum(math.prod(a.shape) for a in params)


def _attention(c, rngs):
  return Attention(
    c.D,
    c.H,
    c.J,
    c.D // c.H,
    theta=c.theta,
    out_scale=c.out_scale,
    rngs=rngs,
  )


def _dense_layer(c, rngs):
  ffn = _dense(c, c.F, rngs)
  return block.DenseLayer(c.D, _attention(c, rngs), ffn)


def _dense(c, F, rngs):
  return Dense(
    c.D,
    F,
    activation=c.activation,
    bias=c.bias,
    out_scale=c.out_scale,
    rngs=rngs,
  )


def _moe_layer(c, rngs):
  options = dict(c.router)
  router = routing.get(options.pop('name'))
  experts = c.E * c.layers_per_pool
  make_router = lambda rngs: router(c.D, experts, rngs=rngs, **options)
  routers = block.stack(make_router, (c.iterations,), rngs)
  shared = _dense(c, c.shared_F, rngs) if c.shared_F else None
  return block.BLOCKS[c.block](c.D, _attention(c, rngs), routers, shared)


def _pool(c, rngs):
  return Experts(
    c.E * c.layers_per_pool,
    c.D,
    c.expert_F,
    activation=c.activation,
    bias=c.bias,
    out_scale=c.out_scale,
    gmm=functools.partial(ops.gmm, impl=c.gmm),
    rngs=rngs,
  )


def _first_of(tree, axes):
  return jax.tree.map(lambda a: a[(0,) * axes], tree)


def _require(holds, message):
  if not holds:
    raise ValueError(message)


def _divides(name, value, other_name, other):
  _require(
    other % value == 0,
    f'{name} ({value}) does not divide {other_name} ({other})',
  )
