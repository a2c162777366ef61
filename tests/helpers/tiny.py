"""A decoder so small that plain loops check it, and its parameters."""

import collections
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import models, objectives, parallel, routers
from moe_jax.models import decoder

B, L, V = 2, 16, 32
T = B * L

TINY = {
  'V': V,
  'N': 2,
  'D': 16,
  'H': 2,
  'F': 24,
  'E': 4,
  'expert_F': 8,
  'shared_F': 0,
  'pattern': 'm',
  'first_dense': 0,
  'layers_per_pool': 1,
  'ragged_pool': False,
  'iterations': 1,
  'routing': 'each',
  'inner_residual': 'replace',
  'residual': {'name': 'plain'},
  'router': {'name': 'topk', 'k': 2},
  'attention': {'name': 'gqa', 'num_kv_heads': 1, 'theta': 100.0},
  'block': 'pre',
  'norm': 'rms',
  'eps': 1e-6,
  'activation': 'swiglu',
  'bias': False,
  'init': 'lecun',
  'dropout': 0.0,
  'tied': True,
  'embed_std': 0.02,
  'dtype': 'float32',
  'remat': False,
  'gmm': 'xla',  # which compiles in half of the time
}


def config(**changes):
  return decoder.Config(**{**TINY, **changes})


def fresh(**changes):
  """Shapes without arrays."""
  c = config(**changes)
  build = lambda: decoder.build(c, parallel.Layout(), rngs=nnx.Rngs(0))
  return nnx.eval_shape(build)


def model(**changes):
  """The same, made once, so that what `run` compiles is found again."""
  return _model(json.dumps(changes, sort_keys=True))


@functools.cache
def _model(changes):
  return fresh(**json.loads(changes))


def params(model):
  """Values that depend on a parameter's name and shape alone."""

  def fill(path, a):
    name = path[-1].key
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    value = 0.3 * draw.normal(size=a.shape) + name.startswith('scale')
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, models.split(model)[0])


def state(model):
  return jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype), models.split(model)[1]
  )


def batch(seed=0):
  draw = np.random.default_rng(seed)
  ids_BxN = draw.integers(0, V, (B, L + 1), np.int32)
  document = np.int32([0] * 5 + [1] * (L - 5))
  place = np.int32([*range(5), *range(L - 5)])
  return {
    'ids_BxL': ids_BxN[:, :-1],
    'target_BxL': ids_BxN[:, 1:],
    'mask_BxL': np.ones((B, L), np.float32),
    'segment_BxL': np.stack([document] * B),
    'pos_BxL': np.stack([place] * B),
    'row_B': np.arange(B, dtype=np.int32),
  }


def segment(tree):
  """What is stacked over pools and layers, of a tree like the model."""
  return tree['trunk']['body']


def with_segment(tree, segment):
  return {**tree, 'trunk': {**tree['trunk'], 'body': segment}}


def ctx(batch, replay=None):
  return routers.context(
    batch, jax.random.key(0), jnp.int32(3), train=True, replay=replay
  )


def forward(model, params, batch, replay=None):
  """logits_BxLxV, aux."""
  return models.bind(model, params, state(model))(batch, ctx(batch, replay))


def run(model, params, batch, replay=None):
  """The same compiled, once for each model."""
  return jax.device_get(_compiled(forward, model)(params, batch, replay))


def grads(model, params, batch):
  """(loss, aux), gradients"""
  return jax.device_get(_compiled(value_and_grad, model)(params, batch))


@functools.cache
def _compiled(function, model):
  return jax.jit(functools.partial(function, model))


def value_and_grad(model, params, batch):
  """(loss, aux), gradients"""
  goal = functools.partial(loss, model)
  return jax.value_and_grad(goal, has_aux=True)(params, batch)


def loss(model, params, batch):
  goal = objectives.objective('next_token')(losses={'balance': 0.1, 'z': 0.01})
  return goal(lambda batch, pass_: forward(model, params, batch), batch)


def primitives(function, *args):
  """A Counter of the operations in the program of a function."""
  return collections.Counter(_names(jax.make_jaxpr(function)(*args).jaxpr))


def _names(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=_is_jaxpr
    ):
      if _is_jaxpr(inner):
        yield from _names(getattr(inner, 'jaxpr', inner))


def _is_jaxpr(x):
  return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
