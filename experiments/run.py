"""Runs a study: its arms, seed by seed, then its tables and its picture.

  python -m experiments.run coe --seeds=5 --jobs=2 --data=DIR

Adds a line a run to experiments/<name>/results.jsonl. Runs that stand there are
not made again; a run that was killed goes on. Lines of other code, configs,
data or packages are not added to: the command says what differs, and ends.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import queue
import runpy
import subprocess
import sys
import time
from collections.abc import Iterable

from absl import app, flags

from experiments import pages, results, tables, trial

_SEEDS = flags.DEFINE_integer('seeds', 5, 'Seeds of each arm.', lower_bound=1)
_JOBS = flags.DEFINE_integer(
  'jobs', 2, 'Runs at a time; each has its part of the cores.', lower_bound=1
)
_DATA = flags.DEFINE_string('data', 'data', 'A folder of data sets.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs', 'Runs go to WORKDIR/<name>.')
_TABLES = flags.DEFINE_bool('tables', False, 'No runs, only what they say.')


class Failed(Exception):
  """A run ended without its line; the last thing that it said."""


class Runner:
  """Makes the runs of a study that are left."""

  def __init__(self, study, data: pathlib.Path, workdir: pathlib.Path):
    self._study, self._data, self._workdir = study, data, workdir
    self._running = set()

  def make(self, arm: str, seed: int, cores: set[int]) -> dict:
    """The line of a run, made in a process on these cores."""
    name = results.folder(self._study).name
    workdir = self._workdir / f'{arm.replace(" ", "_")}-{seed}'
    env = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(self._workdir / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
    }
    process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'experiments.trial'),
        *(name, arm, str(seed), str(self._data), str(workdir)),
      ],
      cwd=results.ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    self._running.add(process)
    _, told = process.communicate()
    self._running.discard(process)
    if process.returncode:
      last = (told.strip().splitlines() or [''])[-1]
      raise Failed(f'{arm} of seed {seed}: exit {process.returncode}: {last}')
    return json.loads((workdir / trial.ROW).read_text())

  def kill(self) -> None:
    """Ends all that is running; the same command goes on with it."""
    for process in list(self._running):
      process.kill()


def all_of(
  runner: Runner, left: list[tuple[str, int]], jobs: int
) -> Iterable[dict]:
  """The lines of these runs, as they come; Failed at the end if any failed."""
  cores, free = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
  for i in range(jobs):
    free.put(set(cores[i::jobs] or cores))

  def make(arm, seed):
    mine = free.get()
    try:
      return runner.make(arm, seed, mine)
    finally:
      free.put(mine)

  failed = []
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    futures = [pool.submit(make, *run) for run in left]
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          yield future.result()
        except Failed as error:
          failed.append(str(error))
          print(f'FAILED {error}', flush=True)
    except BaseException:
      for future in futures:
        future.cancel()
      runner.kill()
      raise
  if failed:
    raise Failed(f'{len(failed)} runs failed; {failed[0]}')


def left_of(study, arms: Iterable[str], seeds: int) -> list[tuple[str, int]]:
  """The (arm, seed) without a line, all arms of a seed before the next."""
  done = {(row['arm'], row['seed']) for row in results.read(study)}
  every = [(arm, seed) for seed in range(seeds) for arm in arms]
  return [run for run in every if run not in done]


def write(study) -> None:
  """The tables into README.md, and the picture, of the lines that there are."""
  folder, rows = results.folder(study), results.read(study)
  text = tables.arms(study, rows) + '\n' + tables.claims_of(study, rows)
  pages.put(
    folder / 'README.md', f'python -m experiments.run {folder.name}', text
  )
  runpy.run_path(str(folder / 'plot.py'))['draw'](rows, folder)


def run(name: str, data: pathlib.Path, workdir: pathlib.Path) -> None:
  study = results.study(name)
  rows = results.read(study)
  if not _TABLES.value:
    arms = study.arms(data)
    now = {arm: results.made_with(study, c, data) for arm, c in arms.items()}
    results.check(rows, now, results.folder(study) / results.FILE)
    left = left_of(study, arms, _SEEDS.value)
    began, made = time.monotonic(), 0
    print(f'{name}: {len(left)} runs to make, {len(rows)} are there')
    for row in all_of(Runner(study, data, workdir / name), left, _JOBS.value):
      results.add(study, row)
      made += 1
      rest = (time.monotonic() - began) / made * (len(left) - made)
      metric = next(iter(study.COLUMNS))
      print(
        f'{made} of {len(left)}: {row["arm"]}, seed {row["seed"]}:'
        f' {metric} {row[metric]:.4f}, {row["train_seconds"]:.0f} s;'
        f' about {rest / 60:.0f} minutes left',
        flush=True,
      )
  write(study)
  for verdict, many in collections.Counter(
    tables.verdicts(study, results.read(study))
  ).items():
    print(f'{many} x {verdict}')


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError('one study: python -m experiments.run NAME')
  try:
    run(
      argv[1],
      pathlib.Path(_DATA.value).absolute(),
      pathlib.Path(_WORKDIR.value).absolute(),
    )
  except (ValueError, OSError, Failed) as error:
    sys.exit(f'experiments.run: {error}')


if __name__ == '__main__':
  app.run(main)
