"""The training loop: one jitted step, evaluation, checkpoints, a report."""

import collections
import contextlib
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import (
  checkpoint,
  metrics,
  models,
  pairs,
  parallel,
  report,
  routers,
  translate,
)
from moe_jax.job import Job


class TrainState(NamedTuple):
  step: jax.Array  # int32, optimiser steps done
  params: Any
  router_state: Any  # over steps, without gradient
  opt_state: Any
  cache_BxNxCxD: Any  # of the last block of each row, or None


def initial_state(job: Job) -> TrainState:
  """The state before the first step, laid out on the mesh."""
  init, where = _state(job)
  return jax.jit(init, out_shardings=where)()


def _state(job):
  """A function that makes the first state, and where states lie."""

  def init():
    params, router_state = models.split(job.init())
    if job.config['model']['dtype'] == 'float64':
      params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    opt_state = job.optimizer.init(params)
    cache = _blank(job)
    return TrainState(jnp.int32(0), params, router_state, opt_state, cache)

  return init, parallel.shardings(jax.eval_shape(init), job.mesh)


def make_step(job: Job) -> Callable[[TrainState, Any], tuple]:
  """(state, batch) -> state, metrics: one optimiser step."""
  parts = job.config['optimizer']['accumulate']

  def loss_of(params, state, tokens, batch, microbatch):
    state = state._replace(params=params)
    forward, kept = _forward(job, state, microbatch, True)
    loss, found = job.objective(forward, batch, tokens)
    found = {'loss': loss, **found, 'aux': _fixed_size(found['aux'])}
    return loss, (found, kept)

  def step(state, batch):
    # Row i goes to microbatch i % parts, so that no row changes its device.
    cut = lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)
    tokens = jnp.sum(batch['mask_BxL']) / parts
    batch = _with_cache(batch, state.cache_BxNxCxD)

    def add_gradient(total, scanned):
      gradient = jax.grad(loss_of, has_aux=True)
      grads, found = gradient(state.params, state, tokens, *scanned)
      return jax.tree.map(jnp.add, total, grads), found

    grads, (found, kept) = jax.lax.scan(
      add_gradient,
      jax.tree.map(jnp.zeros_like, state.params),
      (jax.tree.map(cut, batch), jnp.arange(parts, dtype=jnp.int32)),
    )
    grads = jax.tree.map(lambda g: g / parts, grads)
    with jax.numpy_dtype_promotion('standard'):  # optax mixes types
      norm = optax.tree.norm(grads)
      updates, opt_state = job.optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    found = _join(found)
    router_state = state.router_state
    if found['aux']:
      model = models.bind(job.model, params, router_state)
      router_state = model.updated_state(found['aux'])
    join = lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
    cache = join(kept['cache']) if kept else None
    state = TrainState(state.step + 1, params, router_state, opt_state, cache)
    return state, {**found, 'grad_norm': norm}

  _, where = _state(job)
  out = where, _everywhere(job)
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def _everywhere(job):
  """The whole of an array on each device, so that each process can read it."""
  return jax.NamedSharding(job.mesh, jax.P())


def _forward(job, state, microbatch, train):
  """The model of this state as an objective calls it, and what calls keep."""
  model = models.bind(job.model, state.params, state.router_state)
  seed_key, kept = jax.random.key(job.config['seed']), {}

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
    logits_BxLxV, aux, cache = model.advance(batch, ctx, cache_NxBxCxD)
    kept['cache'] = cache.swapaxes(0, 1)
    return logits_BxLxV, aux

  return forward, kept


def _blank(job):
  """The cache before the first block of a stream; None without one."""
  if not job.dataset.streams:
    return None
  return job.model.blank(job.config['batch_size']).swapaxes(0, 1)


def _with_cache(batch, cache_BxNxCxD):
  """The batch with its rows' cache, empty where a row begins anew."""
  if cache_BxNxCxD is None:
    return batch
  begins = batch['begins_B'][:, None, None, None]
  cache = jnp.where(begins, 0, cache_BxNxCxD)
  return {**batch, 'cache_BxNxCxD': cache}


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
  return jax.jit(evaluate, out_shardings=(_everywhere(job), None))


def evaluate(
  job: Job, run_eval: Callable[..., tuple], state: TrainState, share: float
) -> dict[str, float]:
  """Means over that share of what is held out.

  Nats per target; of text bits per byte, of images the accuracy, of two passes
  the divergence.
  """
  sums = collections.Counter()
  for index, batch in enumerate(job.eval_batches(share)):
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
  if job.mesh.size == 1:
    return
  size = job.config['batch_size']
  with _precision(job):
    state = jax.eval_shape(functools.partial(initial_state, job))
    batch = {
      name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype)
      for name, a in next(job.train_batches()).items()
    }
    jax.eval_shape(make_step(job), state, batch)


def run(job: Job) -> dict[str, Any]:
  """Trains to the end, continuing what the work directory holds.

  Leaves config.json, what the data needs (tokenizer.json), metrics.jsonl,
  checkpoints and, at the end, summary.json and report.html; of several
  processes the first does, but for checkpoints. Returns the summary.
  """
  with _precision(job):
    return _run(job)


def _precision(job):
  wide = job.config['model']['dtype'] == 'float64'
  return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _run(job):
  c, began, first = job.config, time.monotonic(), jax.process_index() == 0
  tokens_per_step = c['batch_size'] * job.dataset.length
  if first:
    job.workdir.mkdir(parents=True, exist_ok=True)
    (job.workdir / 'summary.json').unlink(missing_ok=True)  # of fewer steps
    _write_json(job.workdir / 'config.json', c)
    job.dataset.save(job.workdir)
  state, batches = initial_state(job), job.train_batches()
  saved = checkpoint.Checkpoints(job.workdir, c['keep_checkpoints'])
  # What a checkpoint keeps beside the state.
  record = {'seconds': 0.0, 'train_seconds': 0.0, 'train_steps': 0}
  if saved.latest() is not None:
    state, record = saved.restore(saved.latest(), state)
    batches.set_state(record.pop('batches'))
    began -= record['seconds']
  start, end = int(state.step), c['steps']
  stopwatch = _Stopwatch(record['train_seconds'], record['train_steps'])
  run_step, run_eval = make_step(job), make_eval(job)
  writer = metrics.Writer(job.workdir if first else None, start)
  cost = models.get(c['model']['name']).cost(job.model, job.dataset.length)
  share, told = job.dataset.eval_share, False  # of lost rows

  def due(key, step):
    return c[key] > 0 and step % c[key] == 0

  with (
    contextlib.nullcontext() if first else open(os.devnull, 'w') as stream,
    metrics.Progress(end, tokens_per_step, start, stream) as progress,
  ):
    for line in _introduction(job, cost, start):
      progress.note(line)
    for step in range(start + 1, end + 1):
      batch = job.put(next(batches))
      state, found = run_step(state, batch)
      if step == start + 1:  # compiling is not the run's speed
        jax.block_until_ready(state)
        stopwatch.start(step)
      loss = found['nll_sum'] / found['tokens']
      if step == 1:
        record['initial_loss'] = float(loss)
      if due('log_every', step) or (step == 1 and c['log_every']):
        line = _line(job, step, found)  # waits for the step
        rate = stopwatch.rate(step) * tokens_per_step
        writer.write(step, {**line, 'tokens_per_second': rate or None})
        lost = sum(line.get('lost', ()))
        if lost and not told:
          told = True
          progress.note(
            f'step {step}: {lost} rows found no place, metrics.jsonl counts'
            f' them; parallel.factor={c["parallel"]["factor"]}'
          )
      progress.update(step, loss)
      evaluates = step == end or due('eval_every', step)
      saves = step == end or due('checkpoint_every', step)
      if evaluates or saves:
        jax.block_until_ready(state)
        stopwatch.stop(step)
        if evaluates:
          part = 1.0 if step == end else share
          record['evaluation'] = evaluate(job, run_eval, state, part)
          writer.write(step, record['evaluation'])
          progress.evaluation(step, record['evaluation'])
        if saves:
          record['train_seconds'], record['train_steps'] = stopwatch.total()
          record['seconds'] = time.monotonic() - began
          saved.save(step, state, {**record, 'batches': batches.get_state()})
        stopwatch.start(step)
    saved.close()
    if isinstance(job.dataset, pairs.Pairs) and c['data']['bleu_lines']:
      found = _bleu(job, state)
      record['evaluation'] |= found
      progress.evaluation(end, found)
  summary = _summary(job, cost, record, time.monotonic() - began)
  if first:
    _write_json(job.workdir / 'summary.json', summary)
    report.write(job.workdir)
    print(f'report: {job.workdir / report.FILE}')
  return summary


def _bleu(job, state):
  """BLEU of the model's translations."""
  c = job.config['data']
  search = translate.searcher(job.dataset, c['beam'], c['penalty'])

  @functools.partial(jax.jit, out_shardings=_everywhere(job))
  def run(state, batch, index):
    batch['row_B'] += index * batch['row_B'].shape[0]
    model = models.bind(job.model, state.params, state.router_state)
    seed_key = jax.random.key(job.config['seed'])
    ctx = routers.context(batch, seed_key, state.step, train=False)
    return search(model, batch, ctx)

  def of(batch, index):
    return run(state, job.put(batch), jnp.int32(index))

  share = min(1.0, c['bleu_lines'] / len(job.dataset.eval_pairs))
  references = job.dataset.references(share, job.config['batch_size'])
  batches = job.eval_batches(share)
  return translate.scores(job.dataset, of, batches, references)


def _summary(job, cost, record, wall_seconds):
  c = job.config
  per_step = c['batch_size'] * job.dataset.length
  tokens = c['steps'] * per_step
  if record['train_steps']:
    rate = record['train_steps'] * per_step / record['train_seconds']
  else:  # the only step was the one that compiled
    rate = tokens / wall_seconds
  return {
    'initial_loss': record['initial_loss'],
    **record['evaluation'],
    'steps': c['steps'],
    'tokens': tokens,
    'tokens_per_second': rate,
    **cost,
    'wall_seconds': wall_seconds,
    'implementation': job.implementation,
    'devices': [str(d) for d in job.mesh.devices.flat],
    'versions': versions(),
    'corpus_sha256': job.dataset.sha256,
    'corpus': job.dataset.description,
    'config_description': c['description'],
  }


class _Stopwatch:
  """Time and steps spent training: compiling, evaluating, saving left out."""

  def __init__(self, seconds: float, steps: int):
    self._seconds, self._steps = seconds, steps
    self._began = self._rated = (0.0, 0)

  def start(self, step: int) -> None:
    self._began = self._rated = (time.monotonic(), step)

  def stop(self, step: int) -> None:
    began, first = self._began
    self._seconds += time.monotonic() - began
    self._steps += step - first

  def rate(self, step: int) -> float:
    """Steps a second since the last call or start; 0 where none were made."""
    now, (began, first) = time.monotonic(), self._rated
    self._rated = (now, step)
    return (step - first) / (now - began)

  def total(self) -> tuple[float, int]:
    return self._seconds, self._steps


def _fixed_size(aux):
  """What is logged of a model's aux: nothing that grows with the batch."""
  return [{k: v for k, v in a.items() if k != 'route'} for a in aux]


def _join(found):
  """Metrics of a whole batch from those of its microbatches."""
  sums = ('load_E', 'lost', 'tokens')

  def join(path, a):
    name = str(path[-1].key)
    add = name in sums or name.endswith('_sum')
    return jnp.sum(a, axis=0) if add else jnp.mean(a, axis=0)

  return jax.tree_util.tree_map_with_path(join, found)


def _line(job, step, found):
  """A training line of metrics.jsonl; lists run over layers and iterations."""
  found = jax.device_get(found)
  c = job.config
  line = {
    'loss': found['nll_sum'] / found['tokens'],
    'total_loss': found['loss'],
    'grad_norm': found['grad_norm'],
    'learning_rate': job.schedule(step - 1),
    'tokens': step * c['batch_size'] * job.dataset.length,
  }
  for aux in found['aux']:
    load = aux['load_E'].reshape(-1, aux['load_E'].shape[-1])
    rows = {'load': load / load.sum(axis=1, keepdims=True)}
    rows |= {k: aux[k].reshape(-1) for k in ('entropy', 'dropped', 'lost')}
    rows |= {k: v.reshape(-1) for k, v in aux['losses'].items()}
    for name, value in rows.items():  # of one segment after another
      line[name] = [*line.get(name, []), *value]
  return line


def _introduction(job, cost, start):
  """What a run says before it begins."""
  c = job.config
  device = job.mesh.devices.flat[0]
  yield f'{c["description"] or "moe_jax"}: {job.workdir}'
  yield (
    f'{job.mesh.size} x {device.device_kind}, '
    + ', '.join(f'{k} {v}' for k, v in job.implementation.items())
  )
  yield f'data: {job.dataset.description}'
  yield (
    f'parameters: {metrics.si(cost["params_total"])}, '
    f'{metrics.si(cost["params_active"])} active,'
    f' {metrics.si(cost["expert_params"])} in experts'
  )
  if start:
    yield f'continuing after step {start}'
  for text in job.changed:
    yield f'changed: {text}'


def versions() -> dict[str, str]:
  """Of Python and the packages that a result depends on."""
  names = (
    'moe_jax jax jaxlib flax optax orbax-checkpoint grain tokenizers numpy'
  ).split()
  found = {name: metadata.version(name) for name in names}
  return {'python': platform.python_version(), **found}


def _write_json(path, values):
  metrics.replace(path, json.dumps(values, indent=2) + '\n')
