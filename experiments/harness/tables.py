"""The tables of a study, from its lines alone."""

import statistics
from types import ModuleType

from experiments.harness import claims, pages, results


def arms(study: ModuleType, rows: list[dict]) -> str:
  """Each arm's numbers, and what they cost: mean (deviation over seeds)."""
  heads = [
    *('arm', 'seeds', *study.COLUMNS.values(), 'parameters', 'active'),
    *('MFLOPs a token', 'tokens'),
    *(f'{cost}{_where(study)}' for cost in ('ms a step', 'MiB of a step')),
  ]
  body, rows = [], results.with_costs(study, rows)
  for arm in dict.fromkeys(row['arm'] for row in rows):
    those = [row for row in rows if row['arm'] == arm]
    middle = lambda key, those=those: statistics.median(
      row[key] for row in those
    )
    # It is not known of every arm.
    cost = lambda key, digits, scale, row=those[0]: (
      f'{row[key] * scale:.{digits}f}' if key in row else ''
    )
    body.append(
      [
        *(arm, str(len(those))),
        *(_spread([row.get(key) for row in those]) for key in study.COLUMNS),
        f'{middle("params_total"):,.0f}',
        f'{middle("params_active"):,.0f}',
        f'{middle("flops_per_token") / 1e6:.2f}',
        f'{middle("tokens"):,.0f}',
        cost('step_seconds', 1, 1e3),
        cost('step_bytes', 0, 2**-20),
      ]
    )
  return pages.table(heads, body)


def claims_of(study: ModuleType, rows: list[dict]) -> str:
  """Each claim, the paired difference with its interval, and the verdict."""
  heads = ['claim', 'difference', 'of', 'is', 'seeds', 'verdict']
  body = [finding(study, claim, rows) for claim in study.CLAIMS]
  return pages.table(heads, body)


def finding(
  study: ModuleType, claim: claims.Claim, rows: list[dict]
) -> list[str]:
  """A claim's line: text, difference, of what, how much, seeds, verdict."""
  found = claims.find(claim, rows)
  said = claims.verdict(claim, found)
  if claim.untestable:
    return [claim.text, '', '', '', '', f'{said}: {claim.untestable}']
  which = f'{claim.arm} - {claim.against}'
  what = study.COLUMNS.get(claim.metric, claim.metric)
  if found is None:
    return [claim.text, which, what, '', '', said]
  if found.n < claims.SEEDS:
    said += f'; fewer than {claims.SEEDS} seeds'
  elif said == claims.NOT_RESOLVED and found.half:
    said += f'; {claims.resolvable(claim, found):.3g} would have been'
  much = f'{found.mean:+.3g} +- {found.half:.2g}'
  return [claim.text, which, what, much, str(found.n), said]


def verdicts(study: ModuleType, rows: list[dict]) -> list[str]:
  return [
    claims.verdict(claim, claims.find(claim, rows)) for claim in study.CLAIMS
  ]


def _where(study):
  devices = {line['device'] for line in results.costs(study).values()}
  return f' ({", ".join(sorted(devices))})' if devices else ''


def _spread(values):
  """A mean, and the deviation where there is one."""
  values = [v for v in values if v is not None]
  if not values:
    return ''
  mean = f'{statistics.mean(values):.4g}'
  if len(values) == 1:
    return mean
  return f'{mean} ({statistics.stdev(values):.2g})'
