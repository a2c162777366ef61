"""Of the processes that want a work directory, one has it."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from moe_jax.training import lock


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
  monkeypatch.setattr(lock, 'PATIENCE', 0.0)


# Holds a file's lock as `held` does, with a child that outlives it.
HOLDER = """
import importlib.util, os, pathlib, sys, time
spec = importlib.util.spec_from_file_location('lock', sys.argv[1])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.held(pathlib.Path(sys.argv[2])):
  if not os.fork():
    print(os.getpid(), flush=True)
  time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock_nor_do_its_children(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, lock.__file__, tmp_path],
    stdout=subprocess.PIPE,
    text=True,
  )
  with holder:
    try:
      child = int(holder.stdout.readline())
      told = f'another run is at work there, process {holder.pid} on '
      with pytest.raises(OSError, match=told):
        lock.check(tmp_path)
    finally:
      holder.kill()
    holder.wait()
    try:
      os.kill(child, 0)  # it is alive
      lock.check(tmp_path)
      with lock.held(tmp_path):
        pass
    finally:
      os.kill(child, signal.SIGKILL)


def test_one_at_a_time_and_then_the_next(tmp_path):
  workdir = tmp_path / 'runs' / 'new'
  lock.check(workdir)  # there is none
  assert not workdir.exists()
  for _ in range(2):
    with lock.held(workdir):
      with pytest.raises(OSError, match='another run'), lock.held(workdir):
        pass
      with pytest.raises(OSError, match='another run'):
        lock.check(workdir)
  lock.check(workdir)
  assert [p.name for p in workdir.iterdir()] == [lock.FILE]


def test_one_waits_for_who_only_asks(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'PATIENCE', 10.0)
  with lock.held(tmp_path):
    pass
  with open(tmp_path / lock.FILE) as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, 'sleep', lambda _: file.close())
    with lock.held(tmp_path):
      assert file.closed


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
  def unknown(*_):
    raise OSError(lock.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(lock.fcntl, 'flock', unknown)
  with lock.held(tmp_path):
    assert 'cannot be locked' in caplog.text and str(tmp_path) in caplog.text
