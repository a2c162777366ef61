"""The picture of this study: BLEU, and its differences."""

from experiments import pictures
from experiments.thor import study


def draw(rows, folder):
  figure, ((left, right),) = pictures.figure(13, 6, 2)
  claims = [claim for claim in study.CLAIMS if claim.metric == study.BLEU]
  pictures.differences(left, claims, rows, 'BLEU')
  german = [
    row | {'seconds': row['steps'] * row['step_seconds']}
    for row in rows
    if ':' not in row['arm'] and 'step_seconds' in row
  ]
  labels = 'seconds of training, alone on the device', 'BLEU, en-de'
  pictures.means(right, german, 'seconds', study.BLEU, labels)
  pictures.save(figure, folder)
