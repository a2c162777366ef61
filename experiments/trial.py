"""One run of a study, in a process of its own.

  python -m experiments.trial STUDY ARM SEED DATA WORKDIR

trains, measures and writes WORKDIR/row.json. Killed, the same command goes on.
"""

import json
import pathlib
import resource
import sys
import time
from types import ModuleType

from absl import logging

from experiments import results
from moe_jax import job as jobs
from moe_jax import malloc, metrics, programs, routing, train

ROW = 'row.json'
KEPT = (
  'initial_loss eval_loss eval_bits_per_byte eval_accuracy eval_consistency'
  ' eval_bleu eval_chrf steps tokens params_total params_active flops_per_token'
).split()


def run(
  study: ModuleType,
  arm: str,
  seed: int,
  data: pathlib.Path,
  workdir: pathlib.Path,
) -> dict:
  """Trains an arm to its end; returns its line of results.jsonl."""
  c = study.arms(data)[arm]
  made_with = results.made_with(study, {arm: c}, data)[arm]
  c.seed, c.keep_checkpoints = seed, 1
  # A run that ended without a line is to be measured still.
  (workdir / 'summary.json').unlink(missing_ok=True)
  job = jobs.prepare(c, str(workdir))
  # Of the CPU: other work beside takes little of that.
  summary = train.run(job, clock=time.process_time)
  row = {
    'arm': arm,
    'seed': seed,
    **{key: summary[key] for key in KEPT if key in summary},
    'train_seconds': summary['tokens'] / summary['tokens_per_second'],
    'peak_bytes': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    'curve': _curve(workdir),
  }
  measure = results.measure(study)
  if measure:
    with programs.precision(job):
      row |= measure(job, routing.restore(job, summary['steps']))
  return {**metrics.jsonable(row, digits=9), **made_with}


def _curve(workdir):
  """[step, loss] of every evaluation."""
  lines = metrics.read(workdir)
  return [[x['step'], x['eval_loss']] for x in lines if 'eval_loss' in x]


def main() -> None:
  name, arm, seed, data, workdir = sys.argv[1:]
  logging.set_verbosity(logging.WARNING)
  malloc.keep()
  workdir = pathlib.Path(workdir)
  row = run(results.study(name), arm, int(seed), pathlib.Path(data), workdir)
  metrics.replace(workdir / ROW, json.dumps(row) + '\n')


if __name__ == '__main__':
  main()
