"""The training loop: steps, evaluations, checkpoints, a report.

A run that was killed anywhere continues with the same command, and ends with
the same bits. What the loop itself knows between steps is its `record`, which
stands in every checkpoint beside the state and the place in the data.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config, models, paths, routers
from moe_jax.data import pairs
from moe_jax.evaluators import translation
from moe_jax.report import metrics, page
from moe_jax.training import checkpoint, health, lock, preemption, train_step
from moe_jax.training.jobs import check_place, Job, NOT_FINITE


class Stopped(Exception):
  """The run cannot go on; one line. What was saved is there."""


def run(job: Job) -> dict[str, Any]:
  """Trains to the end, continuing what the work directory holds.

  Leaves config.json, what the data needs (tokenizer.json), metrics.jsonl,
  checkpoints and, at the end, summary.json and report.html; of several
  processes the first does, but for checkpoints. Returns the summary.

  Raises:
    Stopped: numbers stay bad; or no checkpoint is whole, or none can be saved;
      or another run has the work directory.
    SystemExit: with preemption.EXIT, after SIGTERM, when all is saved.
  """
  with train_step.precision(job), preemption.Notice() as notice:
    try:
      with _alone(job):
        return _Run(job, notice).finish()
    except OSError as error:
      place = '' if str(job.workdir) in str(error) else f'{job.workdir}: '
      raise Stopped(f'{place}{error}') from error


@contextlib.contextmanager
def _alone(job):
  """The work directory is this run's; of several processes the first locks."""
  first = jax.process_index() == 0
  with lock.held(job.workdir) if first else contextlib.nullcontext():
    try:
      check_place(job)  # another run may have been there since `prepare`
    except ValueError as error:
      raise Stopped(str(error)) from error
    yield


class _Run:
  """A run, from where its work directory stands."""

  def __init__(self, job, notice):
    c = job.config
    self.job, self.c, self.notice = job, c, notice
    self.began, self.told = time.monotonic(), []
    self.first = jax.process_index() == 0
    self.state, self.batches = None, job.train_batches()
    # What a checkpoint keeps beside the state.
    self.record = {
      'seconds': 0.0,  # of the whole run
      'train_seconds': 0.0,
      'train_steps': 0,
      'rollbacks': 0,
      'owed': False,  # the evaluation of this step
    }
    # A new run first says what it is; of an old one nothing is changed before
    # a checkpoint has been read.
    resumes = (job.workdir / 'checkpoints').exists()
    if not resumes:
      self._describe()
    self.saved = checkpoint.Checkpoints(
      job.workdir, c['keep_checkpoints'], c['keep_every']
    )
    if resumes:
      self._resume()
      self._describe()
    if self.state is None:
      self.state = train_step.initial_state(job)
    self.step = self.start = int(self.state.step)
    beyond = self._look_back()
    if beyond > self.step:
      self.told.append(f'steps {self.step + 1} to {beyond} are made again')
    self.stopwatch = _Stopwatch(
      self.record['train_seconds'], self.record['train_steps']
    )
    self.run_step = train_step.make_step(job)
    self.run_eval = train_step.make_eval(job)
    module = models.get(c['model']['name'])
    self.cost = module.cost(job.model, job.dataset.length)
    self.overflow = False  # rows, and told so
    self.tokens_per_step = c['batch_size'] * job.dataset.length

  def finish(self):
    """The steps that are left, and the end; returns the summary."""
    end, job = self.c['steps'], self.job
    with (
      self.saved,
      contextlib.nullcontext() if self.first else open(os.devnull, 'w') as out,
      metrics.Progress(end, self.tokens_per_step, self.start, out) as progress,
    ):
      self.progress = progress
      for line in (*introduction(job, self.start), *self.told):
        progress.note(line)
      if self.record['owed'] and not self._evaluate():
        self._leave()
      self._steps(end)
      self.saved.wait()
      if isinstance(job.dataset, pairs.Pairs) and self.c['data']['bleu_lines']:
        found = bleu(job, self.state)
        self.record['evaluation'] |= found
        progress.evaluation(end, found)
    seconds = time.monotonic() - self.began
    summary = _summary(job, self.cost, self.record, seconds)
    if self.first:
      _write_json(job.workdir / 'summary.json', summary)
      page.write(job.workdir)
      print(f'report: {job.workdir / page.FILE}')
    if summary['eval_loss'] is None:
      raise Stopped(f'{job.workdir}: {NOT_FINITE}')
    return summary

  def _steps(self, end):
    """Trains to this step. A step is judged while the next one runs."""
    judged = self.step, None, int(self.state.guard.row)
    while judged:
      step, batch, row = judged
      judged = found = None
      if self.step < end:
        judged, found = self._train()
      row = int(row)
      if row:
        self.progress.note(f'step {step}: bad numbers, skipped; {row} in a row')
      if row >= self.c['guard']['skips']:
        # Of a step before a kill the batch is not known, but the next one is.
        self._go_back(step, row, batch or (judged and judged[1]))
        judged = self.step, None, int(self.state.guard.row)
      elif found:
        self._after(found)

  def _train(self):
    """Starts a step; returns what there is to judge it by, and its metrics."""
    batch = self.job.put(next(self.batches))
    self.state, found = self.run_step(self.state, batch)
    self.step += 1
    if self.step == self.start + 1:  # compiling is not the run's speed
      jax.block_until_ready(self.state)
      self.stopwatch.start(self.step)
    return (self.step, batch, found['row']), found

  def _after(self, found):
    """Logs, evaluates, saves and leaves, as is due after a step."""
    step, last = self.step, self.step == self.c['steps']
    loss = found['nll_sum'] / found['tokens']
    if 'initial_loss' not in self.record and not int(found['row']):
      self.record['initial_loss'] = float(loss)
    if self._due('log_every') or (step == 1 and self.c['log_every']):
      self._log(found)
    self.progress.update(step, loss)
    evaluates = last or self._due('eval_every')
    saves = last or self._due('checkpoint_every')
    leaves = self.notice.reached(step)
    if not (evaluates or saves or leaves):
      return
    jax.block_until_ready(self.state)
    self.stopwatch.stop(step)
    if evaluates and not self._evaluate():
      leaves = True
    if saves or leaves:
      self._save()
    if leaves:
      self._leave()
    self.stopwatch.start(step)

  def _due(self, key):
    return self.c[key] > 0 and self.step % self.c[key] == 0

  def _log(self, found):
    line = _line(self.job, self.step, found)  # waits for the step
    rate = self.stopwatch.rate(self.step) * self.tokens_per_step
    line = {**line, 'tokens_per_second': rate or None}
    self.writer.write(self.step, line)
    told = self.routing.see({'step': self.step, **line})
    overflow = sum(line.get('overflow', ()))
    if overflow and not self.overflow:
      self.overflow = True
      told.append(
        f'step {self.step}: {overflow} rows found no place, metrics.jsonl'
        ' counts them; parallel.buffer_factor='
        f'{self.c["parallel"]["buffer_factor"]}'
      )
    for text in told:
      self.progress.note(text)

  def _evaluate(self):
    """Whether it came to its end: SIGTERM ends it, and it is owed."""
    share = self.job.dataset.eval_share
    share = 1.0 if self.step == self.c['steps'] else share
    found = train_step.evaluate(
      self.job, self.run_eval, self.state, share, lambda: self.notice.given
    )
    self.record['owed'] = found is None
    if found is None:
      return False
    self.record['evaluation'] = found
    self.writer.write(self.step, found)
    self.progress.evaluation(self.step, found)
    return True

  def _save(self):
    seconds, steps = self.stopwatch.total()
    self.record |= {'train_seconds': seconds, 'train_steps': steps}
    self.record['seconds'] = time.monotonic() - self.began
    self.writer.sync()  # no checkpoint without the lines before it
    data = {'record': self.record, 'batches': self.batches.get_state()}
    self.saved.save(self.step, self.state, data)

  def _leave(self):
    self.saved.wait()
    self.progress.note(f'SIGTERM: left after step {self.step}, all is saved')
    preemption.leave()

  def _resume(self):
    """Goes to the newest whole checkpoint, if there is any checkpoint."""
    found = self.saved.restore(train_step.abstract_state(self.job))
    if found is None:
      return
    self.saved.set_aside(found.damaged)
    for step, what in found.damaged.items():
      self.told.append(
        f'the checkpoint of step {step} is damaged, now in'
        f' {checkpoint.DAMAGED}/: {what}'
      )
    self.state, self.record = found.state, found.data['record']
    self.batches.set_state(found.data['batches'])
    self.began -= self.record['seconds']

  def _go_back(self, step, row, batch):
    """To the checkpoint before the bad steps, without their data."""
    told = f'step {step}: {row} steps in a row had bad numbers'
    if self.record['rollbacks'] == self.c['guard']['rollbacks']:
      where = 'its batch is not known any more'
      if batch:
        where = train_step.first_bad_number(self.job, self.state, batch)
      raise Stopped(
        f'{told}, after {self.record["rollbacks"]} rollbacks: {where}'
      )
    rollbacks, skipped = self.record['rollbacks'], self.state.guard.skipped
    self.state = None  # a device may not have room for two
    like = train_step.abstract_state(self.job)
    found = self.saved.restore(like, before=step - row + 1)
    if found is None:
      self.state = train_step.initial_state(self.job)
    else:
      self.saved.set_aside(found.damaged)
      self.state, self.record = found.state, found.data['record']
    # A run that owes an evaluation makes it before its first step.
    self.record |= {'rollbacks': rollbacks + 1, 'owed': False}
    guard = self.state.guard._replace(skipped=skipped)
    state = self.state._replace(guard=guard)
    self.state = train_step.without_cache(state)  # of data that are left out
    self.step = int(self.state.step)
    self.saved.forget(after=self.step)
    self._look_back()
    self.stopwatch.start(self.step)
    self.progress.note(
      f'{told}: back to step {self.step}, and on with the data that follow'
    )

  def _look_back(self):
    """Metrics of later steps go; returns the last step that had any."""
    lines = metrics.read(self.job.workdir) if self.first else []
    workdir = self.job.workdir if self.first else None
    self.writer = metrics.Writer(workdir, self.step, self.record['owed'])
    self.routing = health.Routing(self.c['model']['iterations'])
    for line in lines:
      if line['step'] <= self.step:
        self.routing.see(line)
    return max((line['step'] for line in lines), default=0)

  def _describe(self):
    """Writes what the run is."""
    if not self.first:
      return
    workdir = self.job.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    for part in workdir.glob('*.part'):  # of a write that a kill interrupted
      shutil.rmtree(part) if part.is_dir() else part.unlink()
    (workdir / 'summary.json').unlink(missing_ok=True)  # of fewer steps
    _write_json(workdir / 'config.json', self.c)
    beside = paths.absolute(self.c['init_from'] or '.') / checkpoint.ASIDE
    if self.c['init_from'] and beside.is_dir():
      own = workdir / checkpoint.ASIDE
      shutil.copytree(beside, own, dirs_exist_ok=True)
    with tempfile.TemporaryDirectory('.part', dir=workdir) as folder:
      self.job.dataset.save(pathlib.Path(folder))
      for path in pathlib.Path(folder).iterdir():
        path.replace(workdir / path.name)


def bleu(job, state):
  """BLEU of the model's translations."""
  c = job.config['data']
  search = translation.searcher(job.dataset, c['beam'], c['penalty'])

  @functools.partial(jax.jit, out_shardings=train_step.everywhere(job))
  def run(state, batch, index):
    batch['row_B'] += index * batch['row_B'].shape[0]
    model = models.bind(job.model, state.params, state.router_state)
    seed_key = jax.random.key(state.seed)
    ctx = routers.context(
      batch, seed_key, state.step, train=False, steps=job.config['steps']
    )
    return search(model, batch, ctx)

  def of(batch, index):
    return run(state, job.put(batch), jnp.int32(index))

  share = min(1.0, c['bleu_lines'] / len(job.dataset.eval_pairs))
  references = job.dataset.references(share, job.config['batch_size'])
  batches = job.eval_batches(share)
  return translation.scores(job.dataset, of, batches, references)


def _summary(job, cost, record, wall_seconds):
  c = job.config
  per_step = c['batch_size'] * job.dataset.length
  tokens = c['steps'] * per_step
  if record['train_steps']:
    rate = record['train_steps'] * per_step / record['train_seconds']
  else:  # the only step was the one that compiled
    rate = tokens / wall_seconds
  values = {
    'initial_loss': record.get('initial_loss'),  # None: all steps were skipped
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
  return metrics.jsonable(values, 17)


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


def _line(job, step, found):
  """A training line of metrics.jsonl; lists run over layers and iterations."""
  found = jax.device_get(found)
  c = job.config
  line = {
    'loss': found['nll_sum'] / found['tokens'],
    'total_loss': found['loss'],
    'grad_norm': found['grad_norm'],
    'learning_rate': job.schedule(step - 1),
    'skipped': found['skipped'],
    **({'bad': True} if found['row'] else {}),
    'tokens': step * c['batch_size'] * job.dataset.length,
  }
  for aux in itertools.chain(*found['aux'].layers()):
    told = {k: aux[k] for k in ('entropy', 'dropped', 'overflow')}
    told |= {'load': aux['load_E'] / aux['load_E'].sum(), **aux['losses']}
    for name, value in told.items():
      line.setdefault(name, []).append(value)
  return line


def introduction(job: Job, start: int) -> Iterator[str]:
  """The lines that a run begins with, which goes on after the step `start`."""
  c = job.config
  cost = models.get(c['model']['name']).cost(job.model, job.dataset.length)
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
  own = {k: v for k, v in config.set_in(c).items() if k not in _SAID}
  if own:
    yield 'set: ' + ', '.join(f'{k}={v}' for k, v in own.items())
  for loss in job.unweighted:
    yield f'objective.losses.{loss} is not set: the router reports that loss'
  if start:
    yield f'continuing after step {start}'
  for text in job.changed:
    yield f'changed: {text}'


_SAID = ('description', 'corpus_sha256', 'data.path')  # in other lines


def versions() -> dict[str, str]:
  """Of Python and the packages that a result depends on."""
  names = (
    'moe_jax jax jaxlib flax optax orbax-checkpoint grain tokenizers numpy'
  ).split()
  found = {name: metadata.version(name) for name in names}
  return {'python': platform.python_version(), **found}


def _write_json(path, values):
  text = json.dumps(values, indent=2, allow_nan=False)
  metrics.replace(path, text + '\n')
