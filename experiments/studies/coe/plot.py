"""The picture of this study: what is claimed, and loss beside work."""

from experiments.harness import pictures
from experiments.studies.coe import study


def draw(rows, folder):
  figure, ((left, right),) = pictures.figure(12, 6, 2)
  pictures.differences(left, study.CLAIMS, rows, 'nats a token')
  sums = [row for row in rows if not row['arm'].startswith('novels')]
  labels = 'MFLOPs a token', 'held-out nats a token, GSM8K'
  pictures.means(right, sums, 'flops_per_token', 'eval_loss', labels, 1e6)
  pictures.save(figure, folder)
