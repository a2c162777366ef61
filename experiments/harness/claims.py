"""Claims, and what paired runs say of them.

Arms are compared seed by seed: of one seed all arms have the same initial
parameters where shapes agree, the same batches in the same order, and the same
held-out text, so that most of what a seed does falls out of the difference.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of intervals
POWER = 0.8  # of the smallest effect that could have been resolved
SEEDS = 3  # of fewer there is no verdict

SUPPORTED = 'supported'
CONTRADICTED = 'contradicted'
NOT_RESOLVED = 'not resolved at this size'
NOT_TESTABLE = 'not testable here'


class Claim(NamedTuple):
  """That `metric` of one arm less that of another lies in (low, high).

  'Lower' is (-inf, 0), 'no worse by more than m' (-inf, m), 'equal to within m'
  (-m, m).

  Attributes:
    untestable: why nothing here can test it; the other fields are not read.
    headline: `python -m experiments.harness.variants` puts it in README.md too.
  """

  text: str
  arm: str = ''
  against: str = ''
  metric: str = 'eval_loss'
  low: float = -math.inf
  high: float = 0.0
  untestable: str = ''
  headline: bool = False


class Finding(NamedTuple):
  """Of differences over n seeds.

  Attributes:
    half: of the 95 % interval, mean +- half (Student's t).
    margin: how far beyond a bound the true difference has to lie for the
      interval to leave it out in about 80 of 100 studies of this spread.
  """

  mean: float
  half: float
  n: int
  margin: float


def paired(found: Sequence[float], against: Sequence[float]) -> Finding:
  """Of numbers of the same seeds, in the same order.

  Raises:
    ValueError: fewer than two seeds, which have no spread.
  """
  differences = np.asarray(found, float) - np.asarray(against, float)
  n = len(differences)
  if n < 2:
    raise ValueError(f'{n} seeds have no spread')
  error = float(np.std(differences, ddof=1)) / math.sqrt(n)
  t = stats.t(n - 1)
  half = float(t.ppf((1 + LEVEL) / 2)) * error
  margin = half + float(t.ppf(POWER)) * error
  return Finding(float(np.mean(differences)), half, n, margin)


def resolvable(claim: Claim, finding: Finding) -> float:
  """The smallest size that settles the claim whatever the difference's sign.

  Raises:
    ValueError: the claim has no finite bound.
  """
  bounds = [abs(b) for b in (claim.low, claim.high) if math.isfinite(b)]
  return max(bounds) + finding.margin


def verdict(claim: Claim, finding: Finding | None) -> str:
  """One of the four; an interval that is partly claimed resolves nothing.

  Nor do fewer seeds than SEEDS, whatever their interval.
  """
  if claim.untestable:
    return NOT_TESTABLE
  if finding is None or finding.n < SEEDS:
    return NOT_RESOLVED
  low, high = finding.mean - finding.half, finding.mean + finding.half
  if claim.low < low and high < claim.high:
    return SUPPORTED
  if high < claim.low or claim.high < low:
    return CONTRADICTED
  return NOT_RESOLVED


def find(claim: Claim, rows: Sequence[dict]) -> Finding | None:
  """From the rows of both arms; None of fewer than two common seeds.

  A number that is not there, or None as JSON has what is not finite, does not
  count: its seed is left out of both.
  """
  of = lambda arm: {
    row['seed']: row[claim.metric]
    for row in rows
    if row['arm'] == arm and row.get(claim.metric) is not None
  }
  found, against = of(claim.arm), of(claim.against)
  seeds = sorted(found.keys() & against.keys())
  if claim.untestable or len(seeds) < 2:
    return None
  return paired([found[s] for s in seeds], [against[s] for s in seeds])
