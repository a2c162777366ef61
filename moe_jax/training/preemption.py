"""SIGTERM, by which schedulers announce that they take a machine back."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT = 143  # 128 + SIGTERM: schedulers take it for a preemption


def leave(signum: int = 0, frame: FrameType | None = None) -> None:
  """Ends the process as preempted; a handler while there is nothing to save."""
  del signum, frame
  sys.exit(EXIT)


@contextlib.contextmanager
def later() -> Iterator[None]:
  """Signals that would end what is done within it come when it is done.

  For what threads do in part, which no exception ends in all of them.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # which hears no signal
    return
  heard, handlers = [], {}
  remember = lambda number, frame: heard.append(number)
  for number in _deferred():
    if callable(signal.getsignal(number)):
      handlers[number] = signal.signal(number, remember)
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for number in heard:
      signal.raise_signal(number)


def _deferred():
  """Not SIGTERM of several processes: that is jax's own, which Python, asked
  for the handler, does not know of, and could not put back."""
  if jax.distributed.is_initialized():
    return signal.SIGINT, signal.SIGHUP
  return signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Notice:
  """Within it SIGTERM is remembered, so that a run can save first.

  Of several processes jax's own handler remembers it, and finds a step at
  which all of them can save.
  """

  def __init__(self):
    self.given = False  # to a process that runs alone
    self._before = None

  def __enter__(self) -> 'Notice':
    if jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._remember)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def reached(self, step: int) -> bool:
    """Whether to save after this step and leave; asked after each step."""
    if jax.process_count() == 1:
      return self.given
    return multihost_utils.reached_preemption_sync_point(step)

  def _remember(self, signum, frame):
    del signum, frame
    self.given = True
