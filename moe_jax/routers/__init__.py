"""Routers: who decides. One router per file, found by its name.

A file here defines one class `Router(routers.Router)`; `{'name': 'topk', 'k':
2}` in a config makes `topk.Router(D, E, rngs=rngs, k=2)`. Nothing else has to
be edited: a wrong option is a TypeError, a value outside of what its annotation
says (moe_jax/ranges.py) a ValueError, and tests/layers/routers_test.py holds
every file here to the contract below.

A name with a dot is a class of any module that Python finds: 'my_router.Router'
is `Router` in my_router.py, wherever that lies on Python's path.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, byname, exact, plans, ranges
from moe_jax.plans import Plan


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
  place_T: jax.Array | None = None  # int32, in the row, without padding
  real_T: jax.Array | None = None  # bool, no padding
  context: jax.Array | None = None  # a conditioning vector, [T, any]
  replay: jax.Array | None = None  # a recorded routing to replay
  train: bool = flax.struct.field(pytree_node=False, default=True)
  length: int = flax.struct.field(pytree_node=False, default=1)  # L
  steps: int = flax.struct.field(pytree_node=False, default=1)  # of the run
  # A text is written, token by token: places are `pos_T`, and nothing has a
  # capacity, since the tokens to come are not known.
  writes: bool = flax.struct.field(pytree_node=False, default=False)

  def for_tokens(
    self,
    ids_BxL: jax.Array,
    pos_BxL: jax.Array,
    real_BxL: jax.Array | None = None,
  ) -> 'Ctx':
    """The Ctx of these tokens, B rows of the global batch.

    Args:
      real_BxL: bool, no padding; None: there is none.
    """
    L = ids_BxL.shape[1]
    if real_BxL is None:
      real_BxL = jnp.ones(ids_BxL.shape, bool)
    place_BxL = jnp.cumsum(real_BxL, axis=1, dtype=jnp.int32) - 1
    return self.replace(
      ids_T=ids_BxL.reshape(-1),
      row_T=jnp.repeat(self.row_B, L),
      pos_T=pos_BxL.reshape(-1),
      place_T=(pos_BxL if self.writes else place_BxL).reshape(-1),
      real_T=real_BxL.reshape(-1),
      length=L,
    )

  def at(
    self,
    *,
    layer: jax.Array | int | None = None,
    moe_layer: jax.Array | int | None = None,
    iteration: int | None = None,
    replay: Any = None,
  ) -> 'Ctx':
    """The Ctx of a place in the model, from that of the place around it.

    Args:
      layer: dense or MoE, from 0; dropout differs by it.
      moe_layer: from 0; with it, `replay` is the recorded routing of that
        layer's iterations, or None.
      iteration: of a MoE layer, from 0.
    """
    ctx = self
    if layer is not None:
      ctx = ctx._fold(layer, 'layer_key')
    if moe_layer is not None:
      ctx = ctx._fold(moe_layer, 'key', 'batch_key', 'step_key')
      ctx = ctx.replace(depth=moe_layer, replay=replay)
    if iteration is not None:
      here = None if ctx.replay is None else ctx.replay[iteration]
      ctx = ctx._fold(iteration, 'key', 'batch_key').replace(replay=here)
    return ctx

  def _fold(self, index, *names):
    fold = lambda name: jax.random.fold_in(getattr(self, name), index)
    return self.replace(**{name: fold(name) for name in names})

  def token_keys(self, key: jax.Array | None = None) -> jax.Array:
    """[T] keys, one for each token of the global batch, from `key`.

    By its row and its place there, which padding does not shift.
    """
    key = self.key if key is None else key
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, self.row_T), self.place_T)


def context(
  batch: dict[str, jax.Array],
  seed_key: jax.Array,
  step: jax.Array,
  *,
  train: bool,
  microbatch: jax.Array | int = 0,
  pass_: int = 0,
  replay: Any = None,
  steps: int = 1,
  writes: bool = False,
) -> Ctx:
  """The Ctx of a whole model, from which it makes one for each layer.

  Args:
    batch: `row_B` is read and, where tokens have them, `ids_BxL`, `pos_BxL` and
      `segment_BxL`, which is below 0 for padding.
    replay: recorded routing of all layers, as the model's aux has it.
    steps: optimiser steps of the whole run.
    writes: see Ctx.
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
    replay=replay,
    train=train,
    steps=steps,
    writes=writes,
  )
  if 'ids_BxL' in batch:
    segment_BxL = batch.get('segment_BxL')
    real_BxL = None if segment_BxL is None else segment_BxL >= 0
    ctx = ctx.for_tokens(batch['ids_BxL'], batch['pos_BxL'], real_BxL)
  return ctx


# Folds that no layer or pass reaches.
_BATCH, _STEP, _LAYER = 2**31 - 1, 2**31 - 2, 2**31 - 3


class Aux(list):
  """What a model's routers report: a dict for each segment, from below.

  A segment is a stretch of layers that are stacked: its arrays have leading
  axes [G, R, I], its pools, the MoE layers of a pool, and their iterations. A
  dict has what Router.__call__ reports, and `overflow`. A dense model has none.
  """

  def __add__(self, other: 'Aux') -> 'Aux':
    return Aux([*self, *other])

  def layers(self) -> list[list[dict[str, Any]]]:
    """For each MoE layer, from below, a dict for each of its iterations."""
    found = []
    for segment in self:
      G, R, I = segment['entropy'].shape[:3]
      for g, r in np.ndindex(G, R):
        layer = jax.tree.map(lambda a, at=(g, r): a[at], segment)
        found.append(
          [jax.tree.map(lambda a, i=i: a[i], layer) for i in range(I)]
        )
    return found

  def routes(self) -> list[jax.Array]:
    """`route` of each segment, as Ctx.replay takes it."""
    return [segment['route'] for segment in self]

  def select(self, *names: str) -> 'Aux':
    """These entries alone."""
    return Aux({name: segment[name] for name in names} for segment in self)

  def without(self, *names: str) -> 'Aux':
    """All but these entries."""
    keep = lambda segment: {k: v for k, v in segment.items() if k not in names}
    return Aux(map(keep, self))


jax.tree_util.register_pytree_node(
  Aux, lambda aux: (list(aux), None), lambda _, segments: Aux(segments)
)


class RouterState(nnx.Variable):
  """What a router carries over training steps, without a gradient."""


class Router(nnx.Module):
  """The contract. `k` is the (mean) number of experts per token.

  Padding, which `ctx.real_T` tells, is no token: it has no row, no place in a
  capacity and no weight in what is reported, and shifts no draw.

  Attributes:
    causal: a token's routing depends on no later token.
    coupled: out of training too a token's routing depends on other tokens of
      its group, by a capacity or a choice over tokens.
    writes: without its capacity it depends on none, so that a text can be
      written one token after another; by default where it is causal.
    equivariant: permuting the tokens of a sequence permutes their routing.
    group: how many tokens share a capacity or a choice; None: those of a row.
  """

  k: float
  causal = True
  coupled = False
  writes = True
  equivariant = True
  group: int | None = None

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    if 'causal' in vars(cls) and 'writes' not in vars(cls):
      cls.writes = cls.causal
    if '__init__' in vars(cls):
      cls.__init__ = ranges.checked(cls.__init__)

  def memory(self, x_TxD: jax.Array) -> Any:
    """What the router of the first layer gets as memory: arrays, or ()."""
    del x_TxD
    return ()

  def __call__(
    self, x_TxD: jax.Array, ctx: Ctx, memory: Any
  ) -> tuple[Plan, dict[str, Any], Any]:
    """Returns the plan, aux and the memory for the next router.

    `aux` has `load_E` (assignments per expert before dropping), `dropped` (the
    fraction of them without a row; where experts choose, of tokens that none
    took), `route` (what `ctx.replay` replays), `entropy`, and the router's
    losses, unweighted, in `losses`.
    """
    raise NotImplementedError

  def update(self, state: dict, load_E: jax.Array) -> dict:
    """New state after an optimiser step, from its load over all devices."""
    del load_E
    return state


def names() -> list[str]:
  """The routers that exist."""
  return byname.names(__name__)


def get(name: str) -> type[Router]:
  """The class that a name stands for.

  'topk' is `Router` in moe_jax/routers/topk.py, and a name with a dot is
  MODULE.CLASS, 'my_package.my_router.Router'.

  Raises:
    ValueError: there is no such router. What that module itself raises while
      it is imported is raised as it is.
  """
  if '.' in str(name):
    return _elsewhere(str(name))
  more = '; one of your own is MODULE.CLASS'
  return byname.find(__name__, 'router', name, more).Router


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


def losses(
  router: type[Router],
  D: int,
  E: int,
  options: dict[str, Any],
  *,
  steps: int = 1,
  rows: int = 1,
  L: int = 8,
  dtype: Any = jnp.float32,
) -> frozenset[str]:
  """The names of the losses that it reports in training; nothing is compiled.

  Args:
    steps: of the run.
    rows, L, dtype: of the batches that it will see.

  Raises:
    ValueError: there is no step in which it could follow these options.
  """
  place_BxL = np.zeros((rows, L), np.int32)
  batch = {
    'ids_BxL': place_BxL,
    'pos_BxL': place_BxL,
    'row_B': place_BxL[:, 0],
  }

  def reported(x_TxD):
    made = router(D, E, rngs=nnx.Rngs(0), **options)
    ctx = context(batch, jax.random.key(0), 0, train=True, steps=steps)
    return made(x_TxD, ctx, made.memory(x_TxD))[1]['losses']

  x_TxD = jax.ShapeDtypeStruct((rows * L, D), dtype)
  return frozenset(jax.eval_shape(reported, x_TxD))


@functools.cache
def every_loss() -> frozenset[str]:
  """What the routers here report between them, with their default options."""
  return frozenset().union(*(losses(get(name), 8, 8, {}) for name in names()))


def logits(x_TxD: jax.Array, w_DxE: jax.Array) -> jax.Array:
  """[T, E] logits, in at least float32 whatever the model computes in."""
  wide = np.promote_types(x_TxD.dtype, jnp.float32)
  # A TPU's own default would round float32 to bfloat16.
  return jnp.matmul(x_TxD.astype(wide), w_DxE.astype(wide), precision='highest')


def choose(score_TxE: jax.Array, k: int, ctx: Ctx) -> jax.Array:
  """int32 [T, K]: the k best experts of each token, or the replay ones."""
  if ctx.replay is None:
    expert_TxK = jax.lax.top_k(jax.lax.stop_gradient(score_TxE), k)[1]
  else:
    # What chose no expert, as padding, has the id E.
    expert_TxK = jnp.minimum(ctx.replay, score_TxE.shape[1] - 1)
  # Saved under rematerialisation: recomputing must never re-route a token.
  return checkpoint_name(expert_TxK, 'route')


def groups(ctx: Ctx, group: int | None) -> plans.Groups:
  """The tokens of this Ctx in groups of so many; None: a row is a group.

  A group is a part of a row, or as many whole rows as have its tokens, at most
  all: so it is where its rows are, on any mesh. Padding counts for no part.
  """
  T, L = ctx.real_T.shape[0], ctx.length
  span = min(max((group or L) // L, 1) * L, T)
  real_P = jnp.pad(ctx.real_T, (0, -T % span))
  return plans.Groups(real_P.reshape(-1, span), min(group or span, span))


def capacity_rows(
  capacity: float | None, tokens: int, k: float, E: int
) -> int | None:
  """Rows an expert takes of so many tokens: ceil(capacity * tokens * k / E)."""
  if capacity is None:
    return None
  return max(1, exact.ceil(exact.product(capacity, k), tokens, E))


def by_token(
  expert_TxK: jax.Array,
  gate_TxK: jax.Array,
  E: int,
  ctx: Ctx,
  *,
  rows: Callable[[int], int | None] = lambda tokens: None,
  group: int | None = None,
) -> plans.TokenChoice:
  """The plan in which tokens chose experts, without padding.

  Args:
    expert_TxK: of `choose`.
    rows: how many an expert takes from a group of so many tokens; None is
      dropless, as is a text that is written.
    group: of `groups`.
  """
  if rows(1) is None or ctx.writes:
    return plans.by_token(expert_TxK, gate_TxK, E, ctx.real_T)
  shared = groups(ctx, group)
  rows_n = jnp.asarray([rows(n) for n in range(shared.size + 1)], jnp.int32)
  return plans.by_token(
    expert_TxK,
    gate_TxK,
    E,
    ctx.real_T,
    capacity_N=rows_n[shared.count()],
    groups=shared,
  )


def report(
  plan: plans.TokenChoice,
  expert_TxK: jax.Array,
  probs_TxE: jax.Array,
  ctx: Ctx,
) -> dict[str, Any]:
  """What every token-choice router with probabilities reports."""
  E, real_T = probs_TxE.shape[1], ctx.real_T
  expert_TxK = plans.chosen(expert_TxK, E, real_T)
  by_row = lambda a: a.reshape(-1, ctx.length, *a.shape[1:])
  expert_BxLxK = by_row(expert_TxK)
  load_BxE = jax.vmap(lambda expert: plans.count(expert, E))(expert_BxLxK)
  load_E = jnp.sum(load_BxE, axis=0, dtype=jnp.int32)
  return {
    'load_E': load_E,
    'dropped': plans.dropped(plan, expert_TxK),
    'route': expert_TxK,
    'entropy': balance.entropy(jax.lax.stop_gradient(probs_TxE), real_T),
    'losses': {
      'balance': balance.switch(probs_TxE, load_E, real_T),
      'sequence_balance': balance.sequence(
        by_row(probs_TxE), load_BxE, by_row(real_T)
      ),
    },
  }


def check(E: int, *, k: float) -> None:
  """ValueError, with the values, for more experts per token than there are."""
  if not 0 < k <= E:
    raise ValueError(f'k is {k}, not between 1 and the {E} experts')
