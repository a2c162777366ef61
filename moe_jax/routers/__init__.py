"""Routers: who decides. One router per file, found by its name.

A file here defines one class `Router(routers.Router)`; `{'name': 'topk', 'k':
2}` in a config makes `topk.Router(D, E, rngs=rngs, k=2)`. Nothing else has to
be edited: a wrong option is a TypeError, and tests/routers_test.py holds every
file here to the contract below.

A name with a dot is a class of any module that Python finds: 'my_router.Router'
is `Router` in my_router.py, wherever that lies on Python's path.
"""

import importlib
import math
import pkgutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance
from moe_jax.plan import count, dropped, Plan


@flax.struct.dataclass
class Ctx:
  """All that a router may see besides the tokens.

  Draws per token come from `token_keys`, draws per batch from `batch_key`,
  schedules and masks that must agree everywhere from `step_key`. None depends
  on how the batch is laid out on devices.
  """

  key: jax.Array  # (seed, step, pass, layer, iteration)
  batch_key: jax.Array  # the same and the microbatch
  step_key: jax.Array  # (seed, step, layer)
  layer_key: jax.Array  # (seed, step, pass, layer), of dropout
  step: jax.Array  # int32, optimiser steps done
  depth: jax.Array  # int32, index among the MoE layers
  row_B: jax.Array  # int32, the sequences here in the global batch
  ids_T: jax.Array | None = None  # int32, token ids
  row_T: jax.Array | None = None  # int32, sequence in the global batch
  pos_T: jax.Array | None = None  # int32, place in the document
  context: jax.Array | None = None  # a conditioning vector, [T, any]
  forced: jax.Array | None = None  # a recorded routing to replay
  train: bool = flax.struct.field(pytree_node=False, default=True)
  length: int = flax.struct.field(pytree_node=False, default=1)  # L
  steps: int = flax.struct.field(pytree_node=False, default=1)  # of the run

  def over(self, ids_BxL: jax.Array, pos_BxL: jax.Array) -> 'Ctx':
    """The Ctx of these tokens, B rows of the global batch."""
    L = ids_BxL.shape[1]
    return self.replace(
      ids_T=ids_BxL.reshape(-1),
      row_T=jnp.repeat(self.row_B, L),
      pos_T=pos_BxL.reshape(-1),
      length=L,
    )

  def at_depth(self, depth: jax.Array, forced: Any) -> 'Ctx':
    """The Ctx of the router of one MoE layer."""
    return self.replace(
      key=jax.random.fold_in(self.key, depth),
      batch_key=jax.random.fold_in(self.batch_key, depth),
      step_key=jax.random.fold_in(self.step_key, depth),
      depth=depth,
      forced=forced,
    )

  def at_iteration(self, i: int) -> 'Ctx':
    """The Ctx of one iteration of a MoE layer."""
    return self.replace(
      key=jax.random.fold_in(self.key, i),
      batch_key=jax.random.fold_in(self.batch_key, i),
      forced=None if self.forced is None else self.forced[i],
    )

  def at_layer(self, layer: jax.Array | int) -> 'Ctx':
    """The same with the dropout key of one layer, dense or MoE."""
    return self.replace(layer_key=jax.random.fold_in(self.layer_key, layer))

  def token_keys(self, key: jax.Array | None = None) -> jax.Array:
    """[T] keys, one for each token of the global batch, from `key`."""
    key = self.key if key is None else key
    place_T = jnp.arange(self.row_T.shape[0], dtype=jnp.int32) % self.length
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, self.row_T), place_T)


def context(
  batch: dict[str, jax.Array],
  seed_key: jax.Array,
  step: jax.Array,
  *,
  train: bool,
  microbatch: jax.Array | int = 0,
  pass_: int = 0,
  forced: Any = None,
  steps: int = 1,
) -> Ctx:
  """The Ctx of a whole model, from which it makes one for each layer.

  Args:
    batch: `row_B` is read and, where tokens have them, `ids_BxL`, `pos_BxL`.
    forced: recorded routing of all layers, as the model's aux has it.
    steps: optimiser steps of the whole run.
  """
  step_key = jax.random.fold_in(seed_key, step)
  key = jax.random.fold_in(step_key, pass_)
  ctx = Ctx(
    key=key,
    batch_key=jax.random.fold_in(jax.random.fold_in(key, _BATCH), microbatch),
    step_key=jax.random.fold_in(step_key, _STEP),
    layer_key=jax.random.fold_in(key, _LAYER),
    step=jnp.asarray(step, jnp.int32),
    depth=jnp.zeros((), jnp.int32),
    row_B=batch['row_B'],
    forced=forced,
    train=train,
    steps=steps,
  )
  if 'ids_BxL' in batch:
    ctx = ctx.over(batch['ids_BxL'], batch['pos_BxL'])
  return ctx


# Folds that no layer or pass reaches.
_BATCH, _STEP, _LAYER = 2**31 - 1, 2**31 - 2, 2**31 - 3


class RouterState(nnx.Variable):
  """What a router carries over training steps, without a gradient."""


class Router(nnx.Module):
  """The contract. `k` is the (mean) number of experts per token.

  Attributes:
    causal: a token's routing depends on no later token.
    equivariant: permuting the tokens of a sequence permutes their routing.
  """

  k: float
  causal = True
  equivariant = True

  def memory(self, x_TxD: jax.Array) -> Any:
    """What the router of the first layer gets as memory: arrays, or ()."""
    del x_TxD
    return ()

  def __call__(
    self, x_TxD: jax.Array, ctx: Ctx, memory: Any
  ) -> tuple[Plan, dict[str, Any], Any]:
    """Returns the plan, aux and the memory for the next router.

    `aux` has `load_E` (assignments per expert before dropping), `dropped` (the
    fraction of them without a row), `route` (what `ctx.forced` replays),
    `entropy`, and the router's losses, unweighted, in `losses`.
    """
    raise NotImplementedError

  def update(self, state: dict, load_E: jax.Array) -> dict:
    """New state after an optimiser step, from its load over all devices."""
    del load_E
    return state


def names() -> list[str]:
  """The routers that exist."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> type[Router]:
  """The class that a name stands for.

  'topk' is `Router` in moe_jax/routers/topk.py, and a name with a dot is
  MODULE.CLASS, 'my_package.my_router.Router'.

  Raises:
    ValueError: there is no such router. What that module itself raises while
      it is imported is raised as it is.
  """
  if name in names():
    return importlib.import_module(f'{__name__}.{name}').Router
  if '.' in str(name):
    return _elsewhere(str(name))
  raise ValueError(
    f'no router {name!r}; there are {", ".join(names())}; one of your own is'
    ' MODULE.CLASS'
  )


def _elsewhere(name):
  """The class MODULE.CLASS, of a module outside of this library."""
  module, _, cls = name.rpartition('.')
  if not all(part.isidentifier() for part in name.split('.')):
    raise ValueError(f'no router {name!r}: that is not MODULE.CLASS')
  importlib.invalidate_caches()  # a notebook may just have written the file
  try:
    found = getattr(importlib.import_module(module), cls, None)
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise  # of a module that this one imports
    raise ValueError(
      f"no router {name!r}: there is no module {error.name!r} on Python's path"
    ) from None
  if not (isinstance(found, type) and issubclass(found, Router)):
    raise ValueError(
      f'no router {name!r}: {module} has no class {cls!r} that is a'
      ' routers.Router'
    )
  return found


def logits(x_TxD: jax.Array, w_DxE: jax.Array) -> jax.Array:
  """[T, E] logits, in at least float32 whatever the model computes in."""
  wide = np.promote_types(x_TxD.dtype, jnp.float32)
  # A TPU's own default would round float32 to bfloat16.
  return jnp.matmul(x_TxD.astype(wide), w_DxE.astype(wide), precision='highest')


def choose(score_TxE: jax.Array, k: int, ctx: Ctx) -> jax.Array:
  """int32 [T, K]: the k best experts of each token, or the forced ones."""
  if ctx.forced is None:
    expert_TxK = jax.lax.top_k(jax.lax.stop_gradient(score_TxE), k)[1]
  else:
    expert_TxK = ctx.forced
  # Saved under rematerialisation: recomputing must never re-route a token.
  return checkpoint_name(expert_TxK, 'route')


def capacity_rows(
  capacity: float | None, group: int, k: float, E: int
) -> int | None:
  """Rows an expert takes from a group: ceil(capacity * group * k / E)."""
  if capacity is None:
    return None
  return max(1, math.ceil(capacity * group * k / E))


def report(
  plan: Plan, expert_TxK: jax.Array, probs_TxE: jax.Array, ctx: Ctx
) -> dict[str, Any]:
  """What every token-choice router with probabilities reports."""
  E = probs_TxE.shape[1]
  expert_BxLK = expert_TxK.reshape(-1, ctx.length * expert_TxK.shape[1])
  load_BxE = jax.vmap(lambda expert: count(expert, E))(expert_BxLK)
  load_E = jnp.sum(load_BxE, axis=0, dtype=jnp.int32)
  probs_BxLxE = probs_TxE.reshape(-1, ctx.length, E)
  return {
    'load_E': load_E,
    'dropped': dropped(plan),
    'route': expert_TxK,
    'entropy': balance.entropy(jax.lax.stop_gradient(probs_TxE)),
    'losses': {
      'balance': balance.switch(probs_TxE, load_E),
      'sequence_balance': balance.sequence(probs_BxLxE, load_BxE),
    },
  }


def check(
  E: int,
  *,
  k: float,
  capacity: float | None = None,
  group: int | None = None,
) -> None:
  """ValueError, with the values, for options that no router could follow."""
  if not 0 < k <= E:
    raise ValueError(f'k is {k}, not between 1 and the {E} experts')
  if capacity is not None and capacity <= 0:
    raise ValueError(f'capacity is {capacity}, not above 0')
  if group is not None and group < 1:
    raise ValueError(f'group is {group}, not at least 1')
