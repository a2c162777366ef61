"""The routed layers that are looked at, and one without a strategy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import ops, parallel, plans
from moe_jax.experts.mlp import Experts
from pallas_kernels import shapes

STRATEGIES = ('local', 'fused')


class Layer(NamedTuple):
  """T tokens of width D; K of E experts of hidden width F for each."""

  T: int
  D: int
  E: int
  K: int
  F: int


def published(name: str) -> Layer:
  """The layer of a model in shapes.LAYERS at 8192 tokens."""
  M, D, F, E = shapes.LAYERS[f'{name}-up']
  return Layer(8192, D, E, M // 8192, F)


MODELS = {name: published(name) for name in ('mixtral', 'olmoe', 'qwen3')}


def arguments(size: Layer, dtype: str) -> tuple:
  """Shapes of (weights, x_TxD, gate_TxK, expert_TxK)."""
  T, D, E, K, F = size
  weights = {
    'gate_ExDxF': (E, D, F),
    'up_ExDxF': (E, D, F),
    'down_ExFxD': (E, F, D),
  }
  of = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
  return (
    {name: of(shape) for name, shape in weights.items()},
    of((T, D)),
    jax.ShapeDtypeStruct((T, K), jnp.float32),
    jax.ShapeDtypeStruct((T, K), jnp.int32),
  )


def layer(size: Layer, strategy: str, gmm: str | None = None):
  """f of `arguments`: the answer y_TxD of a strategy, or of `plain`."""
  if strategy == 'plain':
    return plain
  gmm = gmm or ops.choose_gmm(None)
  make = lambda: Experts(
    *(size.E, size.D, size.F),
    activation='swiglu',
    gmm=functools.partial(ops.gmm, impl=gmm),
    products=ops.products(gmm),
    rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(nnx.eval_shape(make))

  def answer(weights, x_TxD, gate_TxK, expert_TxK):
    nnx.replace_by_pure_dict(state, weights)
    plan = plans.by_token(expert_TxK, gate_TxK, size.E)
    layout = parallel.Layout(strategy=strategy)
    return layout(x_TxD, plan, nnx.merge(graph, state))[0]

  return answer


def plain(weights, x_TxD, gate_TxK, expert_TxK):
  """A SwiGLU layer with `jax.lax.ragged_dot`, as one writes it down."""
  T, K = expert_TxK.shape
  order_M = jnp.argsort(expert_TxK.reshape(T * K))
  token_M = order_M // K
  group_sizes_E = plans.count(expert_TxK, len(weights['up_ExDxF']))
  rows_MxD = x_TxD[token_M]
  up_MxF = jax.lax.ragged_dot(rows_MxD, weights['up_ExDxF'], group_sizes_E)
  gate_MxF = jax.lax.ragged_dot(rows_MxD, weights['gate_ExDxF'], group_sizes_E)
  hidden_MxF = jax.nn.silu(gate_MxF) * up_MxF
  y_MxD = jax.lax.ragged_dot(hidden_MxF, weights['down_ExFxD'], group_sizes_E)
  gate_M = gate_TxK.reshape(T * K)[order_M].astype(y_MxD.dtype)
  y_MxD = y_MxD * gate_M[:, None]
  return jnp.zeros_like(x_TxD).at[token_M].add(y_MxD)
