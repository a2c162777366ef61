"""The picture of this study: differences in text and in images."""

from experiments.harness import pictures
from experiments.studies.momentum import study


def draw(rows, folder):
  figure, ((left, right),) = pictures.figure(13, 6, 2)
  for axes, end, unit in (
    (left, 'loss', 'nats a target'),
    (right, 'error', 'errors in per cent'),
  ):
    claims = [claim for claim in study.CLAIMS if claim.metric.endswith(end)]
    pictures.differences(axes, claims, rows, unit, name=_with_metric)
  pictures.save(figure, folder)


def _with_metric(claim):
  """The same two arms meet on several data."""
  arms = f'{claim.arm} - {claim.against}'
  return f'{arms}\n{study.COLUMNS[claim.metric]}'
