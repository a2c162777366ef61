"""routing.html: what analysis.py found, as one self-contained page."""

import itertools
import math
import re

import numpy as np

from moe_jax.analysis.measures import Change, Routing, Step, Tokens
from moe_jax.report import document, figures
from moe_jax.report.document import esc

SHOWN = 12  # maps of pairs of experts; the others are folded away
PAIRS = 6  # pairs of texts that are curves of their own


def page(
  name: str,
  tokens: Tokens,
  routing: Routing,
  steps: list[Step],
  changes: list[Change],
) -> str:
  """The page of a run `name`: the same inputs give the same text."""
  names = [_short(step.name) for step in steps]
  iterations = any('iteration' in step.name for step in steps)
  unit = 'layer.iteration' if iterations else 'MoE layer'
  sections = [
    _header(name, tokens, routing, steps, changes),
    _load(steps, names, unit),
    _sure(steps, names, unit),
    _known(steps, names, unit),
    _texts(tokens, steps, names, unit),
    _together(steps),
    _paths(steps, names, unit),
    _dropped(steps),
    _changed(changes, names, unit),
    _numbers(steps),
  ]
  return document.page(f'Routing of {name}', sections)


def _short(name):
  """'MoE layer 3, iteration 1' as '3.1'."""
  return '.'.join(re.findall(r'\d+', name))


def _over(names, unit):
  """The axis of curves over routed steps."""
  last, apart = max(len(names) - 1, 1), -(-len(names) // 13)
  ticks = [(i / last, names[i]) for i in range(0, len(names), apart)]
  return figures.Axis(last, unit, ticks)


def _curve(name, values, colour='var(--a)', **options):
  points = [
    (i, float(y) if np.isfinite(y) else None) for i, y in enumerate(values)
  ]
  dots = len(points) <= 60
  return figures.Series(name, points, colour, dots=dots, **options)


def _ratio(step):
  return step.load_E * len(step.load_E)


def _most(steps):
  """The most bits that a choice can tell: those of the experts' number."""
  return max(math.log2(len(step.load_E)) for step in steps)


def _header(name, tokens, routing, steps, changes):
  candidates = sorted({len(step.load_E) for step in steps})
  chosen = float(np.mean(np.sum(routing.expert_SxTxK >= 0, axis=2)))
  tiles = [
    ('after steps', f'{routing.step:,}'),
    ('tokens', f'{len(tokens.id_T):,}'),
    ('routed steps', str(len(steps))),
    ('experts to choose from', ' or '.join(map(str, candidates))),
    ('experts a token', f'{chosen:.3g}'),
  ]
  tiles += [
    (f'nats a token, {text}', f'{routing.nll_T[tokens.text_T == n].mean():.3f}')
    for n, text in enumerate(tokens.texts)
  ]
  return (
    f'<header><p class="kicker">moe_jax routing · {esc(name)}</p>'
    f'<h1>Who goes where in {esc(name)}</h1>{document.pairs("tiles", tiles)}'
    f'<p>{esc(" ".join(_told(steps, changes)))}</p></header>{STYLE}'
  )


def _told(steps, changes):
  """Sentences."""
  low = min(steps, key=lambda step: _ratio(step).min())
  high = max(steps, key=lambda step: _ratio(step).max())
  idle = sum(int(np.sum(step.load_E == 0)) for step in steps)
  experts = sum(len(step.load_E) for step in steps)
  yield (
    f'The busiest expert has {_ratio(high).max():.2f} times an even share'
    f' ({_place(high, _ratio(high).argmax())}), the least busy'
    f' {_ratio(low).min():.2f} ({_place(low, _ratio(low).argmin())});'
    f' {idle} of {experts} are never chosen.'
  )
  mean = lambda key: np.mean([getattr(step, key).above for step in steps])
  told = f'A choice tells {mean("token"):.2f} bits of the token'
  told += f' and {mean("position"):.2f} of its position'
  if len(steps[0].load_NxE) > 1:
    told += f', {mean("text"):.2f} of the text it is from'
  following = [step.following.above for step in steps if step.following]
  if following:
    told += f', {np.mean(following):.2f} of the next choice'
  yield (
    f'{told}: means over the steps, above chance; {_most(steps):.2f} bits name'
    ' an expert.'
  )
  dropped = np.mean([step.dropped for step in steps])
  if dropped:
    yield f'{dropped:.1%} of the choices found no room.'
  if changes:
    last = changes[-1]
    yield (
      f'Of the tokens {last.moved_S.mean():.1%} changed their first choice'
      f' between the checkpoints of steps {last.first:,} and {last.second:,}.'
    )


def _place(step, expert):
  return f'{step.name}, expert {expert}'


def _load(steps, names, unit):
  E = max(len(step.load_E) for step in steps)
  ratio_SxE = _padded([_ratio(step) for step in steps], E)
  axis = _over(names, unit)
  peaks = [_ratio(step).max() for step in steps]
  least = [_ratio(step).min() for step in steps]
  return document.section(
    'Load: red is busy, blue is hardly used',
    [
      _by_layer(
        'Load of each expert', 'before drops', ratio_SxE, names, unit, True
      ),
      figures.chart(
        'Busiest and least busy expert',
        '1 = an even share',
        [
          _curve('busiest', peaks, 'var(--b)', said=False),
          _curve('least busy', least, said=False),
        ],
        axis,
        zero=True,
      ),
    ],
    before=figures.heat_key(),
  )


def _padded(rows, E):
  """[S, E]; NaN where a step has fewer experts."""
  return np.array([np.pad(x, (0, E - len(x)), constant_values=np.nan)
                   for x in rows])  # fmt: skip


def _by_layer(title, hint, ratio_SxE, names, unit, wide=False):
  """A map with a row for each routed step."""
  columns = figures.cells([str(e) for e in range(ratio_SxE.shape[1])], 'expert')
  return figures.table_map(
    title,
    f'{hint}; a row is a {unit}' if hint else f'a row is a {unit}',
    ratio_SxE,
    names,
    columns,
    height=min(max(14 * len(names), 84), 420),
    wide=wide,
  )


def _sure(steps, names, unit):
  series = [
    _curve('of the load', [s.load_entropy for s in steps], said=False),
    _curve(
      'of a token\u2019s probabilities',
      [s.router_entropy for s in steps],
      'var(--b)',
      said=False,
    ),
  ]
  axis = _over(names, unit)
  gates = [_curve('', [s.first_gate for s in steps])]
  return document.section(
    'Division of labour: even load from routers that are sure',
    [
      figures.chart(
        'Entropy',
        '1 = all experts alike, 0 = always the same one',
        series,
        axis,
        zero=True,
        wide=True,
      ),
      figures.chart('Gate of the first choice', 'mean', gates, axis, zero=True),
    ],
    before=_hint(
      'Where the two curves lie apart, each token has its experts and all'
      ' experts have tokens. Where both are near 1 routers hardly decide.'
    ),
  )


def _hint(text):
  return f'<p class="hint">{esc(text)}</p>'


KNOWN = {  # field of a step: what a choice tells of its token
  'token': 'Which token it is',
  'position': 'Where in its document it stands',
  'text': 'Which text it is from',
  'following': 'Where it goes next',
}


def _known(steps, names, unit):
  axis, out = _over(names, unit), []
  for field, title in KNOWN.items():
    found = [getattr(step, field) for step in steps]
    found = [x for x in found if x is not None]
    if not found or (field == 'text' and len(steps[0].load_NxE) < 2):
      continue
    shown = [
      _curve('a choice tells', [x.bits for x in found], said=False),
      _curve(
        'by chance',
        [x.chance for x in found],
        'var(--dim)',
        said=False,
      ),
    ]
    out.append(figures.chart(title, 'bits', shown, axis, zero=True))
  return document.section(
    'What experts are for: bits above chance',
    out,
    'grid many' if len(out) == 4 else 'grid',
    before=_hint(
      f'Mutual information of one choice with each of these, at most'
      f' {_most(steps):.2f} bits. So many by chance are told of shuffled tokens'
      ' too; what lies above is a careful estimate.'
    ),
  )


def _texts(tokens, steps, names, unit):
  N = len(tokens.texts)
  if N < 2:
    return ''
  E = max(len(step.load_E) for step in steps)
  out = []
  with np.errstate(invalid='ignore', divide='ignore'):
    for n, text in enumerate(tokens.texts):
      rows = [s.load_NxE[n] / s.load_NxE.mean(axis=0) for s in steps]
      out.append(_by_layer(text, '', _padded(rows, E), names, unit))
  pairs = list(itertools.combinations(range(N), 2))
  if len(pairs) <= PAIRS:
    curves = [[s.apart_NxN[i, j] for s in steps] for i, j in pairs]
    labels = [f'{tokens.texts[i]} and {tokens.texts[j]}' for i, j in pairs]
  else:
    apart = lambda s: [s.apart_NxN[i, j] for i, j in pairs]
    curves = [[f(apart(s)) for s in steps] for f in (max, np.median, min)]
    labels = ['most different two', 'median', 'most alike two']
  points = [_curve('', values).points for values in curves]
  out.append(
    figures.layers(
      'How far texts are apart',
      'bits; 0 = the same load, 1 = no expert in common',
      points,
      labels,
      _over(names, unit),
      zero=True,
    )
  )
  return document.section(
    'Texts: experts that one of them uses more than the others',
    out,
    before=figures.heat_key('the mean', 'the mean of all texts'),
  )


def _pair_maps(maps):
  kind = 'grid maps many' if len(maps) > 4 else 'grid maps'
  shown = f'<div class="{kind}">{"".join(maps[:SHOWN])}</div>'
  if len(maps) <= SHOWN:
    return shown
  return (
    f'{shown}<details class="more"><summary>the other {len(maps) - SHOWN}'
    f'</summary><div class="{kind}">{"".join(maps[SHOWN:])}</div></details>'
  )


def _pair_map(title, ratio_ExF, columns):
  E, F = ratio_ExF.shape
  there = np.where(np.isfinite(ratio_ExF), ratio_ExF, -np.inf)
  i, j = np.unravel_index(there.argmax(), there.shape)
  hint = f'most: {i} with {j}, {ratio_ExF[i, j]:.2f}\u00d7'
  if not np.isfinite(there[i, j]):
    hint = 'no two are ever chosen'
  return figures.table_map(
    title,
    hint,
    ratio_ExF,
    [str(e) for e in range(E)],
    figures.cells([str(f) for f in range(F)], columns, 5),
    height=200,
  )


def _together(steps):
  title = 'Company: pairs of experts that serve the same token'
  maps = [
    _pair_map(step.name, step.together_ExE, 'expert')
    for step in steps
    if step.together_ExE is not None
  ]
  if not maps:
    note = '<p class="note">A token has one expert.</p>'
    return document.section(title, [note])
  key = figures.heat_key('by load', 'what load alone would make')
  return document.section(title, [_pair_maps(maps)], 'whole', key)


def _paths(steps, names, unit):
  maps = [
    _pair_map(f'{unit} {a} to {b}', step.following_ExF, 'expert there')
    for step, (a, b) in zip(steps, itertools.pairwise(names), strict=False)
  ]
  if not maps:
    return ''
  key = figures.heat_key('any path', 'if paths were independent')
  return document.section(
    'Paths: from an expert (a row) to those of the next step',
    [_pair_maps(maps)],
    'whole',
    key,
  )


def _dropped(steps):
  title = 'Drops: choices without room, by place in the row'
  if not any(step.dropped for step in steps):
    note = '<p class="note">No choice was dropped.</p>'
    return document.section(title, [note])
  curves = [_smooth(step.dropped_L) for step in steps]
  L = max(len(step.dropped_L) for step in steps)
  chart = figures.layers(
    'Dropped',
    'share of the choices',
    curves,
    [step.name for step in steps],
    figures.numbers(L - 1, 'place'),
    zero=True,
    wide=True,
  )
  return document.section(title, [chart])


def _smooth(drop_L, most=64):
  """Points: means over at most so many stretches."""
  size = -(-len(drop_L) // most)
  return [
    (i + size // 2, float(drop_L[i : i + size].mean()))
    for i in range(0, len(drop_L), size)
  ]


def _changed(changes, names, unit):
  title = 'Training: how many tokens still change their experts'
  if not changes:
    note = '<p class="note">There is one checkpoint.</p>'
    return document.section(title, [note])
  labels = [f'{x.first:,} to {x.second:,}' for x in changes]
  axis = _over(names, unit)
  curves = lambda key: [_curve('', getattr(x, key)).points for x in changes]
  return document.section(
    title,
    [
      figures.layers(
        'First choice changed',
        'share of tokens, between checkpoints',
        curves('moved_S'),
        labels,
        axis,
        zero=True,
      ),
      figures.layers(
        'Experts in common',
        'of those before or after; 1 = the same',
        curves('shared_S'),
        labels,
        axis,
        zero=True,
      ),
    ],
  )


def _numbers(steps):
  bits = lambda x: '\u2013' if x is None else f'{x.bits:.3f} / {x.chance:.3f}'
  columns = {
    'step': lambda s: s.name,
    'load, least': lambda s: f'{_ratio(s).min():.2f}',
    'most': lambda s: f'{_ratio(s).max():.2f}',
    'never chosen': lambda s: str(int(np.sum(s.load_E == 0))),
    'entropy of load': lambda s: f'{s.load_entropy:.3f}',
    'of a token': lambda s: f'{s.router_entropy:.3f}',
    'first gate': lambda s: f'{s.first_gate:.3f}',
    'dropped': lambda s: f'{s.dropped:.2%}',
    'without expert': lambda s: f'{s.unrouted:.2%}',
    **{
      f'{key}, bits / chance': lambda s, key=key: bits(getattr(s, key))
      for key in KNOWN
    },
  }
  head = ''.join(f'<th scope="col">{esc(name)}</th>' for name in columns)
  rows = ''.join(
    '<tr>'
    + ''.join(f'<td>{esc(f(s))}</td>' for f in columns.values())
    + '</tr>'
    for s in steps
  )
  open_ = ' open' if len(steps) <= SHOWN else ''
  return document.section(
    'All numbers',
    [
      f'<details{open_}><summary>{len(steps)} routed steps</summary>'
      f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}'
      '</table></div></details>'
    ],
  )


STYLE = """<style>
header p{max-width:78ch}.more{margin-top:14px}.more .grid{margin-top:10px}
.scroll{overflow-x:auto}.numbers th,.numbers td{text-align:right;
padding:3px 0 3px 14px;white-space:nowrap}
.numbers th{white-space:normal;vertical-align:bottom}
.numbers td:first-child,.numbers th:first-child{text-align:left;padding-left:0}
.tiles dt{overflow-wrap:anywhere}.plot{margin-bottom:38px}
.plot .unit.x{right:auto;left:50%;top:calc(100% + 25px);
transform:translateX(-50%)}
</style>"""
