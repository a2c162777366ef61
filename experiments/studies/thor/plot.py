"""The picture of this study: loss and BLEU, and what the loss took."""

from experiments.harness import pictures
from experiments.studies.thor import study


def draw(rows, folder):
  figure, ((left, middle, right),) = pictures.figure(17, 6, 3)
  for axes, metric in ((left, 'eval_loss'), (middle, study.BLEU)):
    claims = [claim for claim in study.CLAIMS if claim.metric == metric]
    pictures.differences(axes, claims, rows, study.COLUMNS[metric])
  german = [
    row | {'seconds': row['steps'] * row['step_seconds']}
    for row in rows
    if ':' not in row['arm'] and 'step_seconds' in row
  ]
  labels = 'seconds of training, alone on the device', 'nats a token, en-de'
  pictures.means(right, german, 'seconds', 'eval_loss', labels)
  pictures.save(figure, folder)
