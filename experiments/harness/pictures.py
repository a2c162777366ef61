"""What pictures of studies are made of; each plot.py puts them together."""

import pathlib
import statistics
from collections.abc import Callable, Sequence

import adjustText
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from experiments.harness import claims

INK, SOFT, GRID = '#1f2328', '#6e7781', '#d8dee4'
SMALL = {'fontsize': 6.5, 'color': SOFT}
COLOURS = {
  claims.SUPPORTED: '#1a7f37',
  claims.CONTRADICTED: '#cf222e',
  claims.NOT_RESOLVED: '#6e7781',
}


def figure(width: float, height: float, columns: int):
  """A figure in inches, and its axes side by side."""
  plt.rcParams.update(
    {
      **{'font.size': 9, 'axes.edgecolor': SOFT, 'text.color': INK},
      **{'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK},
      **{'axes.spines.top': False, 'axes.spines.right': False},
      **{'axes.grid': True, 'grid.color': GRID, 'axes.axisbelow': True},
    }
  )
  return plt.subplots(1, columns, figsize=(width, height), squeeze=False)


def differences(
  axes,
  study_claims: Sequence[claims.Claim],
  rows: list[dict],
  unit: str,
  name: Callable[[claims.Claim], str] | None = None,
  within: tuple[float, float] | None = None,
  words: Callable[[str], str] = str,
) -> None:
  """A row a claim: the paired difference, its interval, coloured by verdict.

  Args:
    name: of a claim; None is both of its arms.
    within: what the axis shows; of what lies beyond, the number stands there.
    words: what the legend calls a verdict.
  """
  name = name or (lambda claim: f'{claim.arm}\n- {claim.against}')
  found = [(claim, claims.find(claim, rows)) for claim in study_claims]
  found = [(claim, finding) for claim, finding in found if finding]
  for y, (claim, finding) in enumerate(reversed(found)):
    colour = COLOURS[claims.verdict(claim, finding)]
    if within and not within[0] <= finding.mean <= within[1]:
      edge, side = (
        (within[0], 'left') if finding.mean < 0 else (within[1], 'right')
      )
      text = f'{finding.mean:+.2f} ±{finding.half:.2f}'
      axes.text(edge, y, text, color=colour, ha=side, va='center', fontsize=7)
      continue
    axes.errorbar(
      finding.mean, y, xerr=finding.half, fmt='o', color=colour, capsize=3
    )
  if within:
    axes.set_xlim(within)
  axes.axvline(0, color=INK, linewidth=0.8)
  names = [name(claim) for claim, _ in reversed(found)]
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(-0.6, len(names) - 0.4)
  axes.set_xlabel(f'paired difference, {unit}; 95 % interval')
  for verdict, colour in COLOURS.items():
    axes.plot([], [], 'o', color=colour, label=words(verdict))
  axes.legend(loc='best', fontsize=7, frameon=False)


def means(
  axes,
  rows: list[dict],
  x: str,
  y: str,
  labels: tuple[str, str],
  scale: float = 1.0,
  name: Callable[[str], str] = str,
) -> None:
  """A point an arm: a cost and a metric, the latter with its deviation."""
  names = []
  for arm in dict.fromkeys(row['arm'] for row in rows):
    those = [
      row
      for row in rows
      if row['arm'] == arm and None not in (row.get(x), row.get(y))
    ]
    if not those:
      continue
    at = statistics.median(row[x] for row in those) / scale
    values = [row[y] for row in those]
    spread = statistics.stdev(values) if len(values) > 1 else 0
    axes.errorbar(at, statistics.mean(values), yerr=spread, fmt='o', capsize=2)
    names.append(axes.text(at, statistics.mean(values), name(arm), **SMALL))
  axes.set_xlabel(labels[0])
  axes.set_ylabel(labels[1])
  if names:
    line = {'arrowstyle': '-', 'color': SOFT, 'lw': 0.5}
    adjustText.adjust_text(names, ax=axes, arrowprops=line, iter_lim=400)


def curves(axes, rows: list[dict], names: Sequence[str], unit: str) -> None:
  """The held-out loss over steps, a line an arm, the mean over its seeds."""
  for arm in names:
    those = [row['curve'] for row in rows if row['arm'] == arm]
    if not those:
      continue
    steps = [step for step, _ in those[0]]
    losses = [
      statistics.mean(c[i][1] for c in those) for i in range(len(steps))
    ]
    axes.plot(steps, losses, marker='.', label=arm)
  axes.set_xlabel('steps')
  axes.set_ylabel(unit)
  axes.legend(fontsize=7, frameon=False)


def save(figure, folder: pathlib.Path) -> None:
  """As <study>.png in the study's folder."""
  figure.tight_layout()
  figure.savefig(folder / f'{folder.name}.png', dpi=130)
  plt.close(figure)
