"""Runs of the tiny config in processes of their own, and what they leave."""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
STEPS = 24
FLAGS = (
  '--config=configs/tiny.py',
  f'--config.steps={STEPS}',
  '--config.seq_len=64',
  '--config.log_every=1',
  '--config.eval_every=8',
  '--config.checkpoint_every=6',
  '--config.keep_checkpoints=3',
  '--config.data.eval_bytes=20000',
  '--config.optimizer.name=adamw',  # Muon takes minutes to compile
)
CLOCKS = ('tokens_per_second',)  # the only values that time changes


class Place:
  """A folder with work directories, and caches that all runs share."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._count = 0

  def new(self) -> pathlib.Path:
    """A work directory that is not there yet."""
    self._count += 1
    return self.folder / f'run{self._count}'

  def copy(self, workdir: pathlib.Path) -> pathlib.Path:
    """The same files in another work directory."""
    return pathlib.Path(shutil.copytree(workdir, self.new()))

  def start(
    self,
    workdir: pathlib.Path,
    *flags: str,
    devices: int = 1,
    largest_file: int | None = None,
    poison: str = '',
  ) -> subprocess.Popen:
    """Starts moe-train.

    Args:
      largest_file: bytes beyond which writing fails, as on a full disk.
      poison: optimiser steps whose batches make the loss NaN, see child.py.
    """
    env = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT),
      'POISON': poison,
    }
    limit = None
    if largest_file is not None:
      two = (largest_file, largest_file)
      limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, two)
      del env['JAX_COMPILATION_CACHE_DIR']
    return subprocess.Popen(
      [
        *(sys.executable, '-m', 'experiments.checks.faults.child'),
        *(*FLAGS, f'--workdir={workdir}', *flags),
      ],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      preexec_fn=limit,
    )

  def run(self, workdir: pathlib.Path, *flags: str, **options: Any):
    """(exit status, stderr) of a run to its end."""
    process = self.start(workdir, *flags, **options)
    _, told = process.communicate(timeout=900)
    return process.returncode, told

  def until(
    self,
    workdir: pathlib.Path,
    moment: Callable[[pathlib.Path], bool],
    blow: signal.Signals = signal.SIGKILL,
    *flags: str,
    **options: Any,
  ):
    """(exit status, stderr) of a run that is struck at that moment."""
    process = self.start(workdir, *flags, **options)
    while process.poll() is None and not moment(workdir):
      time.sleep(0.001)
    process.send_signal(blow)
    _, told = process.communicate(timeout=300)
    return process.returncode, told

  def two(self, workdir: pathlib.Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes that train together."""
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    where = f'--coordinator=localhost:{port}'
    return [
      self.start(workdir, *flags, where, '--processes=2', f'--process={i}')
      for i in range(2)
    ]


# Moments: workdir -> whether it has come.


def after(seconds: float) -> Callable[[pathlib.Path], bool]:
  """So long after the first question."""
  began = []

  def moment(workdir):
    del workdir
    began.append(time.monotonic())
    return began[-1] - began[0] >= seconds

  return moment


def start_up(workdir: pathlib.Path) -> bool:
  """The work directory has been made, and nothing trained."""
  return (workdir / 'config.json').exists()


def step(workdir: pathlib.Path) -> bool:
  return reached(4)(workdir)


def evaluation(workdir: pathlib.Path) -> bool:
  """After step 8, which is evaluated."""
  return reached(8)(workdir)


def writing(workdir: pathlib.Path) -> bool:
  """A checkpoint is half written."""
  return any(workdir.glob('checkpoints/*tmp*'))


def shutdown(workdir: pathlib.Path) -> bool:
  """The last checkpoint is there, the summary is not."""
  return (workdir / f'checkpoints/{STEPS}').exists()


def reached(number: int) -> Callable[[pathlib.Path], bool]:
  """This step stands in metrics.jsonl."""

  def moment(workdir):
    path = workdir / 'metrics.jsonl'
    return path.exists() and f'{{"step": {number},' in path.read_text()

  return moment


def saved(number: int) -> Callable[[pathlib.Path], bool]:
  """The checkpoint of this step is there."""
  return lambda workdir: (workdir / f'checkpoints/{number}').exists()


# What a run leaves.


def result(workdir: pathlib.Path) -> dict[str, Any]:
  """All that must be the same bits: metrics, evaluation, the last arrays."""
  lines = [
    {k: v for k, v in line.items() if k not in CLOCKS}
    for line in metrics(workdir)
  ]
  summary = json.loads((workdir / 'summary.json').read_text())
  path = workdir / f'checkpoints/{STEPS}/data/metadata'
  content = json.loads(json.loads(path.read_text())['text'])
  keys = ('initial_loss', 'eval_loss', 'eval_bits_per_byte', 'steps')
  return {
    'metrics': lines,
    'summary': {key: summary[key] for key in keys},
    'arrays': content['sums'],
    'batches': content['data']['batches'],
  }


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def contents(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
  """All files, to see that none has changed."""
  return {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
