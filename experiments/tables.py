"""The tables of a study, from its lines alone."""

import statistics
from types import ModuleType

from experiments import claims, pages


def arms(study: ModuleType, rows: list[dict]) -> str:
  """Each arm's numbers, and what they cost: mean (deviation over seeds)."""
  heads = [
    *('arm', 'seeds', *study.COLUMNS.values(), 'parameters', 'active'),
    *('MFLOPs a token', 'tokens', 'CPU seconds', 'peak GB'),
  ]
  body = []
  for arm in dict.fromkeys(row['arm'] for row in rows):
    those = [row for row in rows if row['arm'] == arm]
    middle = lambda key, those=those: statistics.median(
      row[key] for row in those
    )
    body.append(
      [
        *(arm, str(len(those))),
        *(_spread([row.get(key) for row in those]) for key in study.COLUMNS),
        f'{middle("params_total"):,.0f}',
        f'{middle("params_active"):,.0f}',
        f'{middle("flops_per_token") / 1e6:.2f}',
        f'{middle("tokens"):,.0f}',
        f'{middle("train_seconds"):.0f}',
        f'{middle("peak_bytes") / 1e9:.2f}',
      ]
    )
  return pages.table(heads, body)


def claims_of(study: ModuleType, rows: list[dict]) -> str:
  """Each claim, the paired difference with its interval, and the verdict."""
  heads = ['claim', 'difference', 'of', 'is', 'seeds', 'verdict']
  body = []
  for claim in study.CLAIMS:
    finding = claims.find(claim, rows)
    said = claims.verdict(claim, finding)
    if claim.untestable:
      body.append([claim.text, '', '', '', '', f'{said}: {claim.untestable}'])
      continue
    which = f'{claim.arm} - {claim.against}'
    what = study.COLUMNS.get(claim.metric, claim.metric)
    if finding is None:
      body.append([claim.text, which, what, '', '', said])
      continue
    if said == claims.NOT_RESOLVED:
      said += f'; {finding.resolvable:.3g} would have been'
    found = f'{finding.mean:+.3g} +- {finding.half:.2g}'
    body.append([claim.text, which, what, found, str(finding.n), said])
  return pages.table(heads, body)


def verdicts(study: ModuleType, rows: list[dict]) -> list[str]:
  return [
    claims.verdict(claim, claims.find(claim, rows)) for claim in study.CLAIMS
  ]


def _spread(values):
  """A mean, and the deviation where there is one."""
  values = [v for v in values if v is not None]
  if not values:
    return ''
  mean = f'{statistics.mean(values):.4g}'
  if len(values) == 1:
    return mean
  return f'{mean} ({statistics.stdev(values):.2g})'
