"""Figures as HTML: curves and heat maps.

No plotting library: a curve is an inline SVG and a heat map a PNG in the page,
both stretched under HTML labels, so that text keeps its size on any screen.
Colours are CSS variables, so both themes are right. The same values give the
same bytes.
"""

import base64
import dataclasses
import html
import itertools
import math
import struct
import zlib
from typing import Any

import numpy as np

from moe_jax.report import metrics

HEAT_RANGE = 4.0  # colours end at a quarter and at four times an even load
LEVELS = 33  # shades of a heat map, the middle one is an even load
OVER, UNDER = (204, 78, 14), (26, 115, 202)


@dataclasses.dataclass
class Series:
  """A curve: points (step, number or None), and how it is drawn."""

  name: str
  points: list[tuple[int, float | None]]
  colour: str = 'var(--a)'
  faint: bool = False
  dots: bool = False
  said: bool = True  # in the legend with its last value


@dataclasses.dataclass
class Axis:
  """Whole numbers from 0 to `last`, and the places, from 0 to 1, of labels."""

  last: int
  unit: str
  ticks: list[tuple[float, str]]
  tokens: list[tuple[float, str]] = dataclasses.field(default_factory=list)


def steps(lines: list[dict[str, Any]]) -> Axis:
  """The steps of a run, and where round token counts fall."""
  axis = numbers(max(x['step'] for x in lines), 'step')
  seen = [(x['tokens'], x['step']) for x in lines if x.get('tokens')]
  if seen:
    tokens, at = zip(*sorted([(0, 0), *seen]), strict=True)
    axis.tokens = [
      (float(np.interp(x, tokens, at)) / axis.last, tick(x))
      for x in _round_values(0, tokens[-1], 5)
    ]
  return axis


def numbers(last: int, unit: str) -> Axis:
  """Numbers from 0 to the last one, at least 1."""
  last = max(last, 1)
  values = [x for x in _round_values(0, last, 5) if x == int(x)]
  return Axis(last, unit, [(x / last, tick(x)) for x in values])


def cells(names: list[str], unit: str, most: int = 8) -> Axis:
  """Things side by side, of which about so many are labelled."""
  return Axis(len(names), unit, _marks(names, most))


def _marks(names, most):
  apart = 1 << math.ceil(math.log2(max(len(names) / most, 1)))
  return [
    ((i + 0.5) / len(names), names[i]) for i in range(0, len(names), apart)
  ]


def chart(
  title: str,
  hint: str,
  series: list[Series],
  axis: Axis,
  *,
  log: bool = False,
  zero: bool = False,
  wide: bool = False,
  legend: str | None = None,
) -> str:
  """A figure of curves; the empty text if no curve has a value.

  `log` allows a logarithmic scale (where the values span enough of one),
  `zero` asks for a scale that starts at 0.
  """
  series = [s for s in series if any(y is not None for _, y in s.points)]
  if not series:
    return ''
  values = [y for s in series for _, y in s.points if y is not None]
  place, ticks = _scale(min(values), max(values), log, zero)
  grid = ''.join(f'M0 {_down(place(y))}H1000' for y in ticks)
  drawing = (
    '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
    f'aria-hidden="true"><path class="rule" d="{grid}"/>'
    + ''.join(_path(s, axis, place) for s in series)
    + _hover(series, axis)
    + '</svg>'
  )
  legend = _legend(series) if legend is None else legend
  marks = [(place(y), tick(y)) for y in ticks]
  return _figure(
    title,
    hint,
    drawing,
    axis,
    marks,
    _spoken(title, series, axis.unit),
    legend,
    wide=wide,
  )


def layers(
  title: str,
  hint: str,
  per_layer: list[list],
  names: list[str],
  axis: Axis,
  **options,
) -> str:
  """A chart with one curve per layer, coloured by depth."""
  deep = [100 * i // max(len(names) - 1, 1) for i in range(len(names))]
  series = [
    Series(n, p, f'color-mix(in oklab,var(--deep) {d}%,var(--shallow))')
    for n, p, d in zip(names, per_layer, deep, strict=True)
  ]
  legend = None
  if len(names) > 4:
    legend = (
      f'<p class="legend"><span>{_esc(names[0])}<b class="ramp"></b>'
      f'{_esc(names[-1])}</span></p>'
    )
  return chart(title, hint, series, axis, legend=legend, **options)


def heat_map(
  name: str, steps: list[int], ratio_NxE: np.ndarray, axis: Axis, columns: int
) -> str:
  """One layer's load over time: a column per time, a row per expert."""
  N, E = ratio_NxE.shape
  columns = max(min(columns, N), 1)
  first = np.searchsorted(
    steps, np.arange(columns) * axis.last / columns, side='right'
  )
  means = []
  for a, b in itertools.pairwise([*first, N]):
    a = min(a, N - 1)  # a time without a line shows the next, or the last
    means.append(ratio_NxE[a : max(b, a + 1)].mean(0))
  hint, spoken = '', f'Load over time of {E} experts in {name}'
  end = ratio_NxE[-1]
  if np.isfinite(end).all():
    low, high = int(end.argmin()), int(end.argmax())
    hint = (
      f'at the end {end[low]:.2f}\u00d7 (expert {low}) '
      f'to {end[high]:.2f}\u00d7 (expert {high})'
    )
    spoken += f'; {hint} an even share'
  marks = _down_the_side([str(e) for e in range(E)], 5)
  height = min(max(6 * E, 96), 256)
  drawing = _shades(np.array(means).T)
  return _figure(name, hint, drawing, axis, marks, spoken, height=height)


def table_map(
  name: str,
  hint: str,
  ratio_HxW: np.ndarray,
  rows: list[str],
  columns: Axis,
  *,
  height: int,
  wide: bool = False,
) -> str:
  """A table of ratios as shades; NaN is missing. Says its extremes."""
  spoken = f'{name}; {hint}'
  there = ratio_HxW[np.isfinite(ratio_HxW)]
  if there.size:
    spoken += f'; from {there.min():.2f} to {there.max():.2f}'
  marks = _down_the_side(rows, height / 24)
  drawing = _shades(ratio_HxW)
  return _figure(
    name, hint, drawing, columns, marks, spoken, wide=wide, height=height
  )


def _shades(ratio_HxW):
  """An image of ratios around 1, on a logarithmic scale."""
  with np.errstate(divide='ignore'):  # an idle expert: -inf, then clipped
    v = np.log(ratio_HxW) / math.log(HEAT_RANGE)
  level = np.round((np.clip(v, -1, 1) + 1) * (LEVELS // 2))
  png = _png(np.where(np.isnan(level), LEVELS, level).astype(np.uint8))
  code = base64.b64encode(png).decode()
  return f'<img alt="" src="data:image/png;base64,{code}">'


def _down_the_side(names, most):
  return [(1 - place, name) for place, name in _marks(names, most)]


def heat_key(even: str = 'even', share: str = 'an even share') -> str:
  """The colour bar of all heat maps, where 1 is `share`."""
  stops = ','.join(
    f'rgb({r} {g} {b}/{a / 255:.2f})' for r, g, b, a in _palette()[:LEVELS:4]
  )
  marks = enumerate(('≤ ¼', '½', f'1 = {even}', '2', '≥ 4'))
  return (
    '<div class="key" role="img" aria-label="Colours: blue is less than '
    f'{share}, down to a quarter; red is more, up to four times">'
    f'<b style="background-image:linear-gradient(90deg,{stops})"></b>'
    + ''.join(f'<i style="left:{25 * i}%">{t}</i>' for i, t in marks)
    + '</div>'
  )


def tick(x: float) -> str:
  """A number as a label: 0.25, 3e-4, 1,500, 20k."""
  if x and abs(x) < 0.01:
    return f'{x:.3g}' if abs(x) >= 0.0099 else _power(x)
  return metrics.si(x) if abs(x) >= 10_000 else f'{x:,.10g}'


def number(x: float) -> str:
  """A measured value, four digits of it."""
  return tick(float(f'{x:.4g}'))


def _power(x):
  digits, power = f'{x:.3e}'.split('e')
  return f'{float(digits):g}e{int(power)}'


def _figure(
  title,
  hint,
  drawing,
  axis,
  y_ticks,
  spoken,
  legend='',
  *,
  wide=False,
  height=None,
):
  marks = [f'<i class="y" style="bottom:{p:.2%}">{t}</i>' for p, t in y_ticks]
  marks += [f'<i class="x" style="left:{p:.2%}">{t}</i>' for p, t in axis.ticks]
  marks.append(f'<i class="unit x">{axis.unit}</i>')
  if wide and axis.tokens:
    marks += [
      f'<i class="top" style="left:{p:.2%}">{t}</i>' for p, t in axis.tokens
    ]
    marks.append('<i class="unit top">tokens</i>')
  size = f' style="height:{height}px"' if height else ''
  hint = f' <small>{_esc(hint)}</small>' if hint else ''
  return (
    f'<figure{" class=wide" if wide else ""}><figcaption>{_esc(title)}'
    f'{hint}</figcaption>{legend}<div class="plot"{size} role="img" '
    f'aria-label="{_esc(spoken)}">{drawing}{"".join(marks)}</div>'
    '</figure>'
  )


def _legend(series):
  spans = [
    f'<span><b style="background:{s.colour}'
    f'{";opacity:.4" if s.faint else ""}"></b>{_esc(s.name)}'
    + (f' {number(_ends(s)[1][1])}' if s.said else '')
    + '</span>'
    for s in series
    if s.name
  ]
  return f'<p class="legend">{"".join(spans)}</p>' if spans else ''


def _path(series, axis, place):
  """A curve; it breaks where a value is missing."""
  points = _thin(series.points)
  d, pen = [], 'M'
  for x, y in points:
    if y is not None:
      d.append(f'{pen}{1000 * x / axis.last:.1f} {_down(place(y))}')
    pen = 'M' if y is None else 'L'
  out = (
    f'<path class="{"faint" if series.faint else "line"}" '
    f'style="stroke:{series.colour}" d="{"".join(d)}"/>'
  )
  if series.dots or len(d) == 1:
    # A line of no length under a round cap is a dot that cannot be stretched.
    dots = ''.join(f'M{p[1:]}h0' for p in d)
    out += f'<path class="dots" style="stroke:{series.colour}" d="{dots}"/>'
  return out


def _hover(series, axis, limit=100):
  """Invisible columns whose tooltips say the values there."""
  values = [{x: y for x, y in s.points if y is not None} for s in series]
  steps = sorted(set().union(*values))
  every = -(-len(steps) // limit)
  steps = steps[::-1][::every][::-1]  # with the last one
  half = [500 * (a + b) / axis.last for a, b in itertools.pairwise(steps)]
  out = []
  for step, left, right in zip(steps, [0, *half], [*half, 1000], strict=True):
    texts = [f'{axis.unit} {step:,}']
    texts += [
      f'{s.name} {number(v[step])}'.strip()
      for s, v in zip(series, values, strict=True)
      if step in v
    ]
    out.append(
      f'<rect x="{left:.1f}" width="{right - left:.1f}" height="1000">'
      f'<title>{_esc(chr(10).join(texts[:9]))}</title></rect>'
    )
  return f'<g class="hover">{"".join(out)}</g>'


def _spoken(title, series, unit):
  parts = []
  for s in series[:6]:
    (x0, y0), (x1, y1) = _ends(s)
    parts.append(
      f'{s.name} {number(y0)} at {unit} {x0:,}, '
      f'{number(y1)} at {unit} {x1:,}'.strip()
    )
  return f'{title}: {"; ".join(parts)}'


def _ends(series):
  there = [(x, y) for x, y in series.points if y is not None]
  return there[0], there[-1]


def _thin(points, limit=1000):
  """At most about `limit` points: each bin keeps its lowest and highest."""
  if len(points) <= limit:
    return points
  size = -(-2 * len(points) // limit)
  out = []
  for i in range(0, len(points), size):
    there = [p for p in points[i : i + size] if p[1] is not None]
    ends = [points[i]]
    if there:
      ends = {f(there, key=lambda p: p[1]) for f in (min, max)}
    out += sorted(ends)
  return out


def _scale(lo, hi, log, zero):
  """A function from a value to 0..1, and the values to mark."""
  log = log and lo > 0 and hi > 2.5 * lo
  into, back = (math.log, math.exp) if log else (float, float)
  lo, hi = into(min(lo, 0.0) if zero else lo), into(hi)
  pad = 0.06 * (hi - lo) or 0.1 * abs(hi) or 0.5
  bottom, top = lo - pad * (not zero or lo < 0), hi + pad
  marks = (_log_values if log else _round_values)(back(bottom), back(top), 5)
  return lambda y: (into(y) - bottom) / (top - bottom), marks


def _round_values(lo, hi, count):
  """At most about `count` multiples of 1, 2 or 5 times a power of ten."""
  size = 10.0 ** math.floor(math.log10((hi - lo) / count))
  size *= next(m for m in (1, 2, 5, 10, 20) if (hi - lo) / (size * m) <= count)
  first, last = math.ceil(lo / size - 1e-9), math.floor(hi / size + 1e-9)
  return [float(f'{i * size:.12g}') for i in range(first, last + 1)]


def _log_values(lo, hi, count):
  powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
  for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
    out = [float(f'{d}e{p}') for p in powers for d in digits]
    out = [y for y in out if lo <= y <= hi]
    if len(out) <= count + 2:
      break
  return out[:: -(-len(out) // (count + 2)) or 1]


def _down(place):
  return f'{1000 * (1 - place):.1f}'


def _esc(x):
  return html.escape(str(x))


def _palette():
  """Idle to busy as RGBA, and last the colour of what is missing.

  An even load is transparent: there the page shows through, in any theme.
  """
  out = []
  for v in np.linspace(-1, 1, LEVELS):
    out.append((*(OVER if v > 0 else UNDER), round(255 * abs(v) ** 0.8)))
  return [*out, (128, 128, 128, 90)]


def _png(level_HxW):
  """A PNG file whose pixels are entries of the palette."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

  H, W = level_HxW.shape
  colours = _palette()
  rows = np.pad(level_HxW, ((0, 0), (1, 0)))  # 0: each row is unfiltered
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', struct.pack('>IIBBBBB', W, H, 8, 3, 0, 0, 0))
    + chunk(b'PLTE', bytes(c for p in colours for c in p[:3]))
    + chunk(b'tRNS', bytes(p[3] for p in colours))
    + chunk(b'IDAT', zlib.compress(rows.tobytes(), 9))
    + chunk(b'IEND', b'')
  )


CSS = """
:root{--card:#fff;--ink:#1c1d1f;--dim:#696c72;--rule:#e3e3df;--a:#1871c8;
--b:#c94c0c;--shallow:#7fb8ec;--deep:#143a6b}
@media screen and (prefers-color-scheme:dark){:root{--card:#1b1d20;
--ink:#e9e9e6;--dim:#9a9da3;--rule:#2f3237;--a:#5aa9f2;--b:#f08a4b;
--shallow:#cfe6fb;--deep:#2b6cb3}}
figure{margin:0;background:var(--card);border:1px solid var(--rule);
border-radius:8px;padding:12px 22px 12px 14px;min-width:0;display:flex;
flex-direction:column}
figcaption{font-weight:600;line-height:1.35}
figcaption small{font-weight:400;font-size:13px;color:var(--dim)}
.maps small{display:block}
.plot{position:relative;flex:1 0 auto;height:180px;margin:14px 0 22px 40px}
.wide .plot{height:250px;margin-top:30px}
.plot svg,.plot img{position:absolute;inset:0;width:100%;height:100%}
.plot svg{overflow:visible}
.plot img{image-rendering:pixelated;outline:1px solid var(--rule)}
.plot i,.key i{position:absolute;font-style:normal;font-size:11.5px;
line-height:1;color:var(--dim);white-space:nowrap}
.plot .y{right:calc(100% + 7px);transform:translateY(50%)}
.plot .x{top:calc(100% + 10px);transform:translateX(-50%)}
.plot .top{bottom:calc(100% + 8px);transform:translateX(-50%)}
.plot .unit{right:calc(100% + 7px);transform:none}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;
stroke-linecap:round}
.line{stroke-width:1.7}.faint{stroke-width:1;opacity:.4}.dots{stroke-width:6}
.rule{stroke:var(--rule);stroke-width:1}
.hover rect{fill:transparent}.hover rect:hover{fill:var(--dim);opacity:.18}
.legend{margin:2px 0 0;font-size:13px;display:flex;flex-wrap:wrap;gap:2px 16px;
color:var(--dim)}
.legend b{display:inline-block;width:14px;height:4px;border-radius:2px;
margin-right:6px;vertical-align:middle}
.legend .ramp{width:56px;margin:0 8px;
background:linear-gradient(90deg in oklab,var(--shallow),var(--deep))}
.key{position:relative;width:min(320px,86%);height:34px;margin:0 0 10px 16px}
.key b{display:block;height:12px;background-color:var(--card);
outline:1px solid var(--rule)}
.key i{top:18px;transform:translateX(-50%)}
@media print{figure{break-inside:avoid}}
"""
