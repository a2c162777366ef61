"""One run at a time in a work directory.

A run holds a lock of the system's on a file there, which says who it is. It
ends with the process, however that ends: what a killed run leaves is no lock.
Processes that read a work directory need none.

On a network's file system the lock of a machine that vanished may stay for a
while; where locks are known to one host alone (gcsfuse, Lustre's localflock) a
run on another host is not refused.
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

FILE = 'lock'  # in a work directory; it stays there
# Seconds for which one waits: the system closes the files of a process that was
# killed a little later, and who asks holds the lock for a moment.
PATIENCE = 1.0

logger = logging.getLogger(__name__)
_held = set()  # file descriptors


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Within it this process alone has the work directory, which is made.

  Where the file system knows no locks, that is logged, and nothing is held.

  Raises:
    OSError: another run has it, or it cannot be made; one line.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  file = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o666)
  _held.add(file)
  try:
    _take(workdir, file, fcntl.LOCK_EX)
    os.ftruncate(file, 0)
    os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
    yield
  finally:
    if file in _held:  # not in a child
      _held.remove(file)
      os.close(file)


def check(workdir: pathlib.Path) -> None:
  """OSError, one line, if a run has the work directory; changes nothing."""
  try:
    file = os.open(workdir / FILE, os.O_RDONLY)
  except OSError:
    return  # there was no run, or `held` says what is wrong
  try:
    _take(workdir, file, fcntl.LOCK_SH)
  finally:
    os.close(file)


def _take(workdir, file, kind):
  end = time.monotonic() + PATIENCE
  while True:
    try:
      return fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _UNKNOWN:
        return logger.warning(
          '%s cannot be locked (%s): start no second run there', workdir, error
        )
      if error.errno not in _BUSY:
        raise
    if time.monotonic() > end:
      who = os.pread(file, 1000, 0).decode(errors='replace')
      raise OSError(
        f'{workdir}: another run is at work there, {who}; wait, or choose'
        ' another work directory'
      )
    time.sleep(0.05)


_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
# What file systems say that have no locks.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def _let_go():
  for file in _held:
    os.close(file)
  _held.clear()


# A child may outlive the run; programs that are started get no file anyway.
os.register_at_fork(after_in_child=_let_go)
