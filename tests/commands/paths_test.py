"""A ~ is the home folder wherever a user may write a path."""

import pathlib

import pytest

from moe_jax import commands, config, paths
from moe_jax.training import jobs, saved_run
from moe_jax.weights import convert, upcycle
from tests.helpers.small import small_config


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  return tmp_path


def test_a_home_folder_stands_for_its_sign(home, monkeypatch):
  monkeypatch.chdir('/')
  assert paths.absolute('~/runs/a') == home / 'runs' / 'a'
  assert paths.absolute('runs/~a') == pathlib.Path('/runs/~a')
  assert paths.text('~') == str(home)
  assert paths.text('~/*.txt') == f'{home}/*.txt'
  assert paths.text('data/*.txt') == 'data/*.txt'
  with pytest.raises(ValueError, match=r'^~nobody-here/a: there is no home'):
    paths.text('~nobody-here/a')


# Each says where it looked.
USES = {
  'the work directory': lambda c: jobs.prepare(c, '~/none'),
  'data.path': lambda c: jobs.prepare(_with(c, 'data.path'), 'run'),
  'data.tokenizer': lambda c: jobs.prepare(
    _with(c, 'data.tokenizer', '~/none.json'), 'run'
  ),
  'init_from': lambda c: jobs.prepare(_with(c, 'init_from'), 'run'),
  'a run that is read': lambda c: saved_run.load('~/none'),
  'a run that is gone on from': lambda c: config.begin('~/none'),
  'what is imported': lambda c: convert.take('~/none', 'run'),
  'where it goes': lambda c: convert.take('run', '~/none'),
  'what is exported': lambda c: convert.give('~/none', 'run'),
  'what grows': lambda c: upcycle.grow(
    '~/none', 'run', upcycle.UpcycleConfig()
  ),
  'where it grows': lambda c: upcycle.grow(
    'run', '~/none', upcycle.UpcycleConfig()
  ),
}


def _with(c, key, path='~/none'):
  c.update_from_flattened_dict({key: path})
  return c


def test_a_config_file_may_be_at_home(home):
  (home / 'c.py').write_text('')
  for given in ['--config=~/c.py:small'], ['--config', '~/c.py:small']:
    found = commands._located_config(['moe-train', *given, '--prompt=~/x'])
    assert found == ['moe-train', f'--config={home}/c.py:small', '--prompt=~/x']


@pytest.mark.parametrize('use', USES)
def test_each_path_of_a_user_may_begin_at_home(use, home, monkeypatch, corpus):
  monkeypatch.chdir(home)
  (home / 'run').mkdir()
  if use in ('the work directory', 'where it goes', 'where it grows'):
    (home / 'none').write_text('in the way')
  with pytest.raises((ValueError, OSError)) as error:
    USES[use](small_config(corpus))
  assert str(home / 'none') in str(error.value)
