"""Every knob, its default and its meaning; the only importer of ml_collections.

A config file starts from `default()`, changes what its claim is about, and
returns it. On a command line `--config.model.E=16` changes one value, and
`--config.model.router.name=switch` the whole choice.
"""

import difflib
import inspect
import json
import pathlib
import runpy
import sysconfig
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from moe_jax import (
  attention,
  models,
  objectives,
  parallel,
  paths,
  ranges,
  residuals,
  routers,
)
from moe_jax.data import dataset
from moe_jax.optim import guard, optimizer

# May differ when a run is continued: they do not change the mathematics.
FREE = (
  'log_every',
  'eval_every',
  'checkpoint_every',
  'keep_checkpoints',
  'keep_every',
  'description',
  'data.eval_bytes',
  'data.eval_lines',
  'data.eval_images',
  'data.cache_dir',
  'model.gmm',
  'model.remat',
  'mesh.',
  'parallel.',
)

# Of a model: may differ from one that has the same parameters, and means the
# same by them.
TRAINING = (
  *('init', 'embed_std', 'dropout', 'dtype', 'remat', 'gmm'),
  *('router.init', 'router.capacity', 'router.group', 'router.bias_rate'),
)


class Run:
  """What stands at the top of a config, and in no part of it."""

  description: str
  init_from: str
  steps: ranges.Count
  batch_size: ranges.Count
  seq_len: Annotated[int, ranges.Within('[2, 2^31)')]
  seed: ranges.Seed
  log_every: ranges.Natural
  eval_every: ranges.Natural
  checkpoint_every: ranges.Natural
  keep_checkpoints: ranges.Count
  keep_every: ranges.Natural


def default() -> ml_collections.ConfigDict:
  """The config that all others start from."""
  c = ml_collections.ConfigDict()
  c.description = ''  # one line for the report
  c.init_from = ''  # a work directory, whose newest weights are the first here

  c.steps = 1000  # optimiser steps
  c.batch_size = 32  # sequences per step, over all devices
  c.seq_len = 256  # tokens per sequence
  c.seed = 0  # parameters, data order and random routing

  # 0 turns each off; the last evaluation and checkpoint are always made.
  c.log_every = 10
  c.eval_every = 0
  c.checkpoint_every = 0
  c.keep_checkpoints = 2  # the newest
  c.keep_every = 0  # and for ever those of every so many steps; 0: none

  c.data = source('python_stdlib')
  c.model = model('decoder')
  c.objective = choice('objective', 'next_token', losses=dict(LOSSES))
  c.optimizer = dict(
    name='adamw',  # or muon: orthogonal momentum for matrices
    learning_rate=3e-3,  # at its highest
    schedule='cosine',  # or constant, inverse_sqrt, wsd
    warmup=0.02,  # part of the steps in which the rate rises
    decay=0.2,  # wsd: part of the steps in which the rate falls
    end=0.1,  # cosine, wsd: the last rate, as a part of the highest
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,  # of matrices; by adamw of embeddings and heads too
    clip=1.0,  # the gradient's norm is at most this; 0 does not clip
    moments='params',  # dtype of the moments: of the parameters, or bfloat16
    accumulate=1,  # microbatches that a batch is cut into
  )
  # Steps with bad numbers, see moe_jax/optim/guard.py.
  c.guard = dict(
    spike=0.0,  # a loss so many deviations above the mean is bad; 0: none is
    skips=5,  # so many in a row, and the run goes back to a checkpoint
    rollbacks=2,  # so often, before it stops
  )
  # Devices along each axis, see moe_jax/parallel.py.
  # One may be -1: as many as the others leave.
  c.mesh = dict(data=1, fsdp=1, expert=1, tensor=1)
  c.parallel = dict(
    # How rows meet weights: local, fused, gather, all_to_all, ragged.
    strategy='auto',
    # Places for rows, times those that perfect balance needs; None: for all.
    buffer_factor=config_dict.placeholder(float),
  )
  return c


# Weights of what routers report: 1 at perfect balance (z apart). Of these alone
# one that the router does not report counts nothing; others are refused then.
LOSSES = {'balance': 0.01, 'sequence_balance': 0.0, 'z': 0.001}

# What every model's layers have; moe_jax/trunk.py builds them.
LAYERS = dict(
  N=4,  # layers
  D=256,  # width
  H=4,  # query heads
  F=1024,  # hidden width of a dense layer
  E=8,  # experts that a MoE layer owns
  expert_F=512,  # hidden width of an expert
  shared_F=0,  # of the shared expert, which sees every token; 0 has none
  pattern='m',  # of the layers, repeated, cut off at N: d is dense, m is MoE
  first_dense=0,  # dense layers before the pattern begins
  layers_per_pool=1,  # MoE layers that share their experts (ReXMoE)
  ragged_pool=False,  # the last pool may have fewer layers
  iterations=1,  # (router, same experts) steps in a layer (CoE)
  routing='each',  # a router an iteration; or shared, or once: the first plan
  # How their answers join: replace, add, init or upcycle.
  inner_residual='replace',
  block='pre',  # where norms and residuals sit, see moe_jax/blocks/
  norm='rms',  # or layer
  eps=1e-6,  # of the norms
  activation='swiglu',  # or geglu, gelu, relu
  bias=False,  # in the feed-forwards, and in a head of its own
  init='lecun',  # of weights, see moe_jax/init.py
  dropout=0.0,  # of embeddings and of every layer's answers
  dtype='float32',  # of the computation; or bfloat16, float64
  remat=False,  # recompute layers in the backward pass, not their routing
  gmm='auto',  # grouped matmul, see ops.gmm; auto chooses for the platform
)

# What a model has beside its layers, and what it changes in them.
MODELS = {
  'decoder': dict(
    tied=True,  # the output head is the embedding
    embed_std=0.02,  # of the initial embedding
  ),
  'translator': dict(
    encoder_N=4,  # layers of the encoder; N is the decoder's
    embed_std=0.02,
    attention='full',
    norm='layer',
    activation='relu',
    bias=True,
  ),
  'classifier': dict(
    patch=2,  # rows and columns of a token
    attention='full',
    norm='layer',
    activation='gelu',
    bias=True,
  ),
}


def model(name: str, **changes) -> ml_collections.ConfigDict:
  """A model and all its fields, with these changes."""
  own = _in(MODELS, 'model', name)
  c = ml_collections.ConfigDict({'name': name, **LAYERS})
  c.router = router('topk')
  c.residual = choice('residual', 'plain')
  c.attention = choice('attention', own.get('attention', 'gqa'))
  for key, value in {**own, 'attention': c.attention, **changes}.items():
    c[key] = value
  return c


def begin(workdir: str) -> ml_collections.ConfigDict:
  """The config of a run that goes on from the weights in a work directory.

  The model, tokenizer, data and objective are those that are there; of
  published weights the data have no path yet.

  Raises:
    ValueError: there is no config that can be read.
  """
  folder = paths.absolute(workdir)
  old = saved(folder)
  c = default()
  c.init_from, c.seq_len = str(folder), old['seq_len']
  sections = 'router', 'attention', 'residual'
  parts = {key: choice(key, **old['model'][key]) for key in sections}
  c.model = model(**{**old['model'], **parts})
  c.objective = choice('objective', **old['objective'])
  data = {k: v for k, v in old['data'].items() if k != 'source'}
  if data.get('tokenizer', 'bytes') != 'bytes':
    data['tokenizer'] = str(folder / 'tokenizer.json')
  c.data = source(old['data']['source'], **data)
  return c


def saved(folder: pathlib.Path) -> dict[str, Any]:
  """The config.json of a work directory; ValueError if it has none."""
  path = folder / 'config.json'
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(
      f'{folder} has no config.json: it holds no run of moe-train'
    ) from None
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None


def attend(name: str, **options) -> ml_collections.ConfigDict:
  """A kind of attention and all its options."""
  return choice('attention', name, **options)


def router(name: str, **options) -> ml_collections.ConfigDict:
  """A router and all its options, so that a command line can set each."""
  return choice('router', name, **options)


def source(name: str, **options) -> ml_collections.ConfigDict:
  """Where the data comes from, and all that can be said about it."""
  c = choice('source', name, **options)
  c.source = c.name
  del c.name
  return c


class Choice(NamedTuple):
  """A kind of part: its names, and what one stands for."""

  names: Callable[[], Iterable[str]]
  part: Callable[[str], Callable[..., Any]]  # its options are the arguments


CHOICES = {
  'router': Choice(routers.names, lambda name: routers.get(name).__init__),
  'attention': Choice(
    attention.names, lambda name: attention.get(name).__init__
  ),
  'residual': Choice(residuals.names, residuals.rule),
  'objective': Choice(objectives.names, objectives.objective),
  'source': Choice(
    lambda: dataset.SOURCES, lambda name: dataset.source(name).Config
  ),
}
# Arguments that others give.
OWN = (
  *('self', 'D', 'E', 'H', 'rngs', 'scheme', 'out_scale'),
  *('losses', 'source', 'max_length'),
)
SECTIONS = {
  'model.router': 'router',
  'model.attention': 'attention',
  'model.residual': 'residual',
  'objective': 'objective',
}


def choice(kind: str, name: str, **options) -> ml_collections.ConfigDict:
  """A named thing with all its options: {'name': name, option: value, ...}.

  Raises:
    ValueError: there is no such name or option; one line with the nearest.
  """
  part = CHOICES[kind].part(name)
  parameters = inspect.signature(part).parameters.values()
  known = {p.name: p for p in parameters if p.name not in OWN}
  said = ranges.options(part)
  c = ml_collections.ConfigDict({'name': name})
  for key, parameter in known.items():
    value = options.get(key, parameter.default)
    if value is None and key in said:  # that a command line can set
      value = config_dict.placeholder(said[key].kind)
    c[key] = value
  for key, value in options.items():
    if key == 'losses':
      c[key] = value
    elif key not in known:
      text = unknown(key, known, f'{kind} {name} has no option')
      raise ValueError(
        f"{text}; to switch, have config.{kind}('{name}') in the config file"
      )
  return c


# Keys that name a choice, and the section that has its options.
SWITCHES = {
  'model.name': 'model',
  'data.source': 'data',
  **{f'{path}.name': path for path in SECTIONS},
}


def read(file: str) -> ml_collections.ConfigDict:
  """What get_config() of a file returns.

  Args:
    file: as `find` takes it; what follows a colon is the argument of
      get_config.
  """
  path, *argument = file.split(':', 1)
  return runpy.run_path(find(path))['get_config'](*argument)


def find(name: str) -> str:
  """The path of a config file, or of one that ships with moe_jax.

  'tiny' is configs/tiny.py, 'paper/coe' is configs/paper/coe.py.

  Raises:
    ValueError: there is no such file; one line with the nearest name.
  """
  if pathlib.Path(name).is_file():
    return name
  shipped = {}
  for folder in SHIPPED:
    for path in sorted(folder.rglob('*.py')):
      key = path.relative_to(folder).with_suffix('').as_posix()
      shipped.setdefault(key, str(path))
  if name in shipped:
    return shipped[name]
  text = f'--config={name}: no such file; among those that ship none is'
  raise ValueError(unknown(pathlib.Path(name).stem, shipped, text))


# Of a checkout, and of a wheel.
SHIPPED = (
  pathlib.Path(__file__).parents[1] / 'configs',
  pathlib.Path(sysconfig.get_path('data')) / 'share/moe_jax/configs',
)


def switch(c: ml_collections.ConfigDict, chosen: Mapping[str, str]) -> None:
  """Puts these choices in the place of those that the config has.

  The options of a choice that is replaced fall away: the new one has its
  defaults. Losses keep their weights.

  Args:
    chosen: {'model.router.name': 'switch', ...}, keys of SWITCHES.

  Raises:
    ValueError: there is no such choice; one line with those that there are.
  """
  for key in SWITCHES:  # a model before its parts
    if key in chosen:
      _switch(c, key, chosen[key])


def _switch(c, key, name):
  *outer, last = SWITCHES[key].split('.')
  section = c[outer[0]] if outer else c
  if section[last][key.split('.')[-1]] == name:
    return
  if key == 'model.name':
    new = model(name)
  elif key == 'data.source':
    new = source(name)
  else:
    losses = section[last].get('losses')
    options = {} if losses is None else {'losses': losses.to_dict()}
    new = choice(SECTIONS[SWITCHES[key]], name, **options)
  del section[last]
  section[last] = new


def _in(table: dict[str, Any], kind: str, name: str) -> Any:
  if name not in table:
    raise ValueError(f'no {kind} {name!r}; there are {", ".join(table)}')
  return table[name]


def parts(c: dict[str, Any]) -> dict[str, Callable[..., Any]]:
  """{'model.router': its __init__, ...}: what has the options of a config.

  Args:
    c: plain values; each section that is a choice has its name.
  """
  found = {'': Run, 'model': models.get(c['model']['name']).Config}
  found['data'] = CHOICES['source'].part(c['data']['source'])
  for path, kind in SECTIONS.items():
    found[path] = CHOICES[kind].part(_section(c, path)['name'])
  found['optimizer'], found['guard'] = optimizer.Config, guard.Config
  found['mesh'], found['parallel'] = parallel.Sizes, parallel.layout
  return found


class Told(NamedTuple):
  """What `moe-options` tells of an option."""

  default: Any
  allowed: ranges.Option | None


def every() -> dict[str, dict[str, Told]]:
  """{'model.router topk': {'k': Told(2, int in [1, 2^31)), ...}, ...}

  Every option of every part there is.
  """
  c = default().to_dict()
  found = {'run': _told(Run, {k: c[k] for k in Run.__annotations__})}
  for title, part in parts(c).items():
    if title in c and title not in ('data', *SECTIONS, 'model'):
      found[title] = _told(part, c[title])
  for name in MODELS:
    own = {**LAYERS, **MODELS[name]}
    own.pop('attention', None)
    found[f'model {name}'] = _told(models.get(name).Config, own)
  for path, kind in {**SECTIONS, 'data': 'source'}.items():
    for name in CHOICES[kind].names():
      losses = {'losses': LOSSES} if kind == 'objective' else {}
      values = choice(kind, name, **losses).to_dict()
      del values['name']
      found[f'{path} {name}'] = _told(CHOICES[kind].part(name), values)
  return found


def _told(part, values):
  said = ranges.options(part)
  allowed = lambda key: said.get(key, said.get(f'{key.rpartition(".")[0]}.*'))
  return {key: Told(v, allowed(key)) for key, v in flat(values).items()}


def resolve(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as plain values, with the options of each choice filled in.

  Raises:
    ValueError: a key that default() lacks, or a value that cannot be; one
      line with the key, the value, and its range or the nearest known key.
  """
  values, known = c.to_dict(), default().to_dict()
  _check_whole(values, known)
  known['model'] = model(values['model'].get('name', '')).to_dict()
  known['data'] = source(values['data'].get('source', '')).to_dict()
  for path, kind in SECTIONS.items():
    options = dict(_section(values, path))
    name = options.pop('name', '')
    _section(values, path).update(choice(kind, name, **options).to_dict())
    last = path.split('.')[-1]
    outer = known['model'] if path.startswith('model.') else known
    outer[last] = choice(kind, name).to_dict()
  _check(values, flat(known))
  return values


def _section(c, path):
  for key in path.split('.'):
    c = c.get(key)
  return c


def _check_whole(values, known):
  """ValueError if a key of default() is not there, or is no section."""
  for key, value in known.items():
    if key not in values:
      raise ValueError(f'the config has no {key}; begin with config.default()')
    if isinstance(value, dict) and not isinstance(values[key], dict):
      raise ValueError(f'{key}={values[key]!r} is no section of keys')
  for path, kind in SECTIONS.items():
    section = _section(values, path)
    if not isinstance(section, dict):
      raise ValueError(
        f'{path}={section!r} is no section of keys;'
        f' config.choice({kind!r}, name) makes one'
      )
  losses = values['objective'].get('losses', {})
  if not isinstance(losses, dict):
    raise ValueError(f'objective.losses={losses!r} is no section of keys')


def _check(values, known):
  """ValueError for the first key or value that cannot be."""
  said = {}
  for path, part in parts(values).items():
    start = f'{path}.' if path else ''
    said.update({start + k: v for k, v in ranges.options(part).items()})
  for key, value in flat(values).items():
    section = key.rpartition('.')[0]
    option = said.get(key if key in known else f'{section}.*')
    if key not in known and option is None:
      raise ValueError(unknown(key, known))
    if option is not None:
      option.check(key, value)


def check_losses(c: dict[str, Any], reported: Collection[str]) -> list[str]:
  """The losses that the routers report and that have no weight.

  But for those of LOSSES, which a config has whatever its router is.

  Args:
    c: a resolved config.
    reported: the losses that the routers report.

  Raises:
    ValueError: a loss that the routers do not report has a weight.
  """
  weights = c['objective'].get('losses', {})
  name = c['model']['router']['name']
  for loss, weight in weights.items():
    if loss in LOSSES or loss in reported:
      continue
    known = sorted({*LOSSES, *reported, *routers.every_loss()})
    if loss not in known:
      text = 'objective.losses: no router reports a loss'
      raise ValueError(unknown(loss, known, text))
    if weight:
      raise ValueError(
        f'objective.losses.{loss}={weight}: the router {name!r} with its'
        ' options reports no such loss; reported are'
        f' {", ".join(sorted(reported)) or "none"}'
      )
  return sorted({*reported} - {*weights, *LOSSES})


def flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'model.E': 8, ...}"""
  out = {}
  for key, value in values.items():
    if isinstance(value, dict):
      out.update(flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out


def set_in(c: dict[str, Any]) -> dict[str, Any]:
  """{'model.E': 16, ...}: in what a resolved config is not as the defaults.

  Those of the choices that it has.
  """
  plain, own = default(), flat(c)
  before = flat(plain.to_dict())
  switch(plain, {key: own[key] for key in SWITCHES})
  known = flat(plain.to_dict()) | {key: before[key] for key in SWITCHES}
  return {k: v for k, v in own.items() if v != known.get(k, _NOTHING)}


_NOTHING = object()


def unknown(key: str, known: Any, text: str = 'unknown config key') -> str:
  """One line about a key that does not exist, with the nearest that does."""
  last = {k.split('.')[-1]: k for k in known}
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  near = near or [
    last[k] for k in difflib.get_close_matches(key.split('.')[-1], last, n=1)
  ]
  return f'{text} {key!r}' + (f'; the nearest is {near[0]!r}' if near else '')


def differences(
  old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[str], list[str]]:
  """What changed between two resolved configs: (mathematics, the rest).

  More `steps` belong to the rest.
  """
  old, new = flat(old), flat(new)
  mathematics, rest = [], []
  for key, text in _changes(old, new):
    more = key == 'steps' and new[key] > old[key]
    free = more or key.startswith(FREE)
    (rest if free else mathematics).append(text)
  return mathematics, rest


def another_model(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What keeps one model from having the other's parameters, of two configs."""
  changes = _changes(flat(old['model']), flat(new['model']))
  return [f'model.{text}' for key, text in changes if key not in TRAINING]


def _changes(old, new):
  """(key, 'key: old -> new') of two flat configs."""
  for key in sorted({*old, *new}):
    if old.get(key) != new.get(key):
      yield key, f'{key}: {old.get(key)!r} -> {new.get(key)!r}'
