"""Makes the runs of a study that are left, some at a time, and its page."""

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

from experiments import pages, results, tables, trial


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


def run(
  name: str, data: pathlib.Path, workdir: pathlib.Path, seeds: int, jobs: int
) -> None:
  """All arms of a study with so many seeds; says how far it has come.

  Raises:
    ValueError: there is no such study, or data are missing, or there are lines
      that something else has made.
    Failed: a run failed, after all others were made.
  """
  study = results.study(name)
  rows, arms = results.read(study), study.arms(data)
  now = results.made_with(study, arms, data)
  results.check(rows, now, results.folder(study) / results.FILE)
  left = left_of(study, arms, seeds)
  began, metric = time.monotonic(), next(iter(study.COLUMNS))
  print(f'{name}: {len(left)} runs to make, {len(rows)} are there', flush=True)
  lines = all_of(Runner(study, data, workdir / name), left, jobs)
  for made, row in enumerate(lines, start=1):
    results.add(study, row)
    rest = (time.monotonic() - began) / made * (len(left) - made)
    print(
      f'{made} of {len(left)}: {row["arm"]}, seed {row["seed"]}:'
      f' {metric} {row[metric]:.4f}, {row["train_seconds"]:.0f} s;'
      f' about {rest / 60:.0f} minutes left',
      flush=True,
    )


def write(name: str) -> None:
  """The tables into README.md, and the picture, of the lines there are."""
  study = results.study(name)
  folder, rows = results.folder(study), results.read(study)
  text = tables.arms(study, rows) + '\n' + tables.claims_of(study, rows)
  text += f'\n![What is claimed, and found]({name}.png)\n'
  pages.put(folder / 'README.md', f'python -m experiments.run {name}', text)
  runpy.run_path(str(folder / 'plot.py'))['draw'](rows, folder)
  verdicts = collections.Counter(tables.verdicts(study, rows))
  for verdict, many in verdicts.items():
    print(f'{many} x {verdict}')
