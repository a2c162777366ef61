"""The decoder in a work directory, opened without its training data.

A work directory is only read, whether its run has ended or not.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax

from moe_jax import config, models, ops, parallel, paths
from moe_jax.data import tokenizer
from moe_jax.training import checkpoint, train_step
from moe_jax.training.jobs import assemble, Job

MODEL = 'decoder'  # what reads text


def load(workdir: str, sizes: dict[str, int] | None = None) -> Job:
  """The decoder in a work directory, without its training data.

  Args:
    sizes: of the mesh; None is one device.

  Raises:
    ValueError, OSError: one line; there is no run, or none of a decoder, or it
      does not fit the mesh.
  """
  folder = paths.absolute(workdir)
  c = config.saved(folder)
  try:
    return _job(folder, c, sizes or {})
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'{folder}/config.json is not of this version: {error!r}'
    ) from error


def _job(folder, c, sizes):
  values = dict(c['model'])
  sides = values['D'], values['expert_F']
  values['gmm'] = ops.choose_gmm(None, values['dtype'], *sides)
  if values['name'] != MODEL:
    raise ValueError(
      f'{folder} holds a {values["name"]}; routing is recorded of a {MODEL}'
      ' alone'
    )
  tok, values['V'] = _vocabulary(folder, c)
  sizes = {**dict.fromkeys(parallel.AXES, 1), **sizes}
  one = math.prod(sizes.values()) == 1
  mesh = parallel.mesh(sizes, jax.devices()[:1] if one else None)
  layout, said = parallel.Layout(), 'local'
  if not one:
    parallel.check(
      sizes,
      batch_size=mesh.size,
      accumulate=1,
      E=values['E'],
      F=values['expert_F'],
    )
    k = c['model']['router'].get('k', 1)
    layout, said = parallel.layout(mesh, k, strategy='auto', buffer_factor=None)
  return assemble(
    c,
    workdir=folder,
    mesh=mesh,
    init=models.initializer(values, layout),
    implementation={'strategy': said},
    dataset=_Unread(tok, c['data']['order'] == 'stream'),
  )


def published(c: dict[str, Any]) -> bool:
  """Whether the weights in a work directory were imported."""
  return not c['corpus_sha256']


def ends(folder: pathlib.Path) -> list[int]:
  """The ids that end a text of a published model, by the files beside it.

  Those in generation_config.json, else those in config.json, maybe none.

  Raises:
    ValueError: one of these files is damaged.
  """
  for name in ('generation_config.json', 'config.json'):
    path = folder / name
    try:
      values = json.loads(path.read_text(encoding='utf-8'))
      found = values.get('eos_token_id')
    except FileNotFoundError:
      continue
    except (ValueError, AttributeError) as error:
      raise ValueError(f'{path} is damaged: {error!r}') from None
    ids = found if isinstance(found, list) else [found]
    ids = [i for i in ids if i is not None]
    if any(not isinstance(i, int) for i in ids):
      raise ValueError(f'{path}: eos_token_id={found!r} is no id')
    if ids:
      return ids
  return []


def _vocabulary(folder, c):
  """The tokenizer, and how many ids the model has.

  Published weights may have more than their tokenizer, and come without one.
  """
  path, padded_size = folder / 'tokenizer.json', c['data']['padded_size']
  if published(c) and not path.exists():
    return None, padded_size
  tok = tokenizer.load(path, c['data']['separator'])
  return tok, padded_size or tok.vocab_size


class _Unread(NamedTuple):
  """What a run's data tells when they are not read."""

  tokenizer: tokenizer.Tokenizer | None
  streams: bool


def checkpoints(job: Job) -> list[int]:
  """The steps of its checkpoints; ValueError if there is none."""
  steps = checkpoint.steps(job.workdir)
  if not steps:
    raise ValueError(f'{job.workdir} has no checkpoint')
  return steps


def restore(job: Job, step: int) -> train_step.Weights:
  """The weights of a checkpoint, which is checked as a run's own.

  Raises:
    OSError: it is gone or damaged.
  """
  with train_step.precision(job):
    return checkpoint.read(job.workdir, step, train_step.abstract_weights(job))
