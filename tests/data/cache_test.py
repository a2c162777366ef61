"""The cache never hands out a damaged file and never stops a run."""

import logging
import os
import pwd
import shutil

import pytest

from moe_jax.data import cache


def _read(path):
  text = path.read_text()
  if not text.startswith('sound '):
    raise ValueError('not sound')
  return text


def _write(path, value):
  path.write_text(value)


def _cached(path, value):
  return cache.cached(path, _read, lambda: value, _write)


def test_makes_once_then_reads(tmp_path):
  path = tmp_path / 'new' / 'file'
  assert _cached(path, 'sound 1') == 'sound 1'
  assert _cached(path, 'sound 2') == 'sound 1'
  assert os.listdir(path.parent) == ['file']  # nothing temporary stays


def test_damage_costs_one_line_and_is_repaired(tmp_path, caplog):
  path = tmp_path / 'file'
  path.write_text('rotten')
  with path.open() as reader:
    assert _cached(path, 'sound 1') == 'sound 1'
    assert reader.read() == 'rotten'  # replaced, not written over
  assert [r.levelno for r in caplog.records] == [logging.WARNING]
  assert str(path) in caplog.text and 'not sound' in caplog.text
  assert path.read_text() == 'sound 1'


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('rotten')

  def interrupted(path, value):
    path.write_text(value[:3])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.cached(path, _read, lambda: 'sound 1', interrupted)
  assert path.read_text() == 'rotten'
  assert os.listdir(tmp_path) == ['file']


def test_a_folder_that_cannot_be_made_costs_one_line(tmp_path, caplog):
  (tmp_path / 'taken').write_text('a file, not a folder')
  assert _cached(tmp_path / 'taken' / 'file', 'sound 1') == 'sound 1'
  assert len(caplog.records) == 1 and 'cannot keep' in caplog.text


def test_directory_follows_config_then_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('MOE_JAX_CACHE', raising=False)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  assert cache.directory() == tmp_path / '.cache' / 'moe_jax'
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache.directory() == tmp_path / 'xdg' / 'moe_jax'
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'mine'))
  assert cache.directory() == tmp_path / 'mine'
  assert cache.directory('~/here') == tmp_path / 'here'


def test_a_user_without_a_home_goes_on(monkeypatch, caplog):
  """As in a container that runs under a number which nobody has."""

  def unknown(*_):
    raise KeyError('uid not found: 12345')

  for name in ('HOME', 'MOE_JAX_CACHE', 'XDG_CACHE_HOME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  folder = cache.directory()
  try:
    assert _cached(folder / 'file', 'sound 1') == 'sound 1'
    assert cache.directory() == folder and caplog.text.count('no home') == 1
  finally:
    shutil.rmtree(folder)
    cache._temporary.cache_clear()
