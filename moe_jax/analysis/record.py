"""What the routers of a trained run decide about texts, recorded.

A work directory is only read, whether its run has ended or not.
"""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import (
  models,
  objectives,
  paths,
  routers,
)
from moe_jax.analysis import measures, page
from moe_jax.data import corpus, dataset, packing
from moe_jax.report import metrics
from moe_jax.training import saved_run, train_step
from moe_jax.training.jobs import Job

HELD_OUT = 'held out'  # the name of the run's own text


def routed(workdir: str) -> Job:
  """The decoder in a work directory, on one device.

  Raises:
    ValueError, OSError: as of `saved_run.load`; or no layer has a router.
  """
  job = saved_run.load(workdir)
  if not job.model.trunk.segments():
    raise ValueError(
      f'{job.workdir} holds a dense model: no layer has a router'
    )
  return job


def streams(job: Job, given: list[str]) -> dict[str, np.ndarray]:
  """int32 [N], packed, of each text; of none given, what the run held out.

  A text is whole, its documents in the order in which they stand.

  Args:
    given: 'GLOB' or 'NAME=GLOB', as data.path has them, of .jsonl files with
      '#FIELD' behind.

  Raises:
    ValueError: a text cannot be read or has the name of another one.
  """
  if job.dataset.tokenizer is None:
    raise ValueError(f'{job.workdir} has no tokenizer.json to read texts with')
  if not given:
    return {HELD_OUT: _held_out(job)}
  found = {}
  for argument in given:
    name, path, field = _parsed(argument)
    if name in found:
      raise ValueError(f'two texts are named {name!r}: {", ".join(given)}')
    documents = corpus.read(path, field, '--data')
    ids = job.dataset.tokenizer.encode([d.text for d in documents])
    found[name] = _packed(job, name, ids)
  return found


def _packed(job, name, documents):
  """One stream; what a published model reads begins as its prompts do."""
  tok = job.dataset.tokenizer
  marks = tok.marks() if saved_run.published(job.config) else []
  first, *more = marks or [tok.separator]
  for i, ids in enumerate(documents, 1):
    if first in ids:
      raise ValueError(
        f'document {i} of the text {name!r} holds the id {first}, with which'
        ' documents begin'
      )
  more = np.array(more, np.int32)
  return packing.pack([np.concatenate([more, ids]) for ids in documents], first)


def _parsed(argument):
  """(name, glob, field); what exists as it is written is a path alone."""
  first, slash, _ = paths.text(argument).partition('/')
  if os.path.isfile(paths.text(argument)):
    return argument, argument, ''
  parts = re.fullmatch(r'(?s)(?:([\w .-]+)=)?(.*)', argument)
  name, glob = parts.groups()
  if slash and os.path.isdir(first):  # a folder of that name, k=1/a.txt
    name, glob = None, argument
  fielded = re.fullmatch(r'(?s)(.+?\.jsonl(?:\.gz|\.xz)?)#(.+)', glob)
  path, field = fielded.groups() if fielded else (glob, '')
  return name or argument, path, field


def _held_out(job):
  c = job.config
  if saved_run.published(c):
    raise ValueError(
      f'{job.workdir} holds published weights, no run that held out a text;'
      ' name one with --data'
    )
  source = dataset.source(c['data']['source'])
  found = source.load(source.Config(**c['data']), c['seq_len'])
  if found.sha256 != c['corpus_sha256']:
    raise ValueError(
      f'what the run in {job.workdir} held out is not known: its corpus has'
      ' changed since; name a text with --data'
    )
  return found.eval_N


def read(
  job: Job, streams: dict[str, np.ndarray], limit: int
) -> tuple[measures.Tokens, list[dict[str, np.ndarray]]]:
  """The tokens of packed texts, and the batches that have them in that order.

  Of each text whole batches of whole rows, spread evenly over it, `limit`
  tokens at the most. A batch is as large as in training, if the shortest text
  and the limit fill it; none has padding.

  Raises:
    ValueError: a text, or the limit, is less than a row.
  """
  L = job.config['seq_len']
  rows = {name: (len(ids) - 1) // L for name, ids in streams.items()}
  for name, ids in streams.items():
    if not rows[name]:
      raise ValueError(
        f'the text {name!r} has {len(ids) - 1} tokens; a row has {L}'
      )
  if limit < L:
    raise ValueError(f'--tokens={limit} is less than a row, which has {L}')
  B = min(job.config['batch_size'], limit // L, *rows.values())
  batches, text_T = [], []
  for n, (name, ids) in enumerate(streams.items()):
    have, want = (number // B * B for number in (rows[name], limit // L))
    share = min(1.0, (want - 0.5) / have)  # whole batches: rounded up
    found = [*packing.eval_batches(ids[: have * L + 1], B, L, share=share)]
    batches += found
    text_T.append(np.full(len(found) * B * L, n, np.int32))
  of = lambda name: np.concatenate([b[name].reshape(-1) for b in batches])
  id_T = of('ids_BxL')
  tokens = measures.Tokens(
    id_T=id_T,
    position_T=of('pos_BxL'),
    place_T=np.arange(len(id_T), dtype=np.int32) % L,
    text_T=np.concatenate(text_T),
    texts=list(streams),
  )
  return tokens, batches


def recorder(job: Job) -> Callable[..., dict[str, Any]]:
  """(state, batch, index) -> what the routers decide in an evaluation.

  A row of a stream begins anew: it is without the cache of the rows before it.
  """

  def routed(state, batch, index):
    batch = {**batch, 'row_B': batch['row_B'] + index * len(batch['row_B'])}
    model = models.bind(job.model, state.params, state.router_state)
    ctx = routers.context(
      batch,
      jax.random.key(jnp.uint32(job.config['seed'])),
      state.step,
      train=False,
      microbatch=index,
      steps=job.config['steps'],
    )
    logits_BxLxV, aux = model(batch, ctx)
    nll_BxL = objectives.cross_entropy(logits_BxLxV, batch['target_BxL'])
    return {'nll_BxL': nll_BxL, 'aux': aux.select('plan', 'route', 'entropy')}

  return jax.jit(routed)


def record(
  run: Callable[..., dict[str, Any]],
  state: train_step.Weights,
  batches: list[dict[str, np.ndarray]],
) -> measures.Routing:
  """The routing of all tokens of the batches, by a `recorder`."""
  parts = []
  for index, batch in enumerate(batches):
    found = jax.device_get(run(state, batch, jnp.int32(index)))
    parts.append((found['nll_BxL'].reshape(-1), _steps(found['aux'])))
  nlls, steps = zip(*parts, strict=True)
  steps = [_joined(of_step) for of_step in zip(*steps, strict=True)]
  K = max(step['expert_TxK'].shape[1] for step in steps)
  whole = lambda name, blank: np.stack(
    [_widened(step[name], K, blank) for step in steps]
  )
  return measures.Routing(
    step=int(state.step),
    names=[step['name'] for step in steps],
    experts=[step['E'] for step in steps],
    expert_SxTxK=whole('expert_TxK', -1),
    kept_SxTxK=whole('kept_TxK', False),
    gate_SxTxK=whole('gate_TxK', 0),
    entropy_S=np.array([step['entropy'] for step in steps]),
    nll_T=np.concatenate(nlls).astype(np.float32),
  )


def _steps(aux):
  """A dict for each routed step of a model's aux, from below."""
  steps = []
  for layer, iterations in enumerate(aux.layers()):
    for i, found in enumerate(iterations):
      name = f'MoE layer {layer}'
      name += f', iteration {i}' if len(iterations) > 1 else ''
      entropy, plan = float(found['entropy']), found['plan']
      choices = plan.choices(np.asarray(found['route']))
      steps.append({'name': name, 'E': plan.E, 'entropy': entropy, **choices})
  return steps


TYPES = {'expert_TxK': np.int16, 'kept_TxK': bool, 'gate_TxK': np.float32}


def _joined(parts):
  """One step from those of the batches."""
  K = max(part['expert_TxK'].shape[1] for part in parts)
  blanks = {'expert_TxK': -1, 'kept_TxK': False, 'gate_TxK': 0}
  joined = {
    name: np.concatenate(
      [_widened(part[name].astype(TYPES[name]), K, blank) for part in parts]
    )
    for name, blank in blanks.items()
  }
  entropy = np.mean([part['entropy'] for part in parts])
  return {**parts[0], **joined, 'entropy': float(entropy)}


def _widened(a_TxK, K, blank):
  pad = (0, 0), (0, K - a_TxK.shape[1])
  return np.pad(a_TxK, pad, constant_values=blank)


PAGE, NUMBERS, ARRAYS = 'routing.html', 'routing.json', 'routing.npz'


def write(workdir: str, given: list[str], limit: int, out: str) -> pathlib.Path:
  """Records the routing of texts by every checkpoint of a run; says what it is.

  Leaves in the folder `out` a page, its numbers and, of the newest checkpoint,
  the arrays of analysis.Tokens and analysis.Routing. Returns the page's path.

  Raises:
    ValueError, OSError: one line; nothing was written.
  """
  job, folder = routed(workdir), paths.absolute(out)
  _check_place(folder)
  saved = saved_run.checkpoints(job)
  texts = streams(job, given)
  tokens, batches = read(job, texts, limit)
  for name, number in zip(texts, np.bincount(tokens.text_T), strict=True):
    print(f'{name}: {number:,} of {len(texts[name]) - 1:,} tokens', flush=True)
  run, routing, changes = recorder(job), None, []
  with train_step.precision(job):
    for step in saved:
      old, routing = routing, record(run, saved_run.restore(job, step), batches)
      if old is not None:
        changes.append(measures.change(old, routing))
      print(
        f'step {step}: {routing.nll_T.mean():.3f} nats a token'
        f' over {len(tokens.id_T):,} tokens',
        flush=True,
      )
  steps = measures.study(tokens, routing)
  values = {
    'made_by': MARK,
    'checkpoint': routing.step,
    'texts': tokens.texts,
    'tokens': np.bincount(tokens.text_T).tolist(),
    'steps': [measures.numbers(step) for step in steps],
    'changes': [metrics.jsonable(change._asdict()) for change in changes],
  }
  name = job.workdir.name
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory('.part', dir=folder) as place:
    part = pathlib.Path(place)
    (part / NUMBERS).write_text(json.dumps(values, indent=1) + '\n')
    html = page.page(name, tokens, routing, steps, changes)
    (part / PAGE).write_text(html, encoding='utf-8')
    fields = {
      field.name: np.asarray(getattr(of, field.name))
      for of in (tokens, routing)
      for field in dataclasses.fields(of)
    }
    np.savez_compressed(part / ARRAYS, **fields)
    for file in (NUMBERS, ARRAYS, PAGE):  # the first says whose they are
      (part / file).replace(folder / file)
  return folder / PAGE


MARK = 'moe-analyze'


def _check_place(folder):
  """ValueError if files would be overwritten that are not of this command."""
  try:
    if json.loads((folder / NUMBERS).read_text())['made_by'] == MARK:
      return
  except (OSError, ValueError, KeyError, TypeError):
    pass
  for name in (PAGE, NUMBERS, ARRAYS):
    if (folder / name).exists():
      raise ValueError(
        f'{folder / name} is not of moe-analyze, and would be overwritten;'
        ' choose another --out'
      )
