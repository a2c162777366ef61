"""THOR (2110.04260): random experts that agree, against a learned router."""

import pathlib

import ml_collections

from experiments.harness.claims import Claim
from moe_jax import config

DATA = ('lohelp-mt',)
# Ways to choose experts at inference; that of training, `batch`, is not tried.
MODES = ('token', 'sequence', 'position', 'fixed', 'ensemble')
COLUMNS = {
  'eval_bleu': 'BLEU',
  'eval_chrf': 'chrF',
  'copy_bleu': 'BLEU of copied sources',
  'copy_chrf': 'chrF of them',
  'eval_loss': 'nats a token',
  'ensemble_bleu': 'BLEU of all experts',
  'eval_consistency': 'nats between two draws',
  'draw_deviation': 'deviation over draws, nats',
  **{f'{mode}_loss': f'by {mode}' for mode in MODES},
}
E, STEPS = 2, 400
MANY = '(de|es|fr|it|nl|vi)'


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """Every second feed-forward has 2 experts, of which a token meets one."""

  def arm(languages='de', *, experts=E, alpha=None, router=None, steps=STEPS):
    c = config.default()
    c.steps, c.batch_size, c.seq_len = steps, 32, 40
    c.eval_every = c.checkpoint_every = steps // 2
    several = languages == MANY
    where = '*' if several else languages
    folder = data / 'lohelp-mt'
    c.data = config.source(
      'pairs',
      path=str(folder / f'train.en-{where}.tsv.xz'),
      eval_path=str(folder / f'valid.en-{where}.tsv.xz'),
      language=f'en-{MANY}' if several else '',
      vocab_size=2048,
      eval_lines=200,
      bleu_lines=200,
    )
    c.model = config.model('translator', N=2, encoder_N=2, D=128, H=4, F=256)
    c.model.update(pattern='md', E=experts, expert_F=256, block='post')
    c.model.update(init='thor', dropout=0.1, embed_std=128**-0.5, eps=1e-5)
    c.objective = config.choice(
      'objective', 'next_token', losses={'balance': 0.01}, smoothing=0.1
    )
    if router:
      c.model.router = router
    else:
      c.model.router = config.router('random', per='batch', eval_per='sequence')
    if alpha is not None:
      c.objective = config.choice(
        'objective', 'consistency', losses={}, alpha=alpha
      )
    if experts == 0:
      c.model.update(pattern='d', E=E)
    c.optimizer.update(name='muon', learning_rate=1e-2, b2=0.98, clip=0.0)
    c.optimizer.update(schedule='inverse_sqrt', warmup=0.1)
    return c

  def four(prefix, languages):
    """Those that every data set has."""
    switch = config.router('switch', capacity=None)
    return {
      f'{prefix}dense': arm(languages, experts=0),
      f'{prefix}Switch': arm(languages, router=switch),
      f'{prefix}R-Drop': arm(languages, experts=1, alpha=5.0),
      f'{prefix}THOR': arm(languages, alpha=5.0),
    }

  twice = dict(steps=2 * STEPS)
  return {
    **four('', 'de'),
    'random experts, one pass': arm(),
    'THOR, alpha 0': arm(alpha=0.0),
    'THOR, alpha 1': arm(alpha=1.0),
    # A step of THOR has two passes.
    'dense, twice the steps': arm(experts=0, **twice),
    'Switch, twice the steps': arm(
      router=config.router('switch', capacity=None), **twice
    ),
    **four('vi: ', 'vi'),
    **four('six: ', MANY),
  }


UP = dict(low=0.0, high=float('inf'))
MAIN = dict(UP, headline=True)
BLEU, CHRF = 'eval_bleu', 'eval_chrf'

CLAIMS = [
  Claim('THOR translates better than Switch', 'THOR', 'Switch', BLEU, **MAIN),
  Claim(
    'THOR translates better than a dense model',
    'THOR', 'dense', BLEU, **MAIN,
  ),
  Claim(
    'THOR translates better than Switch of as many FLOPs (a control)',
    'THOR', 'Switch, twice the steps', BLEU, **MAIN,
  ),
  Claim(
    'THOR translates better than a dense model of as many FLOPs (a control)',
    'THOR', 'dense, twice the steps', BLEU, **UP,
  ),
  Claim(
    'THOR translates better than R-Drop, which has one expert (the control'
    ' that the paper lacks)',
    'THOR', 'R-Drop', BLEU, **MAIN,
  ),
  Claim(
    'consistency is what helps THOR',
    'THOR', 'THOR, alpha 0', BLEU, **MAIN,
  ),
  Claim('a little of it helps', 'THOR, alpha 1', 'THOR, alpha 0', BLEU, **UP),
  Claim('consistency lowers the loss', 'THOR', 'THOR, alpha 0'),
  Claim('THOR has a lower loss than Switch', 'THOR', 'Switch'),
  Claim('THOR has a lower loss than a dense model', 'THOR', 'dense'),
  Claim('THOR has a lower loss than R-Drop', 'THOR', 'R-Drop', headline=True),
  Claim(
    'THOR has a lower loss than Switch of as many FLOPs',
    'THOR', 'Switch, twice the steps',
  ),
  Claim(
    'random experts are no worse than Switch (by 0.05 nats)',
    'random experts, one pass', 'Switch', high=0.05, headline=True,
  ),
  *(
    Claim(
      'random experts in two passes, without consistency, have a lower loss'
      f' than {rival} in as many steps (ours)',
      'THOR, alpha 0', rival,
    )
    for rival in ('Switch', 'dense')
  ),
  *(
    Claim(f'THOR translates better than {rival}', 'THOR', rival, CHRF, **UP)
    for rival in ('Switch', 'dense', 'R-Drop')
  ),
  Claim(
    'consistency makes draws agree',
    'THOR', 'THOR, alpha 0', 'eval_consistency',
  ),
  *(
    Claim(
      f'{name}: THOR {text} than {rival}',
      f'{data}: THOR', f'{data}: {rival}', metric, **bounds,
    )
    for name, data in (('en-vi', 'vi'), ('six languages', 'six'))
    for rival in ('Switch', 'dense', 'R-Drop')
    for text, metric, bounds in (
      ('translates better', BLEU, UP),
      ('translates better', CHRF, UP),
      ('has a lower loss', 'eval_loss', {}),
    )
  ),
  Claim(
    'BLEU of converged models; 18 times fewer parameters than a rival',
    untestable='no such budget',
  ),
]  # fmt: skip
