"""The picture of this study: differences in text and in images."""

from experiments import pictures
from experiments.momentum import study


def draw(rows, folder):
  figure, ((left, right),) = pictures.figure(13, 6, 2)
  losses = [c for c in study.CLAIMS if c.metric.endswith('loss')]
  errors = [c for c in study.CLAIMS if c.metric.endswith('error')]
  pictures.differences(left, losses, rows, 'nats a token')
  pictures.differences(right, errors, rows, 'errors in per cent')
  pictures.save(figure, folder)
