"""Runs a study: its arms, seed by seed, then its tables and its picture.

  python -m experiments.run coe --seeds=3 --jobs=2 --data=DIR

Adds a line a run to experiments/studies/<name>/results.jsonl. Runs that stand
there are not made again; a run that was killed goes on. Lines of other code,
configs, data, packages or devices are not added to: the command says what
differs, and ends. Several jobs may share a GPU, best under NVIDIA's
MPS; a TPU has room for one, --jobs=1.

  python -m experiments.run coe --cost --data=DIR

times a step of each arm, and writes cost.jsonl; the machine has to be idle.
"""

import pathlib
import signal
import sys

from absl import app, flags, logging

from experiments.harness import runner

_SEEDS = flags.DEFINE_integer('seeds', 5, 'Seeds of each arm.', lower_bound=1)
_JOBS = flags.DEFINE_integer(
  'jobs', 2, 'Runs at a time; each has its part of the cores.', lower_bound=1
)
_DATA = flags.DEFINE_string('data', 'data', 'A folder of data sets.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs', 'Runs go to WORKDIR/<name>.')
_COST = flags.DEFINE_bool('cost', False, 'No runs, what a step of each costs.')
_TABLES = flags.DEFINE_bool('tables', False, 'No runs, only what they say.')


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError('one study: python -m experiments.run NAME')
  logging.set_verbosity(logging.WARNING)  # jax tells of absent platforms
  data, workdir = (
    pathlib.Path(flag.value).absolute() for flag in (_DATA, _WORKDIR)
  )
  # Workers are ended with this, whoever ends it.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    if _COST.value:
      runner.costs(argv[1], data)
    elif not _TABLES.value:
      runner.run(argv[1], data, workdir, _SEEDS.value, _JOBS.value)
    runner.write(argv[1])
  except (ValueError, OSError, runner.Failed) as error:
    sys.exit(f'experiments.run: {error}')


if __name__ == '__main__':
  app.run(main)
