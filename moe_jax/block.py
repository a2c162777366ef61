"""The shape of a layer: where its norms and residuals sit.

A block owns its norms and decides where the residual rule looks ahead:
block(x, memory, experts, wiring, ctx, segment) -> x, memory, aux.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import residual as residuals
from moe_jax import routers as routing
from moe_jax.attention import Attention, Norm
from moe_jax.experts import Dense
from moe_jax.moe import moe


@dataclasses.dataclass(frozen=True)
class Wiring:
  """What is the same for every layer and owns no parameters."""

  residual: residuals.Residual
  link: Callable[..., jax.Array]
  iterations: int
  strategy: Callable[..., jax.Array]


class DenseLayer(nnx.Module):
  """Pre-norm attention and one feed-forward."""

  def __init__(self, D: int, attention: Attention, ffn: Dense):
    self.norm_attention, self.norm_ffn = Norm(D), Norm(D)
    self.attention, self.ffn = attention, ffn

  def __call__(self, x_BxLxD: jax.Array, segment_BxL: jax.Array) -> jax.Array:
    y_BxLxD = self.attention(self.norm_attention(x_BxLxD), segment_BxL)
    x_BxLxD += y_BxLxD
    h_TxD = _flat(self.norm_ffn(x_BxLxD))
    return x_BxLxD + self.ffn(h_TxD).reshape(x_BxLxD.shape)


class PreNorm(nnx.Module):
  """x + attention(norm(x)), then the experts' answer to norm(x).

  Args:
    routers: the routers of the I iterations, stacked.
    shared: experts that see every token in every iteration, or None.
  """

  def __init__(
    self,
    D: int,
    attention: Attention,
    routers: nnx.Module,
    shared: Dense | None,
  ):
    self.norm_attention, self.norm_ffn = Norm(D), Norm(D)
    self.attention, self.routers, self.shared = attention, routers, shared

  def __call__(
    self,
    x_BxLxD: jax.Array,
    memory: tuple[Any, Any],
    experts: Callable[..., jax.Array],
    wiring: Wiring,
    ctx: routing.Ctx,
    segment_BxL: jax.Array,
  ) -> tuple[jax.Array, tuple[Any, Any], dict[str, Any]]:
    """Returns x, (residual memory, router memory), aux stacked over I."""
    shape = x_BxLxD.shape
    residual_memory, router_memory = memory
    y_BxLxD = self.attention(self.norm_attention(x_BxLxD), segment_BxL)
    x_TxD = _flat(x_BxLxD + y_BxLxD)
    h_TxD = wiring.residual.peek(self.norm_ffn(x_TxD), residual_memory)
    h_TxD, router_memory, aux = iterate(
      self.routers, self.shared, h_TxD, router_memory, experts, wiring, ctx
    )
    x_TxD, residual_memory = wiring.residual.apply(
      x_TxD, residual_memory, h_TxD, ctx.depth
    )
    return x_TxD.reshape(shape), (residual_memory, router_memory), aux


BLOCKS = {'pre': PreNorm}


def iterate(
  routers: nnx.Module,
  shared: Dense | None,
  h0_TxD: jax.Array,
  memory: Any,
  experts: Callable[..., jax.Array],
  wiring: Wiring,
  ctx: routing.Ctx,
) -> tuple[jax.Array, Any, dict[str, Any]]:
  """The (router, same experts) steps of one layer (Chain-of-Experts).

  `routers` and `ctx.forced` have a leading axis I. Returns h_TxD, the router
  memory and aux with a leading axis I.
  """
  h_TxD, reports = h0_TxD, []
  for i in range(wiring.iterations):
    here = ctx.replace(
      key=jax.random.fold_in(ctx.key, i),
      batch_key=jax.random.fold_in(ctx.batch_key, i),
      forced=None if ctx.forced is None else ctx.forced[i],
    )
    y_TxD, aux, memory = moe(
      h_TxD, at(routers, i), experts, wiring.strategy, here, memory
    )
    if shared is not None:
      y_TxD += shared(h_TxD)
    h_TxD = wiring.link(h0_TxD, h_TxD, y_TxD)
    reports.append(aux)
  return h_TxD, memory, jax.tree.map(lambda *a: jnp.stack(a), *reports)


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


def _flat(x_BxLxD):
  return x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
