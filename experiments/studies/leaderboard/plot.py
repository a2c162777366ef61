"""The picture of this study: loss beside FLOPs, memory and time."""

import statistics

from experiments.harness import claims, pictures
from experiments.studies.leaderboard import study

# Of nats a token above or below the base; what is beyond is told in numbers.
WITHIN = -0.1, 0.2
# Every arm less the base, also those which the base is claimed to beat.
WORDS = {
  claims.SUPPORTED: 'lower',
  claims.CONTRADICTED: 'higher',
  claims.NOT_RESOLVED: 'not told apart',
}


def draw(rows, folder):
  figure, (axes,) = pictures.figure(17, 6, 4)
  loss = {
    arm: statistics.mean(row['eval_loss'] for row in rows if row['arm'] == arm)
    for arm in {row['arm'] for row in rows}
  }
  place = {arm: i for i, arm in enumerate(sorted(loss, key=loss.get), start=1)}
  board = [
    claims.Claim('', arm, study.BASE) for arm in place if arm != study.BASE
  ]
  pictures.differences(
    axes[0],
    board,
    rows,
    f'nats a token beside {study.BASE}',
    name=lambda claim: f'{claim.arm}  {place[claim.arm]}',
    within=WITHIN,
    words=WORDS.get,
  )
  near = [
    row
    for row in rows
    if WITHIN[0] <= loss[row['arm']] - loss[study.BASE] <= WITHIN[1]
  ]
  costs = (
    ('flops_per_token', 'MFLOPs a token', 1e6),
    ('step_bytes', 'MiB of a step', 2**20),
    ('step_seconds', 'ms a step', 1e-3),
  )
  number = lambda arm: arm if arm == study.BASE else str(place[arm])
  for panel, (key, label, scale) in zip(axes[1:], costs, strict=True):
    labels = label, 'held-out nats a token'
    pictures.means(panel, near, key, 'eval_loss', labels, scale, number)
  pictures.save(figure, folder)
