"""The jitted programs of a run: the first state, a step, an evaluation."""

import collections
import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import models, parallel, paths, routers
from moe_jax.optim import guard
from moe_jax.training import checkpoint, distributed, nonfinite
from moe_jax.training.jobs import Job


class TrainState(NamedTuple):
  step: jax.Array  # int32, optimiser steps done
  # uint32, of all draws. Here, so that programs do not depend on it: runs of
  # several seeds compile once.
  seed: jax.Array
  params: Any
  router_state: Any  # over steps, without gradient
  opt_state: Any
  cache_BxNxCxD: Any  # of the last block of each row, or None
  guard: guard.State  # of bad steps


class Weights(NamedTuple):
  """The part of a TrainState that a trained model is."""

  step: jax.Array
  params: Any
  router_state: Any


def initial_state(job: Job) -> TrainState:
  """The state before the first step, laid out on the mesh.

  Raises:
    OSError: the weights of init_from are gone or damaged.
  """
  init, where = _state(job)
  seed = np.uint32(job.config['seed'])
  if not job.config['init_from']:
    return jax.jit(init, out_shardings=where)(seed)
  folder = paths.absolute(job.config['init_from'])
  found = distributed.gather(str(max(checkpoint.steps(folder), default=0)))
  weights = checkpoint.read(folder, int(found[0]), abstract_weights(job))
  begin = jax.jit(init, out_shardings=where, donate_argnums=(1, 2))
  return begin(seed, weights.params, weights.router_state)


def abstract_state(job: Job) -> TrainState:
  """Its shapes and types, and where it lies on the mesh; no arrays."""
  init, where = _state(job)
  return jax.tree.map(
    lambda a, sharding: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=sharding
    ),
    jax.eval_shape(init, np.uint32(0)),
    where,
  )


def abstract_weights(job: Job) -> Weights:
  """The same of what a trained model is."""
  state = abstract_state(job)
  return Weights(state.step, state.params, state.router_state)


def _state(job):
  """A function that makes the first state of a seed, and where states lie.

  It may be given the weights that are the first.
  """

  def init(seed, params=None, router_state=None):
    if params is None:
      params, router_state = models.split(job.init(seed))
      if job.config['model']['dtype'] == 'float64':
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    opt_state = job.optimizer.init(params)
    cache = _blank(job)
    return TrainState(
      step=jnp.int32(0),
      seed=seed,
      params=params,
      router_state=router_state,
      opt_state=opt_state,
      cache_BxNxCxD=cache,
      guard=guard.init(),
    )

  shapes = jax.eval_shape(init, np.uint32(0))
  return init, parallel.shardings(shapes, job.mesh)


def make_step(job: Job) -> Callable[[TrainState, Any], tuple]:
  """(state, batch) -> state, metrics: one optimiser step.

  After a bad one (guard.py) all that training changes is as before.
  """
  parts = job.config['optimizer']['accumulate']
  rule = guard.Config(**job.config['guard'])

  def step(state, batch):
    tokens = jnp.sum(batch['mask_BxL']) / parts
    batch = _with_cache(batch, state.cache_BxNxCxD)

    def add_gradient(total, scanned):
      gradient = jax.grad(functools.partial(_loss, job, state), has_aux=True)
      grads, found = gradient(state.params, tokens, *scanned)
      return jax.tree.map(jnp.add, total, grads), found

    grads, (found, kept) = jax.lax.scan(
      add_gradient,
      jax.tree.map(jnp.zeros_like, state.params),
      (_microbatches(batch, parts), jnp.arange(parts, dtype=jnp.int32)),
    )
    grads = jax.tree.map(lambda g: g / parts, grads)
    with jax.numpy_dtype_promotion('standard'):  # optax mixes types
      norm = optax.tree.norm(grads)
      updates, opt_state = job.optimizer.update(
        grads, state.opt_state, state.params, step=state.step
      )
      params = optax.apply_updates(state.params, updates)
    found = _join(found)
    router_state = state.router_state
    if found['aux']:
      model = models.bind(job.model, params, router_state)
      router_state = model.updated_state(found['aux'])
    join = lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
    cache = join(kept['cache']) if kept else None
    bad, judged = guard.judge(rule, state.guard, found['loss'], norm)
    # The next blocks do not follow those before this one.
    blank = jax.tree.map(jnp.zeros_like, state.cache_BxNxCxD)
    old = state._replace(step=state.step + 1, guard=judged, cache_BxNxCxD=blank)
    new = old._replace(
      params=params,
      router_state=router_state,
      opt_state=opt_state,
      cache_BxNxCxD=cache,
    )
    state = guard.choose(bad, old, new)
    found |= {'skipped': judged.skipped, 'row': judged.row}
    return state, {**found, 'grad_norm': norm}

  _, where = _state(job)
  out = where, everywhere(job)
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def _microbatches(batch, parts):
  """The batch with an axis of microbatches outside.

  Row i goes to microbatch i % parts, so that no row changes its device.
  """
  cut = lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(cut, batch)


def _loss(job, state, params, tokens, batch, microbatch):
  """The loss of a microbatch, and (metrics, what the model keeps)."""
  state = state._replace(params=params)
  forward, kept = _forward(job, state, microbatch, True)
  loss, found = job.objective(forward, batch, tokens)
  found = {'loss': loss, **found, 'aux': found['aux'].without('route')}
  return loss, (found, kept)


def everywhere(job: Job) -> jax.NamedSharding:
  """The whole of an array on each device, so that each process can read it."""
  return jax.NamedSharding(job.mesh, jax.P())


def _forward(job, state, microbatch, train):
  """The model of this state as an objective calls it, and what calls keep."""
  model = models.bind(job.model, state.params, state.router_state)
  seed_key, kept = jax.random.key(state.seed), {}

  def forward(batch, pass_):
    ctx = routers.context(
      batch,
      seed_key,
      state.step,
      train=train,
      microbatch=microbatch,
      pass_=pass_,
      steps=job.config['steps'],
    )
    if 'cache_BxNxCxD' not in batch:
      return model(batch, ctx)
    cache_NxBxCxD = batch['cache_BxNxCxD'].swapaxes(0, 1)
    logits_BxLxV, aux, cache = model.forward_with_cache(
      batch, ctx, cache_NxBxCxD
    )
    kept['cache'] = cache.swapaxes(0, 1)
    return logits_BxLxV, aux

  return forward, kept


def _blank(job):
  """The cache before the first block of a stream; None without one."""
  if not job.dataset.streams:
    return None
  return job.model.init_stream_cache(job.config['batch_size']).swapaxes(0, 1)


def _with_cache(batch, cache_BxNxCxD):
  """The batch with its rows' cache, empty where a row begins anew."""
  if cache_BxNxCxD is None:
    return batch
  begins = batch['begins_B'][:, None, None, None]
  cache = jnp.where(begins, 0, cache_BxNxCxD)
  return {**batch, 'cache_BxNxCxD': cache}


def without_cache(state: TrainState) -> TrainState:
  """The state, whose streams begin anew: the next blocks follow no others."""
  cache = state.cache_BxNxCxD
  if cache is None:
    return state
  blank = jax.jit(jnp.zeros_like, out_shardings=cache.sharding)
  return state._replace(cache_BxNxCxD=blank(cache))


def first_bad_number(job: Job, state: TrainState, batch: Any) -> str:
  """Where a step with this batch first makes a number that is not finite.

  It looks through the parameters, the batch, the loss and the gradient.
  """
  for name, tree in (('parameter', state.params), ('batch', batch)):
    found = nonfinite.named(tree)
    if found:
      return f'the {name} {found} is not finite'
  parts = job.config['optimizer']['accumulate']
  tokens = jnp.sum(batch['mask_BxL']) / parts
  batch = _with_cache(batch, state.cache_BxNxCxD)
  cut = _microbatches(batch, parts)
  gradient = jax.grad(functools.partial(_loss, job, state), has_aux=True)
  for i in range(parts):
    part = jax.tree.map(lambda a, i=i: a[i], cut)
    found = nonfinite.made(gradient, state.params, tokens, part, jnp.int32(i))
    if found:
      return f'the first number that is not finite is made by {found}'
  return 'all numbers are finite'


def make_eval(job: Job) -> Callable[..., tuple]:
  """(state, batch, index) -> sums over its targets, the next cache.

  Sums are those of the objective, and of the targets' bytes.
  """
  token_bytes_V = job.dataset.token_bytes

  def evaluate(state, batch, index):
    batch['row_B'] += index * batch['row_B'].shape[0]
    batch = _with_cache(batch, state.cache_BxNxCxD)
    forward, kept = _forward(job, state, index, False)
    _, found = job.objective(forward, batch)
    sums = {k: v for k, v in found.items() if k != 'aux'}
    if token_bytes_V is not None:
      bytes_BxL = jnp.asarray(token_bytes_V)[batch['target_BxL']]
      sums['bytes'] = jnp.sum(jnp.where(batch['mask_BxL'] > 0, bytes_BxL, 0))
    return sums, kept.get('cache')

  # The cache stays where the rows of a batch are.
  return jax.jit(evaluate, out_shardings=(everywhere(job), None))


def evaluate(
  job: Job,
  run_eval: Callable[..., tuple],
  state: TrainState,
  share: float,
  leaving: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Means over that share of what is held out; None when `leaving`.

  Nats per target; of text bits per byte, of images the accuracy, of two passes
  the divergence.
  """
  sums = collections.Counter()
  for index, batch in enumerate(job.eval_batches(share)):
    if leaving():
      return None
    batch = job.put(batch)
    found, cache = run_eval(state, batch, jnp.int32(index))
    state = state._replace(cache_BxNxCxD=cache)
    sums.update({k: float(v) for k, v in found.items()})
  nats, tokens = sums['nll_sum'], sums['tokens']
  values = {'eval_loss': nats / tokens}
  if 'bytes' in sums:
    values['eval_bits_per_byte'] = nats / math.log(2) / sums['bytes']
  for name, key in (('accuracy', 'correct'), ('consistency', 'consistency')):
    if f'{key}_sum' in sums:
      values[f'eval_{name}'] = sums[f'{key}_sum'] / tokens
  return values


def check(job: Job) -> None:
  """ValueError, one line, if a step cannot be cut over the mesh."""
  if job.mesh.size > 1:
    trace(job)


def trace(job: Job) -> None:
  """Traces a step, of which nothing is compiled; raises what it raises."""
  size = job.config['batch_size']
  with precision(job):
    state = abstract_state(job)
    batch = {
      name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype)
      for name, a in next(job.train_batches()).items()
    }
    jax.eval_shape(make_step(job), state, batch)


def precision(job: Job) -> contextlib.AbstractContextManager[None]:
  """Within it jax has the types of this run, whatever JAX_ENABLE_X64 says."""
  return jax.enable_x64(job.config['model']['dtype'] == 'float64')


def _join(found):
  """Metrics of a whole batch from those of its microbatches."""
  sums = ('load_E', 'overflow', 'tokens')

  def join(path, a):
    name = str(path[-1].key)
    add = name in sums or name.endswith('_sum')
    return jnp.sum(a, axis=0) if add else jnp.mean(a, axis=0)

  return jax.tree_util.tree_map_with_path(join, found)
