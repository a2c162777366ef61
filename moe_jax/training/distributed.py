"""Processes that train one model together: they meet, agree, and end together.

jax lets them meet at process 0, and aborts the others when that one is gone.
When another one is gone, a process may wait for it in a collective for ever, so
all of them give signs of life, and end soon after these stop.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

COME = 300  # seconds in which all have to come
SILENT = 40  # seconds without a sign of life after which a process is gone
BEAT = 5  # seconds between signs of life

_leaving = threading.Event()


def initialize(
  coordinator: str, processes: int | None, process: int | None
) -> None:
  """Waits for the others; before jax is used for anything else.

  Args:
    coordinator: host:port of process 0; or 'auto': jax finds out all three, on
      Cloud TPU and under SLURM, Open MPI or Kubernetes.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    ValueError, OSError: they cannot meet there; one line.
  """
  given = {}
  if coordinator != 'auto':
    given = dict(
      coordinator_address=coordinator,
      num_processes=processes,
      process_id=process,
      cluster_detection_method='deactivate',
    )

  def late():
    who = 'this process' if process is None else f'process {process}'
    _end(f'{who} has waited {COME} s at {coordinator} for all to come')

  timer = threading.Timer(COME, late)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given,
      # jax would abort with a stack trace: later than what is said here.
      initialization_timeout=2 * COME,
      heartbeat_timeout_seconds=2 * SILENT,
      shutdown_timeout_seconds=SILENT,
    )
    jax.devices()  # of all of them
  except ValueError as error:
    if coordinator != 'auto':
      raise
    raise ValueError(
      'coordinator=auto: jax sees neither Cloud TPU, SLURM, Open MPI nor'
      ' Kubernetes here; elsewhere coordinator=host:port, processes and process'
      ' say it'
    ) from error
  except RuntimeError as error:
    raise OSError(f'coordinator={coordinator}: {error}') from error
  finally:
    timer.cancel()
  if jax.process_count() > 1:
    threading.Thread(target=_watch, daemon=True).start()


def gather(text: str) -> list[str]:
  """What each process says, by its number; waits for all of them."""
  if jax.process_count() == 1:
    return [text]
  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(raw)))
  padded = np.pad(raw, (0, max(sizes) - len(raw)))
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def agree(mistake: str, identity: str) -> str:
  """The mistake of this process, or else that of another; '' if there is none.

  It is a mistake that another process has another `identity`.
  """
  said = [json.loads(s) for s in gather(json.dumps([mistake, identity]))]
  for process, (other, _) in enumerate(said):
    if other and not mistake:
      mistake = f'process {process}: {other}'
  for process, (_, other) in enumerate(said):
    if other != said[0][1] and not mistake:
      mistake = (
        f'process {process} has another config, data or work directory'
        ' than process 0'
      )
  return mistake


@contextlib.contextmanager
def run_together():
  """What all processes do, to its end; an error of one ends all of them.

  SystemExit is no error: all have agreed on it.
  """
  if jax.process_count() == 1:
    yield
    return
  code = None
  try:
    try:
      yield
    except SystemExit as stop:
      code = stop.code
    gather('')  # nobody who has come here is missed
  except (Exception, KeyboardInterrupt) as error:  # pylint: disable=broad-exception-caught
    _fail(error)
  _leaving.set()
  if code is not None:
    sys.exit(code)


def _fail(error):
  """Ends this process at once: the others do not wait for it."""
  if isinstance(error, jax.errors.JaxRuntimeError) and _is_loss(error):
    line = ' '.join(str(error).split())
    _end(f'{_name()} ends, because another process is gone: {line}')
  sys.excepthook(type(error), error, error.__traceback__)
  _end(f'{_name()} ends, and the others within {SILENT + BEAT} s')


def _is_loss(error):
  words = r'gloo|nccl|peer|connection|socket|unavailable|barrier|heartbeat'
  return re.search(words, str(error), re.IGNORECASE)


def _watch():
  """Meets the others every few seconds; ends this process where one is gone."""
  meet_at = ocp.multihost.get_barrier_sync_fn()
  for beat in itertools.count():
    try:
      meet_at(key=f'alive {beat}', timeout_ms=SILENT * 1000)
    except jax.errors.JaxRuntimeError as error:
      if _leaving.is_set():
        return
      missing = re.findall(r'^\d+$', str(error), re.MULTILINE)
      who = f'process {", ".join(missing)}' if missing else 'another process'
      _end(f'{_name()} ends: no sign of life from {who} for {SILENT} s')
    time.sleep(BEAT)


def _name():
  return f'process {jax.process_index()} of {jax.process_count()}'


def _end(line):
  # Not sys.exit: jax would wait for the others.
  print(f'moe-train: {line}', file=sys.stderr, flush=True)
  os._exit(1)
