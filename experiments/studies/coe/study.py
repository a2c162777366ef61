"""Chain-of-Experts (2506.18945): is a second pass worth its experts?

K/N counts as the paper does: K routed experts an iteration, of N - 1, and one
shared expert that sees every token in every iteration.
"""

import pathlib

import ml_collections

from experiments.harness import language
from experiments.harness.claims import Claim
from moe_jax import config

DATA = ('gsm8k', 'eltec-eng')
COLUMNS = {'eval_loss': 'nats a token'}


def arms(data: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """name -> config; 'pre' has a standard pre-norm block."""

  def arm(
    k,
    *,
    C=1,
    N=32,
    layers=2,
    carried=True,
    inner_residual=None,
    routing='each',
    text=language.sums,
  ):
    c = language.base(language.ON_GPU, text(data))
    c.model.router.k = k
    c.model.E, c.model.N, c.model.iterations = N - 1, layers, C
    # The paper's block normalises the stream and adds answers to that; a
    # standard one adds them to the stream itself.
    c.model.residual = config.choice(
      'residual', 'replace' if carried else 'plain'
    )
    c.model.inner_residual = inner_residual or (
      'add' if carried or C > 1 else 'replace'
    )
    c.model.routing = routing
    c.objective.losses.update(balance=0.0, sequence_balance=0.001, z=0.0)
    return c

  novels = dict(text=language.novels)
  pre = dict(carried=False)
  return {
    'MoE 8/32': arm(8),
    'CoE-2 4/32': arm(4, C=2),
    'CoE-2 8/32': arm(8, C=2),
    'MoE 16/32': arm(16),
    'MoE 8/32, 4 layers': arm(8, layers=4),
    'CoE-2 4/24': arm(4, C=2, N=24),
    'pre MoE 8/32': arm(8, **pre),
    'pre CoE-2 4/32': arm(4, C=2, **pre),
    'pre CoE-2 8/32': arm(8, C=2, **pre),
    'pre MoE 16/32': arm(16, **pre),
    'pre MoE 8/32, 4 layers': arm(8, layers=4, **pre),
    'CoE-2 4/32, one gate': arm(4, C=2, routing='shared'),
    'CoE-2 4/32, routed once': arm(4, C=2, routing='once'),
    'CoE-2 4/32, outer': arm(4, C=2, inner_residual='replace', **pre),
    'CoE-2 4/32, init': arm(4, C=2, inner_residual='init'),
    'novels MoE 8/32': arm(8, **novels),
    'novels CoE-2 4/32': arm(4, C=2, **novels),
    'novels pre MoE 8/32': arm(8, **pre, **novels),
    'novels pre CoE-2 4/32': arm(4, C=2, **pre, **novels),
  }


NO_WORSE = 0.02  # nats

CLAIMS = [
  Claim(
    'CoE-2(4) is better than MoE(8), of as many parameters and FLOPs',
    'CoE-2 4/32', 'MoE 8/32', headline=True,
  ),
  Claim(
    'CoE-2(4) is better than MoE(8) in a standard pre-norm block (a control'
    ' that the paper lacks)',
    'pre CoE-2 4/32', 'pre MoE 8/32', headline=True,
  ),
  Claim(
    'CoE-2(4) is better than MoE(8) on novels',
    'novels CoE-2 4/32', 'novels MoE 8/32',
  ),
  Claim(
    'CoE-2(4) is better than MoE(8) on novels in a pre-norm block',
    'novels pre CoE-2 4/32', 'novels pre MoE 8/32', headline=True,
  ),
  Claim(
    'CoE-2(8) is better than MoE(16), of as many parameters and FLOPs',
    'CoE-2 8/32', 'MoE 16/32', headline=True,
  ),
  Claim(
    'CoE-2(8) is better than MoE(16) in a pre-norm block',
    'pre CoE-2 8/32', 'pre MoE 16/32', headline=True,
  ),
  Claim(
    f'a quarter of the experts less costs CoE-2(4) no more than {NO_WORSE}'
    ' nats beside MoE(8)',
    'CoE-2 4/24', 'MoE 8/32', high=NO_WORSE,
  ),
  Claim(
    f'CoE-2(8) is within {NO_WORSE} nats of twice the layers',
    'CoE-2 8/32', 'MoE 8/32, 4 layers', high=NO_WORSE,
  ),
  Claim(
    f'CoE-2(8) in a pre-norm block is within {NO_WORSE} nats of twice the'
    ' layers',
    'pre CoE-2 8/32', 'pre MoE 8/32, 4 layers', high=NO_WORSE, headline=True,
  ),
  Claim(
    'a gate an iteration is better than one gate for both',
    'CoE-2 4/32', 'CoE-2 4/32, one gate',
  ),
  Claim(
    'a second routing is better than the first one again',
    'CoE-2 4/32', 'CoE-2 4/32, routed once',
  ),
  Claim(
    'the inner residual is better than the outer one',
    'CoE-2 4/32', 'CoE-2 4/32, outer',
  ),
  Claim(
    'the inner residual is better than the outer one, both in a pre-norm block'
    ' (ours)',
    'pre CoE-2 4/32', 'CoE-2 4/32, outer',
  ),
  Claim(
    'the inner residual is better than that to the first input',
    'CoE-2 4/32', 'CoE-2 4/32, init',
  ),
  Claim(
    'CoE-2(4) with the residual to the first input is better than MoE(8)'
    ' (ours)',
    'CoE-2 4/32, init', 'MoE 8/32',
  ),
  Claim(
    "the paper's MoE, whose stream is normalised in every layer, is no worse"
    ' than a standard one (ours, of the baseline)',
    'MoE 8/32', 'pre MoE 8/32', high=NO_WORSE,
  ),
  Claim(
    'the gain lasts for 10,000 steps; zero-shot accuracy',
    untestable='no such budget',
  ),
]  # fmt: skip
