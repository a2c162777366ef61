"""The picture of this study: what is claimed, and loss over steps."""

from experiments.harness import pictures
from experiments.studies.rexmoe import study


def draw(rows, folder):
  figure, ((left, right),) = pictures.figure(12, 5, 2)
  losses = [claim for claim in study.CLAIMS if claim.metric == 'eval_loss']
  pictures.differences(left, losses, rows, 'nats a token')
  shown = ('r=1', 'r=4', 'r=4, linear', 'r=1 of 32 experts')
  pictures.curves(right, rows, shown, 'held-out nats a token, novels')
  pictures.save(figure, folder)
