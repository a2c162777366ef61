"""Runs of a study, one after the other, in a process of its own.

  python -m experiments.trial STUDY DATA < orders

An order is a line of JSON, {"what": "run" or "cost", "arm": ..., "seed": ...,
"workdir": ...}. A run trains, measures and writes WORKDIR/row.json; killed, the
same order goes on. A cost is what a step of an arm takes (cost.py), alone, and
goes to WORKDIR/cost.json. An answer is a line, too: the file that was written.
"""

import json
import os
import pathlib
import sys
from types import ModuleType

import jax
from absl import logging

from experiments import cost, results
from moe_jax import checkpoint, malloc, metrics, programs, train
from moe_jax import job as jobs

ROW, COST = 'row.json', 'cost.json'
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
  made_with = _made_with(study, arm, c, data)
  c.seed, c.keep_checkpoints = seed, 1
  # A run that ended without a line is to be measured still.
  (workdir / 'summary.json').unlink(missing_ok=True)
  job = jobs.prepare(c, str(workdir))
  summary = train.run(job)
  row = {
    'arm': arm,
    'seed': seed,
    **{key: summary[key] for key in KEPT if key in summary},
    'curve': _curve(workdir),
  }
  measure = results.measure(study)
  if measure:
    with programs.precision(job):
      row |= measure(job, _trained(job))
  return {**metrics.jsonable(row, digits=9), **made_with}


def _made_with(study, arm, c, data):
  device = jax.devices()[0].device_kind
  return results.made_with(study, {arm: c}, data, device)[arm]


def _trained(job):
  with checkpoint.Checkpoints(job.workdir, keep=1) as saved:
    return saved.restore(programs.abstract_state(job)).state


def _curve(workdir):
  """[step, loss] of every evaluation."""
  lines = metrics.read(workdir)
  return [[x['step'], x['eval_loss']] for x in lines if 'eval_loss' in x]


def obey(study: ModuleType, data: pathlib.Path, order: dict) -> pathlib.Path:
  """Carries an order out; returns the file with what it found."""
  workdir, arm = pathlib.Path(order['workdir']), order['arm']
  if order['what'] == 'run':
    found = run(study, arm, order['seed'], data, workdir)
    path = workdir / ROW
  else:
    c = study.arms(data)[arm]
    made_with = _made_with(study, arm, c, data)
    workdir.mkdir(parents=True, exist_ok=True)
    found = {'arm': arm, **cost.of(c), **made_with}
    path = workdir / COST
  metrics.replace(path, json.dumps(found) + '\n')
  jax.clear_caches()  # or a worker's memory would grow with every run
  return path


def main() -> None:
  name, data = sys.argv[1:]
  logging.set_verbosity(logging.WARNING)
  malloc.keep()
  # What a run prints is not an answer.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  study = results.study(name)
  for line in sys.stdin:
    path = obey(study, pathlib.Path(data), json.loads(line))
    print(path, file=answers, flush=True)


if __name__ == '__main__':
  main()
