"""Runs the arms of this study and adds a line a run to results.jsonl.

  python -m experiments.moe_vs_dense.study --train=GLOB --held_out=GLOB

A run that stands in results.jsonl already is not run again.
"""

import json
import pathlib
import runpy

from absl import app, flags, logging

from moe_jax import config, job, train

_TRAIN = flags.DEFINE_string('train', None, 'Text to train on, a glob.')
_HELD_OUT = flags.DEFINE_string('held_out', None, 'Held-out text, a glob.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds of each arm.')
_STEPS = flags.DEFINE_integer('steps', None, 'Instead of those of the config.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/moe_vs_dense', 'For the runs.')

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / 'configs'
RESULTS = HERE / 'results.jsonl'
KEPT = (
  'initial_loss eval_loss eval_bits_per_byte steps tokens tokens_per_second'
  ' params_total params_active flops_per_token wall_seconds implementation'
  ' devices versions corpus_sha256'
).split()


def arms():
  """name -> config; one thing differs from `moe`."""
  load = lambda name: runpy.run_path(str(CONFIGS / name))['get_config']()
  random = load('tiny.py')
  random.model.router = config.router('random', k=random.model.router.k)
  return {'moe': load('tiny.py'), 'dense': load('dense.py'), 'random': random}


def done():
  """The (arm, seed) that have been run."""
  if not RESULTS.exists():
    return set()
  lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
  return {(line['arm'], line['seed']) for line in lines}


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  for arm, c in arms().items():
    for seed in range(_SEEDS.value):
      if (arm, seed) in done():
        continue
      c.seed = seed
      c.eval_every = c.checkpoint_every = 0
      c.steps = _STEPS.value or c.steps
      c.data.update(source='text', path=_TRAIN.value, eval_path=_HELD_OUT.value)
      workdir = pathlib.Path(_WORKDIR.value) / f'{arm}-{seed}'
      prepared = job.prepare(c, str(workdir))
      summary = train.run(prepared)
      line = {'arm': arm, 'seed': seed, **{k: summary[k] for k in KEPT}}
      with RESULTS.open('a') as file:
        file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
  flags.mark_flags_as_required(['train', 'held_out'])
  app.run(main)
