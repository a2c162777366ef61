"""report.html: one self-contained file that shows what a run did."""

import itertools
import json
import math
import os
from typing import Any

import numpy as np

from moe_jax.report import document, figures, metrics

FILE = 'report.html'
HEAT_CELLS = 500_000  # of all heat maps together: bounds the file's size


def write(workdir: str) -> str:
  """Writes report.html from what the run left in `workdir`."""
  config = _load(workdir, 'config.json')
  summary = _load(workdir, 'summary.json')
  name = os.path.basename(os.path.abspath(workdir))
  path = os.path.join(workdir, FILE)
  metrics.replace(path, page(metrics.read(workdir), config, summary, name))
  return path


def page(
  lines: list[dict[str, Any]],
  config: dict[str, Any],
  summary: dict[str, Any],
  name: str,
) -> str:
  """The report as one HTML text: the same inputs give the same text."""
  lines = [{k: _finite(v) for k, v in x.items()} for x in lines]
  lines.sort(key=lambda x: x['step'])
  title = summary.get('config_description') or name
  sections = [
    _header(title, name, summary),
    _training(lines),
    _load_maps(lines, config),
    _router(lines, config),
    _config(config),
    _summary(summary),
  ]
  return document.page(title, sections)


def _load(workdir, name):
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def _big(x):
  return f'{x:,.0f}' if abs(x) < 1e6 else metrics.si(x)


TILES = (  # key of the summary, label, format
  ('eval_bits_per_byte', 'held-out bits/byte', '{:.3f}'.format),
  ('eval_accuracy', 'held-out accuracy', '{:.1%}'.format),
  ('eval_bleu', 'held-out BLEU', '{:.1f}'.format),
  ('eval_chrf', 'held-out chrF', '{:.1f}'.format),
  ('eval_loss', 'held-out loss', '{:.3f}'.format),
  ('initial_loss', 'initial loss', '{:.3f}'.format),
  ('steps', 'steps', _big),
  ('tokens', 'training tokens', _big),
  ('tokens_per_second', 'tokens per second', _big),
  ('wall_seconds', 'wall time', metrics.duration),
  ('params_total', 'parameters', _big),
  ('params_active', 'active per token', _big),
  ('expert_params', 'in experts', _big),
  ('flops_per_token', 'FLOPs per token', metrics.si),
)


def _header(title, name, summary):
  out = [
    f'<header><p class="kicker">moe_jax run · {document.esc(name)}</p>',
    f'<h1>{document.esc(title)}</h1>',
  ]
  if not summary:
    out.append(
      '<p class="note">There is no summary: the run has not finished.</p>'
    )
  tiles = [
    (label, '\u2013' if _number(summary[k]) is None else f(summary[k]))
    for k, label, f in TILES
    if k in summary
  ]
  if tiles:
    out.append(document.pairs('tiles', tiles))
  facts = [
    (k, _brief(summary[k]))
    for k in ('implementation', 'devices', 'versions')
    if summary.get(k)
  ]
  if facts:
    out.append(document.pairs('facts', facts))
  return '\n'.join(out) + '</header>'


def _training(lines):
  if not lines:
    return '<p class="note">There are no metrics.</p>'
  axis = figures.steps(lines)
  loss, evals = _points(lines, 'loss'), _points(lines, 'eval_loss')
  bits = _points(lines, 'eval_bits_per_byte')
  smooth = _smooth(loss)
  few = len(evals) <= 60
  curves = [
    figures.Series('training', loss, faint=bool(smooth), said=not smooth),
    figures.Series('training, smoothed', smooth),
    figures.Series('held-out', evals, 'var(--b)', dots=few),
  ]
  one = lambda key: [figures.Series('', _points(lines, key))]
  return document.section(
    'Training',
    [
      figures.chart(
        'Loss', 'nats per token', curves, axis, log=True, wide=True
      ),
      figures.chart(
        'Held-out bits per byte',
        '',
        [figures.Series('', bits, 'var(--b)', dots=few)],
        axis,
      ),
      figures.chart('Learning rate', '', one('learning_rate'), axis, zero=True),
      figures.chart(
        'Gradient norm', 'before clipping', one('grad_norm'), axis, log=True
      ),
      figures.chart(
        'Speed', 'tokens per second', one('tokens_per_second'), axis, zero=True
      ),
    ],
  )


def _load_maps(lines, config):
  loads = _loads(lines)
  if not loads:
    return ''
  axis = figures.steps(lines)
  names = _layer_names(len(loads), config)
  experts = sum(ratio_NxE.shape[1] for _, ratio_NxE in loads)
  columns = min(240, max(HEAT_CELLS // experts, 40))
  maps = [
    figures.heat_map(name, steps, ratio_NxE, axis, columns)
    for name, (steps, ratio_NxE) in zip(names, loads, strict=True)
  ]
  hint = (
    'The share of the assignments that each expert (a row) got, relative '
    'to an even share, before any is dropped.'
  )
  return document.section(
    'Load of each expert',
    maps,
    'grid maps many' if len(maps) > 9 else 'grid maps',
    f'<p class="hint">{hint}</p>{figures.heat_key()}',
  )


PER_LAYER = {  # key of a line: title, hint, options of the chart
  'entropy': ('Router entropy', '1 = all experts equally likely', {}),
  'dropped': ('Dropped', 'share of the assignments', {'zero': True}),
  'overflow': (
    'Overflow',
    'rows without a place on another device',
    {'zero': True},
  ),
  'balance': ('Balance loss', '1 = perfect balance', {}),
  'z': ('Router z-loss', '', {}),
}


# What is said where a count is 0 throughout.
NOTHING = {
  'dropped': 'No assignment was dropped.',
  'overflow': 'No buffer overflowed.',
}


def _router(lines, config):
  out = []
  axis = figures.steps(lines) if lines else None
  loads = _loads(lines)
  if loads:
    peaks = [
      [
        (s, _number(float(x)))
        for s, x in zip(steps, ratio_NxE.max(1), strict=True)
      ]
      for steps, ratio_NxE in loads
    ]
    out.append(
      figures.layers(
        'Busiest expert',
        '1 = an even share',
        peaks,
        _layer_names(len(peaks), config),
        axis,
        log=True,
      )
    )
  keys = {k for x in lines for k, v in x.items() if isinstance(v, list)}
  notes = []
  others = sorted(keys - set(PER_LAYER) - {'load'})
  for key in [k for k in PER_LAYER if k in keys] + others:
    title, hint, options = PER_LAYER.get(key, (key, '', {}))
    count = max(len(x[key]) for x in lines if isinstance(x.get(key), list))
    curves = [_points(lines, key, i) for i in range(count)]
    if key in NOTHING and not any(y for curve in curves for _, y in curve):
      notes.append(NOTHING[key])
      continue
    out.append(
      figures.layers(
        title, hint, curves, _layer_names(count, config), axis, **options
      )
    )
  before = f'<p class="hint">{" ".join(notes)}</p>' if notes else ''
  return document.section('Router', out, before=before) if any(out) else ''


def _config(config):
  if not config:
    return ''
  nested = {k: v for k, v in config.items() if isinstance(v, dict) and v}
  plain = {k: v for k, v in config.items() if k not in nested}
  groups = [('run', plain), *nested.items()] if plain else nested.items()
  return document.section(
    'Config', [_table(k, v) for k, v in groups], 'columns'
  )


def _summary(summary):
  if not summary:
    return ''
  return document.section('All numbers', [_table('summary.json', summary)])


def _table(title, values):
  rows = ''.join(
    f'<tr><th scope="row">{document.esc(k)}</th><td>{document.esc(v)}</td></tr>'
    for k, v in _leaves(values)
  )
  return (
    f'<details open><summary>{document.esc(title)}</summary>'
    f'<table>{rows}</table></details>'
  )


def _leaves(value, prefix=''):
  """(dotted key, text) of every leaf."""
  if isinstance(value, dict) and value:
    for k, v in value.items():
      yield from _leaves(v, f'{prefix}.{k}' if prefix else str(k))
  elif isinstance(value, str):
    yield prefix, value or "''"
  elif isinstance(value, int) and not isinstance(value, bool):
    yield prefix, f'{value:,}' if abs(value) >= 10_000 else str(value)
  else:
    yield prefix, json.dumps(value, ensure_ascii=False)


def _brief(value):
  """One line for a dict, a list (equal neighbours counted), anything else."""
  if isinstance(value, dict):
    return ' · '.join(f'{k} {_brief(v)}' for k, v in value.items())
  if isinstance(value, list):
    runs = [(k, len(list(g))) for k, g in itertools.groupby(map(_brief, value))]
    return ', '.join(k if n == 1 else f'{n} \u00d7 {k}' for k, n in runs)
  return 'none' if value is None else str(value)


def _layer_names(count, config):
  model = config.get('model')
  rounds = model.get('iterations') if isinstance(model, dict) else 1
  if not isinstance(rounds, int) or rounds < 2 or count % rounds:
    return [f'MoE layer {i}' for i in range(count)]
  return [
    f'MoE layer {i // rounds}, iteration {i % rounds}' for i in range(count)
  ]


def _loads(lines):
  """For each layer (steps, load of each expert relative to an even share)."""
  lines = [
    (x['step'], x['load']) for x in lines if isinstance(x.get('load'), list)
  ]
  out = []
  for i, last in enumerate(lines[-1][1] if lines else []):
    rows = [
      (step, load[i])
      for step, load in lines
      if i < len(load) and len(load[i]) == len(last)
    ]
    if last:
      out.append(
        (
          [step for step, _ in rows],
          np.array([x for _, x in rows], np.float64) * len(last),
        )
      )
  return out


def _points(lines, key, i=None):
  """(step, number or None) of the lines that carry the key."""
  values = [(x['step'], x[key]) for x in lines if key in x]
  if i is not None:
    values = [
      (step, v[i] if isinstance(v, list) and i < len(v) else None)
      for step, v in values
    ]
  return [(step, _number(v)) for step, v in values]


def _smooth(points):
  """A running mean over a 25th of the run; none for a short one."""
  points = [(x, y) for x, y in points if y is not None]
  if len(points) < 25:
    return []
  total = np.cumsum([0.0] + [y for _, y in points])
  half = len(points) // 50 + 1
  out = []
  for i, (x, _) in enumerate(points):
    left = min(half, i)  # even about x at the start, where the loss is steep
    right = min(left, len(points) - 1 - i)
    mean = (total[i + right + 1] - total[i - left]) / (left + right + 1)
    out.append((x, float(mean)))
  return out


def _number(x):
  ok = isinstance(x, (int, float)) and math.isfinite(x)
  return x if ok else None


def _finite(x):
  return _number(x) if isinstance(x, float) else x
