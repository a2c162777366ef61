"""The picture of this study: loss beside FLOPs, memory and time."""

from experiments import pictures
from experiments.leaderboard import study


def draw(rows, folder):
  figure, (axes,) = pictures.figure(18, 6, 4)
  pictures.differences(axes[0], study.CLAIMS, rows, 'nats a token')
  costs = (
    ('flops_per_token', 'MFLOPs a token', 1e6),
    ('peak_bytes', 'peak GB of the process', 1e9),
    ('train_seconds', 'CPU seconds of training', 1),
  )
  for place, (key, label, scale) in zip(axes[1:], costs, strict=True):
    labels = label, 'held-out nats a token'
    pictures.means(place, rows, key, 'eval_loss', labels, scale)
  pictures.save(figure, folder)
