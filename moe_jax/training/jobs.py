"""What a config asks for, checked before anything is compiled or written."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from moe_jax import config, models, objectives, ops, parallel, paths, routers
from moe_jax.data import dataset, tokenizer
from moe_jax.optim import guard, optimizer
from moe_jax.training import checkpoint, lock

NOT_FINITE = 'the run ended, but its held-out loss is not finite'


@dataclasses.dataclass(frozen=True)
class Job:
  """A run that was found sound; nothing is written or compiled yet."""

  config: dict[str, Any]
  workdir: pathlib.Path
  changed: list[str]  # what differs from the run that is continued
  unweighted: list[str]  # losses that the routers report in vain
  model: Any  # abstract: shapes without arrays
  init: Callable[[jax.Array], nnx.Module]  # from a uint32 seed
  objective: Callable[..., tuple]
  optimizer: optax.GradientTransformation
  schedule: Callable[[int], jax.Array]  # step, from 0 -> learning rate
  mesh: jax.sharding.Mesh
  implementation: dict[str, str]
  dataset: dataset.Dataset

  def train_batches(self):
    """What this process reads of the batches."""
    c, rows = self.config, self._rows()
    return self.dataset.train_batches(c['batch_size'], c['seed'], rows)

  def eval_batches(self, share: float = 1.0):
    size = self.config['batch_size']
    return self.dataset.eval_batches(size, share, self._rows())

  def put(self, batch):
    """The whole batch on the mesh, of which this process has read its rows."""
    return parallel.put_batch(batch, self.mesh, self.config['batch_size'])

  @property
  def identity(self) -> str:
    """A digest of what all processes of a run have in common."""
    c = {**self.config, 'data': {**self.config['data'], 'cache_dir': ''}}
    steps = sorted(p.name for p in self.workdir.glob('checkpoints/*'))
    text = json.dumps([c, steps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def _rows(self):
    return parallel.rows_here(self.mesh, self.config['batch_size'])


def assemble(
  c: dict[str, Any],
  *,
  workdir: pathlib.Path | None,
  mesh: jax.sharding.Mesh,
  init: Callable[[jax.Array], nnx.Module],
  implementation: dict[str, str],
  dataset: Any,
  changed: Sequence[str] = (),
  unweighted: Sequence[str] = (),
) -> Job:
  """The Job of a resolved config, whose parts have been made."""
  settings = optimizer.Config(**c['optimizer'])
  return Job(
    config=c,
    workdir=workdir,
    changed=list(changed),
    unweighted=list(unweighted),
    model=models.abstract(init),
    init=init,
    objective=objectives.get(**c['objective']),
    optimizer=optimizer.make(settings, c['steps']),
    schedule=optimizer.schedule(settings, c['steps']),
    mesh=mesh,
    implementation=implementation,
    dataset=dataset,
  )


def prepare(given: Any, workdir: str) -> Job | None:
  """Checks all that can be checked before compiling, and reads the data.

  Returns None where the work directory holds the end of this very run.

  Raises:
    ValueError, TypeError, OSError: one line that names the offending values.
  """
  c = config.resolve(given)
  if '://' in str(workdir):
    raise ValueError(f'workdir={workdir} is no path: mount what it stands for')
  workdir = paths.absolute(workdir)
  if jax.process_index() == 0:
    lock.check(workdir)
  finished, _ = _earlier(c, workdir)
  if finished:
    return None
  mesh = _mesh(c)
  layout, said = parallel.layout(
    mesh, c['model']['router'].get('k', 1), **c['parallel']
  )
  m = c['model']
  gmm = ops.choose_gmm(
    None if m['gmm'] == 'auto' else m['gmm'],
    *(m['dtype'], m['D'], m['expert_F']),
  )
  if gmm == 'interpret' and mesh.size > 1:
    raise ValueError(
      "model.gmm='interpret' runs on one device: jax's interpreter cannot be"
      f' typed inside a shard_map; the mesh has {mesh.size}'
    )
  optimizer.Config(**c['optimizer'])
  guard.Config(**c['guard'])
  objectives.get(**c['objective'])
  source = dataset.source(c['data']['source'])
  data_config = source.Config(**c['data'])
  if c['model']['name'] != source.model:
    raise ValueError(
      f'data.source={c["data"]["source"]!r} is for the model'
      f' {source.model!r}, model.name is {c["model"]["name"]!r}'
    )
  fields = {**c['model'], 'gmm': gmm}
  # Before the time that the data takes, with sizes that stand for its own.
  smallest = models.get(source.model).smallest(c['model'])
  models.abstract(models.initializer({**fields, **smallest}, layout))
  found = source.load(data_config, c['seq_len'])
  c['corpus_sha256'] = found.sha256
  _, changed = _earlier(c, workdir)  # now with the corpus
  init = models.initializer({**fields, **found.sizes}, layout)
  model = models.abstract(init)
  if found.streams and (
    not hasattr(model, 'init_stream_cache')
    or model.init_stream_cache(1) is None
  ):
    raise ValueError(
      f"data.order='stream' needs a cache: model.name={c['model']['name']!r},"
      f' model.attention.name={c["model"]["attention"]["name"]!r} and'
      f' model.block={c["model"]["block"]!r} have none; decoder,'
      ' adaptive_span and momentum_lm have one'
    )
  _check_groups(c, model)
  _check_writing(c, model)
  unweighted = _check_router(c, model)
  if c['init_from'] and not checkpoint.steps(workdir):
    _check_beginning(c, model, found)
  job = assemble(
    c,
    workdir=workdir,
    mesh=mesh,
    init=init,
    implementation={'gmm': ops.told(gmm), 'strategy': said},
    dataset=found,
    changed=changed,
    unweighted=unweighted,
  )
  job.train_batches(), job.eval_batches()  # is there enough for one batch?
  return job


def _routers(model):
  modules = (module for _, module in nnx.iter_modules(model))
  return [m for m in modules if isinstance(m, routers.Router)]


def _check_writing(c, model):
  """ValueError, one line, if BLEU is asked of a router that cannot write."""
  lines, name = c['data'].get('bleu_lines'), c['model']['router']['name']
  if lines and not all(router.writes for router in _routers(model)):
    raise ValueError(
      f'data.bleu_lines={lines}: the router {name!r} looks at later tokens, and'
      ' cannot write translations; data.bleu_lines=0 asks for none'
    )


def _check_groups(c, model):
  """ValueError, one line, if a microbatch or its rows cut a router's group."""
  L = getattr(model.c, 'tokens', c['seq_len'])
  rows = c['batch_size'] // c['optimizer']['accumulate']
  for router in _routers(model):
    group = router.group
    if group is None:
      continue
    if L % group and (group % L or rows % (group // L)):
      raise ValueError(
        f'model.router.group={group} does not divide the {L} tokens of a row,'
        f' nor is it whole rows that divide the {rows} of a microbatch'
        f' (batch_size={c["batch_size"]} /'
        f' optimizer.accumulate={c["optimizer"]["accumulate"]})'
      )


def _check_router(c, model):
  """The losses that the router reports and that have no weight.

  Raises:
    ValueError: one line; what the router refuses when it is called, or the
      weight of a loss that it does not report.
  """
  reported = frozenset()
  if _routers(model):
    m, options = c['model'], dict(c['model']['router'])
    reported = routers.losses(
      routers.get(options.pop('name')),
      m['D'],
      m['E'] * m['layers_per_pool'],
      options,
      steps=c['steps'],
      rows=c['batch_size'] // c['optimizer']['accumulate'],
      L=getattr(model.c, 'tokens', c['seq_len']),
      dtype='bfloat16' if m['dtype'] == 'bfloat16' else 'float32',
    )
  return config.check_losses(c, reported)


def _check_beginning(c, model, found):
  """ValueError, one line, if init_from has no weights of this very model."""
  try:
    folder = paths.absolute(c['init_from'])
    wrong = _wrong_beginning(folder, c, model, found)
  except (ValueError, OSError) as error:
    wrong = str(error)
  if wrong:
    raise ValueError(f'init_from={c["init_from"]}: {wrong}')


def _wrong_beginning(folder, c, model, found):
  differ = config.another_model(config.saved(folder), c)
  if differ:
    return f'it holds another model: {", ".join(differ)}'
  if hasattr(found, 'tokenizer'):
    path, given = folder / 'tokenizer.json', c['data']
    theirs = tokenizer.load(path, given.get('separator', ''))
    if theirs.fingerprint() != found.tokenizer.fingerprint():
      return (
        f'data.tokenizer={given.get("tokenizer", "bpe")!r} has another'
        f' vocabulary than {path}'
      )
  steps = checkpoint.steps(folder)
  if not steps:
    return 'it has no checkpoint'
  there = checkpoint.shapes(folder, steps[-1])
  there = {
    name: f'{np.dtype(a.dtype)}{list(a.shape)}'
    for name, a in there.items()
    if name.startswith(('params.', 'router_state.'))
  }
  here = _shapes(c, model)
  for name in {**here, **there}:
    has, needs = (of.get(name, 'nothing') for of in (there, here))
    if has != needs:
      return f'{name} is {has} there, and {needs} in this run'
  return ''


def _shapes(c, model):
  """'float32[8, 2]' of each leaf, by its name in a checkpoint."""
  params, router_state = models.split(model)
  if c['model']['dtype'] == 'float64':
    wide = lambda a: jax.ShapeDtypeStruct(a.shape, np.float64)
    params = jax.tree.map(wide, params)
  own = {'params': params, 'router_state': router_state}
  return {
    checkpoint.name(path): f'{np.dtype(a.dtype)}{list(a.shape)}'
    for path, a in jax.tree.leaves_with_path(own)
  }


def _mesh(c):
  """The mesh; ValueError if it does not divide what is laid on it."""
  mesh = parallel.mesh(c['mesh'])
  c['mesh'] = dict(mesh.shape)  # without a -1
  if jax.process_count() > 1 and mesh.size < jax.device_count():
    raise ValueError(
      f'a mesh of {mesh.size} devices leaves some idle: {jax.process_count()}'
      f' processes have {jax.device_count()}'
    )
  parallel.check(
    c['mesh'],
    batch_size=c['batch_size'],
    accumulate=c['optimizer']['accumulate'],
    E=c['model']['E'],
    F=c['model']['expert_F'],
  )
  return mesh


def check_place(job: Job) -> None:
  """ValueError, one line, if the work directory holds another run by now."""
  _earlier(job.config, job.workdir)


def _earlier(c, workdir):
  """(whether the run there has finished, what differs and may).

  Raises:
    ValueError: what is in the work directory is not this run.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'the work directory {workdir} is a file')
  if not (workdir / 'config.json').exists():
    left = [
      n for n in ('metrics.jsonl', 'checkpoints') if (workdir / n).exists()
    ]
    if left:
      raise ValueError(f'{workdir} holds {left[0]} but no config.json')
    return False, []
  try:
    old = json.loads((workdir / 'config.json').read_text())
  except ValueError as error:
    raise ValueError(f'{workdir}/config.json is no JSON: {error}') from None
  old = {k: v for k, v in old.items() if k in c}  # c may lack the corpus yet
  mathematics, changed = config.differences(old, c)
  if mathematics:
    raise ValueError(
      f'{workdir} holds another run; these keys differ: '
      + ', '.join(mathematics)
    )
  summary = workdir / 'summary.json'
  done = json.loads(summary.read_text()) if summary.exists() else {'steps': 0}
  finished = done['steps'] >= c['steps']
  if finished and done['eval_loss'] is None:
    raise ValueError(f'{workdir}: {NOT_FINITE}')
  return finished, changed + _jump(old, c, workdir)


def _jump(old, c, workdir):
  """What to tell where other steps make the learning rate jump."""
  steps = checkpoint.steps(workdir)
  if not steps or old['steps'] == c['steps']:
    return []
  settings = optimizer.Config(**c['optimizer'])
  done = max(steps)
  before, after = (
    float(optimizer.schedule(settings, n)(done))
    for n in (old['steps'], c['steps'])
  )
  if math.isclose(before, after, rel_tol=1e-3):
    return []
  return [
    f'learning rate of step {done + 1}: {before:.3g} -> {after:.3g}, as the'
    f' schedule is now of {c["steps"]} steps'
  ]
