"""Runs of a study, one after the other, in a process of its own.

  python -m experiments.harness.trial STUDY DATA < orders

An order is a line of JSON, {"arm": ..., "seed": ..., "workdir": ...}. The run
trains, measures and writes WORKDIR/row.json; killed, the same order goes on.
The answer is a line, too: the file that was written.
"""

import json
import os
import pathlib
import sys
from types import ModuleType

import jax
from absl import logging

from experiments.harness import results
from moe_jax.report import metrics
from moe_jax.training import checkpoint, jobs, loop, malloc, train_step

ROW = 'row.json'
KEPT = (
  'initial_loss eval_loss eval_bits_per_byte eval_accuracy eval_consistency'
  ' eval_bleu eval_chrf copy_bleu copy_chrf steps tokens params_total'
  ' params_active flops_per_token'
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
  device = jax.devices()[0].device_kind
  made_with = results.made_with(study, {arm: c}, data, device)[arm]
  c.seed, c.keep_checkpoints = seed, 1
  # A run that ended without a line is to be measured still.
  (workdir / 'summary.json').unlink(missing_ok=True)
  job = jobs.prepare(c, str(workdir))
  summary = loop.run(job)
  row = {
    'arm': arm,
    'seed': seed,
    **{key: summary[key] for key in KEPT if key in summary},
    'wall_seconds': summary['wall_seconds'],  # beside whatever else ran
    'curve': _curve(workdir),
  }
  measure = results.measure(study)
  if measure:
    with train_step.precision(job):
      row |= measure(job, _trained(job))
  return {**metrics.jsonable(row, digits=9), **made_with}


def _trained(job):
  with checkpoint.Checkpoints(job.workdir, keep=1) as saved:
    return saved.restore(train_step.abstract_state(job)).state


def _curve(workdir):
  """[step, loss] of every evaluation."""
  lines = metrics.read(workdir)
  return [[x['step'], x['eval_loss']] for x in lines if 'eval_loss' in x]


def main() -> None:
  name, data = sys.argv[1:]
  logging.set_verbosity(logging.WARNING)
  malloc.retain_freed_memory()
  # What a run prints is not an answer.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  study = results.study(name)
  for line in sys.stdin:
    order = json.loads(line)
    workdir = pathlib.Path(order['workdir'])
    row = run(study, order['arm'], order['seed'], pathlib.Path(data), workdir)
    metrics.replace(workdir / ROW, json.dumps(row) + '\n')
    jax.clear_caches()  # or a worker's memory would grow with every run
    print(workdir / ROW, file=answers, flush=True)


if __name__ == '__main__':
  main()
