"""The picture of this study: loss beside FLOPs, memory and time."""

from experiments import pictures
from experiments.leaderboard import study


def draw(rows, folder):
  figure, (axes,) = pictures.figure(18, 6, 4)
  pictures.differences(axes[0], study.CLAIMS, rows, 'nats a token')
  costs = (
    ('flops_per_token', 'MFLOPs a token', 1e6),
    ('step_bytes', 'MiB of a step', 2**20),
    ('step_seconds', 'ms a step', 1e-3),
  )
  for place, (key, label, scale) in zip(axes[1:], costs, strict=True):
    labels = label, 'held-out nats a token'
    pictures.means(place, rows, key, 'eval_loss', labels, scale)
  pictures.save(figure, folder)
