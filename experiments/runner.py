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
import tempfile
import time
from collections.abc import Iterable
from types import ModuleType

from experiments import pages, results, tables


class Failed(Exception):
  """A run ended without its line; the last thing that it said."""


class Worker:
  """A process on its part of the cores, which does an order at a time."""

  def __init__(
    self,
    study: ModuleType,
    data: pathlib.Path,
    workdir: pathlib.Path,
    cores: set[int],
  ):
    self._study, self._data, self._workdir = study, data, workdir
    self._cores, self._process = cores, None
    self._told = tempfile.TemporaryFile('w+')

  def do(self, what: str, arm: str, seed: int = 0) -> dict:
    """What a run or a cost found; Failed if its process ended instead."""
    if self._process is None:
      self._start()
    process = self._process
    workdir = self._workdir / f'{arm.replace(" ", "_")}-{seed}'
    order = dict(what=what, arm=arm, seed=seed, workdir=str(workdir))
    answer = ''
    try:
      process.stdin.write(json.dumps(order) + '\n')
      process.stdin.flush()
      answer = process.stdout.readline().strip()
    except BrokenPipeError:
      pass  # it says why below
    if answer:
      return json.loads(pathlib.Path(answer).read_text())
    self._process = None
    self._told.seek(0)
    last = (self._told.read().strip().splitlines() or [''])[-1]
    code = process.wait()
    raise Failed(f'{what} of {arm}, seed {seed}: exit {code}: {last}')

  def _start(self):
    env = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(self._workdir / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
      # Several share a GPU.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
    name = results.folder(self._study).name
    self._told.truncate(0)
    begin = f'sched_setaffinity(0, {self._cores})'
    trial = 'run_module("experiments.trial", run_name="__main__")'
    program = f'import os, runpy; os.{begin}; runpy.{trial}'
    self._process = subprocess.Popen(
      [sys.executable, '-c', program, name, str(self._data)],
      cwd=results.ROOT,
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._told,
      text=True,
    )

  def end(self) -> None:
    """At once, whatever it does; the same command goes on with that."""
    if self._process:
      self._process.kill()
      self._process.wait()


def all_of(
  workers: list[Worker], what: str, left: list[tuple]
) -> Iterable[dict]:
  """What these orders found, as it comes; Failed at the end if any failed."""
  free = queue.SimpleQueue()
  for worker in workers:
    free.put(worker)

  def make(order):
    worker = free.get()
    try:
      return worker.do(what, *order)
    finally:
      free.put(worker)

  failed = []
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    futures = [pool.submit(make, order) for order in left]
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          yield future.result()
        except Failed as error:
          failed.append(str(error))
          print(f'FAILED {error}', flush=True)
    finally:
      for future in futures:
        future.cancel()
      for worker in workers:
        worker.end()
  if failed:
    raise Failed(f'{len(failed)} failed; {failed[0]}')


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
  now = results.made_with(study, arms, data, _device())
  results.check(rows, now, results.folder(study) / results.FILE)
  left = left_of(study, arms, seeds)
  began, metric = time.monotonic(), next(iter(study.COLUMNS))
  print(f'{name}: {len(left)} runs to make, {len(rows)} are there', flush=True)
  workers = _workers(study, data, workdir / name, jobs)
  for made, row in enumerate(all_of(workers, 'run', left), start=1):
    results.add(study, row)
    rest = (time.monotonic() - began) / made * (len(left) - made)
    print(
      f'{made} of {len(left)}: {row["arm"]}, seed {row["seed"]}:'
      f' {metric} {row[metric]:.4f};'
      f' about {rest / 60:.0f} minutes left',
      flush=True,
    )


def costs(
  name: str, data: pathlib.Path, workdir: pathlib.Path, jobs: int
) -> None:
  """What a step of each arm takes, anew, timed one after the other.

  Raises:
    ValueError, Failed: as for `run`.
  """
  study = results.study(name)
  arms = study.arms(data)
  workers = _workers(study, data, workdir / name, jobs)
  found = list(all_of(workers, 'cost', [(arm,) for arm in arms]))
  results.put_costs(study, sorted(found, key=lambda f: [*arms].index(f['arm'])))


def _device():
  """Asked by another process: a TPU has room for one, which is a worker."""
  ask = 'import jax; print(jax.devices()[0].device_kind)'
  done = subprocess.run(
    [sys.executable, '-c', ask], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def _workers(study, data, workdir, jobs):
  cores = sorted(os.sched_getaffinity(0))
  return [
    Worker(study, data, workdir, set(cores[i::jobs] or cores))
    for i in range(jobs)
  ]


def write(name: str) -> None:
  """The tables into README.md, and the picture, of the lines there are."""
  study = results.study(name)
  folder, rows = results.folder(study), results.read(study)
  text = tables.arms(study, rows) + '\n' + tables.claims_of(study, rows)
  text += f'\n![What is claimed, and found]({name}.png)\n'
  pages.put(folder / 'README.md', f'python -m experiments.run {name}', text)
  plot = runpy.run_path(str(folder / 'plot.py'))
  plot['draw'](results.with_costs(study, rows), folder)
  verdicts = collections.Counter(tables.verdicts(study, rows))
  for verdict, many in verdicts.items():
    print(f'{many} x {verdict}')
