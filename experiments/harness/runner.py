"""Makes the runs of a study that are left, some at a time, and its page."""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from types import ModuleType

import jax

from experiments.harness import cost, pages, results, sources, tables

# Several processes share a GPU.
_ENVIRONMENT = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


class Failed(Exception):
  """A run ended without its line; the last thing that it said."""


class Worker:
  """A process on its part of the cores, which makes a run at a time."""

  def __init__(
    self,
    study: ModuleType,
    data: pathlib.Path,
    workdir: pathlib.Path,
    cores: set[int],
  ):
    self._study, self._data, self._workdir = study, data, workdir
    self._cores = cores
    # Who ends it is another thread than who waits for its answer.
    self._lock, self._process, self._ended = threading.Lock(), None, False

  def make(self, arm: str, seed: int) -> dict:
    """The line of a run; Failed if the process ended instead."""
    process = self._alive()
    workdir = self._workdir / f'{arm.replace(" ", "_")}-{seed}'
    order = dict(arm=arm, seed=seed, workdir=str(workdir))
    try:
      process.stdin.write(json.dumps(order) + '\n')
      process.stdin.flush()
      answer = process.stdout.readline().strip()
    except BrokenPipeError:  # it says why
      answer = ''
    if answer:
      return json.loads(pathlib.Path(answer).read_text())
    code = process.wait()
    self._told.seek(0)
    last = (self._told.read().strip().splitlines() or [''])[-1]
    with self._lock:
      self._bury()
    raise Failed(f'{arm}, seed {seed}: exit {code}: {last}')

  def end(self) -> None:
    """At once, whatever it does; the same command goes on with that."""
    with self._lock:
      self._ended = True
      if self._process:
        self._process.kill()
        self._process.wait()
        self._bury()

  def _alive(self):
    with self._lock:
      if self._ended:
        raise Failed('this worker was ended')
      if self._process is None:
        self._start()
      return self._process

  def _start(self):
    env = {  # a cache that the user has named is that of workers too
      'JAX_COMPILATION_CACHE_DIR': str(self._workdir / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
      **os.environ,
      **_ENVIRONMENT,
    }
    name = results.folder(self._study).name
    begin = f'sched_setaffinity(0, {self._cores})'
    trial = 'run_module("experiments.harness.trial", run_name="__main__")'
    program = f'import os, runpy; os.{begin}; runpy.{trial}'
    self._told = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      [sys.executable, '-c', program, name, str(self._data)],
      cwd=results.ROOT,
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._told,
      text=True,
    )

  def _bury(self):
    if self._process:
      with contextlib.suppress(BrokenPipeError):  # of an order it never read
        self._process.stdin.close()
      self._process.stdout.close()
      self._told.close()
      self._process = None


def all_of(
  workers: list[Worker], left: list[tuple[str, int]]
) -> Iterator[dict]:
  """The lines of these runs, as they come; Failed at the end if any failed.

  To be closed by who leaves it early: that ends the workers.
  """
  free = queue.SimpleQueue()
  for worker in workers:
    free.put(worker)

  def make(arm, seed):
    worker = free.get()
    try:
      return worker.make(arm, seed)
    finally:
      free.put(worker)

  failed = []
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    futures = [pool.submit(make, *run) for run in left]
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          found = future.result()
        except Failed as error:
          failed.append(str(error))
          print(f'FAILED {error}', flush=True)
        else:
          yield found
    finally:
      for future in futures:
        future.cancel()
      for worker in workers:
        worker.end()
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
    ValueError: there is no such study, or data are missing, or runs are left
      and there are lines that something else has made; or what makes them
      changes meanwhile.
    Failed: a run failed, after all others were made.
  """
  study = results.study(name)
  rows, arms = results.read(study), study.arms(data)
  where = results.folder(study) / results.FILE
  now = results.made_with(study, arms, data, _device())
  left = left_of(study, arms, seeds)
  if left:
    results.check(rows, now, where)
  for other in sources.others(next(iter(now.values()))['data']):
    print(f'{data / other} is not what the results that are published read')
  began, metric = time.monotonic(), next(iter(study.COLUMNS))
  print(f'{name}: {len(left)} runs to make, {len(rows)} are there', flush=True)
  cores = sorted(os.sched_getaffinity(0))
  workers = [
    Worker(study, data, workdir / name, set(cores[i::jobs] or cores))
    for i in range(jobs)
  ]
  with contextlib.closing(all_of(workers, left)) as lines:
    for made, row in enumerate(lines, start=1):
      results.check([row], now, where)
      results.add(study, row)
      rest = (time.monotonic() - began) / made * (len(left) - made)
      print(
        f'{made} of {len(left)}: {row["arm"]}, seed {row["seed"]}:'
        f' {metric} {row[metric]}; about {rest / 60:.0f} minutes left',
        flush=True,
      )


def costs(name: str, data: pathlib.Path) -> None:
  """What a step of each arm takes, anew.

  Raises:
    ValueError: there is no such study, or data are missing.
  """
  study = results.study(name)
  arms = study.arms(data)
  found = cost.of(arms)
  device = jax.devices()[0].device_kind
  now = results.made_with(study, arms, data, device)
  lines = [{'arm': arm, **found[arm], **now[arm]} for arm in arms]
  results.put_costs(study, lines)


def _device():
  """Asked by another process: a TPU has room for one, which is a worker."""
  done = subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.devices()[0].device_kind)'],
    env=os.environ | _ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise Failed(f'no device: {[*done.stderr.strip().splitlines(), ""][-1]}')
  return done.stdout.strip()


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
