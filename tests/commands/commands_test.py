"""What all commands have in common."""

import io
import pathlib
import re

import jax
import ml_collections
import pytest

from moe_jax import commands, config
from moe_jax.commands import switched

HEAD = 'import ml_collections\nfrom moe_jax import config\ndef get_config():\n'
# A config file, and what is said behind its path.
FILES = {
  'def get_config(:\n': r':1: SyntaxError: invalid syntax',
  'import absent_here\n': r':1: ModuleNotFoundError: .*absent_here',
  'x = 1\n': r' has no function get_config',
  HEAD + '  pass': r': get_config returns None, no config like',
  HEAD + '  return {"E": 8}': r": get_config returns {'E': 8}, no config like",
  HEAD
  + '  c = config.default()\n  c.steps = "many"': r':5: TypeError: .*steps.*',
  HEAD + '  config.router("switch", capcity=2)': r":4: .*'capcity'.*'capacity'",
  HEAD + '  return size': r":4: NameError: name 'size' is not defined",
  HEAD + '  c = config.default().lock()\n  c.stesp = 3': (
    r':5: .*"stesp" does not exist.*locked\. Did you mean "steps" in.{0,20}$'
  ),
  HEAD.replace('()', '(size)') + '  return size': r": TypeError: .*'size'",
}


@pytest.mark.parametrize('text', FILES)
def test_a_config_file_that_fails_is_told_with_its_line(tmp_path, text):
  path = tmp_path / 'c.py'
  path.write_text(text)
  for argv in [f'--config={path}'], ['--config', str(path), '--config.x=1']:
    told = commands._wrong_config(['moe-train', *argv])
    line = ' '.join(told.split())
    assert re.match(re.escape(str(path)) + FILES[text], line), line


def test_a_config_file_that_is_not_there_or_is_right(tmp_path):
  with pytest.raises(ValueError, match=r"c\.py: no such file.* none is 'c'"):
    commands._located_config(['moe-train', f'--config={tmp_path}/c.py'])
  (tmp_path / 'c.py').write_text(HEAD + '  return config.default()')
  argv = ['moe-train', f'--config={tmp_path}/c.py', '--config.model.E=4']
  assert commands._wrong_config(argv) is None
  assert commands._wrong_config(['moe-generate', '--workdir=x']) is None


# Of every kind: another choice than the default's, and an option that it has.
OTHERS = {
  'model.router.name': ('switch', 'jitter'),
  'model.attention.name': ('mla', 'rank'),
  'model.residual.name': ('heavy_ball', 'mu'),
  'objective.name': ('consistency', 'alpha'),
  'data.source': ('huggingface', 'revision'),
  'model.name': ('classifier', 'patch'),
}


def test_a_config_that_ships_is_found_by_its_name(monkeypatch, tmp_path):
  root = pathlib.Path(__file__).parents[2] / 'configs'
  for name in 'tiny', 'paper/coe', 'scale/qwen3_30b':
    assert config.find(name) == str(root / f'{name}.py')
    argv = ['moe-train', '--config', name, '--workdir=w']
    found = commands._located_config(argv)
    assert found == ['moe-train', f'--config={root}/{name}.py', '--workdir=w']
  assert commands._located_config(['moe-generate', '--x']) == [
    'moe-generate',
    '--x',
  ]
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="'tinny'; the nearest is 'tiny'"):
    config.find('tinny')
  (tmp_path / 'tiny').write_text('')  # what is there comes first
  assert config.find('tiny') == 'tiny'


def test_a_wheel_ships_every_config():
  root = pathlib.Path(__file__).parents[2]
  lines = (root / 'setup.cfg').read_text().splitlines()
  shipped = {}
  for line in lines:
    if line.startswith('share/moe_jax/'):
      place, pattern = line.removeprefix('share/moe_jax/').split(' = ')
      shipped[place] = pattern
  folders = {
    str(p.parent.relative_to(root)) for p in root.glob('configs/**/*.py')
  }
  assert shipped == {folder: f'{folder}/*.py' for folder in folders}


def test_every_choice_can_be_switched():
  """Its options fall away, those of the new one come; losses stay."""
  assert OTHERS.keys() == config.SWITCHES.keys()
  for key, (name, option) in OTHERS.items():
    c = config.default()
    c.objective.losses.balance = 0.5
    old = config.flat(c.to_dict())
    config.switch(c, {key: old[key]})
    assert config.flat(c.to_dict()) == old
    config.switch(c, {key: name})
    new = config.flat(c.to_dict())
    assert new[key] == name and new['objective.losses.balance'] == 0.5
    section = config.SWITCHES[key]
    assert f'{section}.{option}' in new.keys() - old.keys()
    for other in new.keys() ^ old.keys():
      assert other.startswith(f'{section}.')
  c = config.default()
  config.switch(c, {'model.router.name': 'switch', 'model.name': 'classifier'})
  assert (c.model.name, c.model.router.capacity) == ('classifier', 1.25)
  with pytest.raises(ValueError, match="no router 'swich'; there are"):
    config.switch(c, {'model.router.name': 'swich'})


def test_what_is_set_is_what_is_not_a_default_of_its_choice():
  c = config.default()
  assert config.set_in(config.resolve(c)) == {}
  c.model.router = config.router('switch', jitter=0.1)
  c.model.E, c.optimizer.name = 16, 'adamw'
  assert config.set_in(config.resolve(c)) == {
    'model.E': 16,
    'model.router.jitter': 0.1,
    'model.router.name': 'switch',
  }


def test_flags_name_choices_in_any_order(monkeypatch):
  given = ['moe-train', '--config.model.router.capacity=2', '--workdir=w']
  given += ['--config.model.router.name', 'switch', '--config', 'a.py:x']
  argv = commands._config_first(given)
  assert argv[:3] == ['moe-train', '--config', 'a.py:x']
  assert sorted(argv) == sorted(given)
  assert switched.chosen(argv) == {'model.router.name': 'switch'}
  through = commands._switched(argv)
  assert through[1] == f'--config={switched.__file__}:a.py:x'
  assert through[2:] == argv[3:]
  plain = ['moe-train', '--config=a.py', '--config.optimizer.eps=1']
  assert commands._switched(plain) == commands._config_first(plain) == plain


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'steps': 3}, r'^the config has no .*; begin with config.default'),
    ({**config.default().to_dict(), 'mesh': 8}, 'mesh=8 is no section of keys'),
    (
      {**config.default().to_dict(), 'model': {'name': 'decoder'}},
      r"model.router=None is no section.* config.choice\('router', name\)",
    ),
  ],
)
def test_a_config_that_did_not_begin_with_the_default(changes, message):
  with pytest.raises(ValueError, match=message):
    config.resolve(ml_collections.ConfigDict(changes))


def test_a_terminal_that_lacks_a_letter_gets_its_number():
  for errors, told in (('strict', b'gr\\xf6\\u1e9e'), ('ignore', b'gr')):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, 'ascii', errors)
    commands._say_all(stream)
    print('gr\xf6\u1e9e', end='', file=stream, flush=True)
    assert raw.getvalue() == told


def test_a_platform_that_is_not_there_is_one_line(monkeypatch, capsys):
  def absent():
    raise RuntimeError("Unable to initialize backend 'tpu':\n no libtpu.so")

  monkeypatch.setattr(jax, 'devices', absent)
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  with pytest.raises(SystemExit) as left:
    commands.check_devices('moe-generate')
  assert left.value.code == 2
  assert capsys.readouterr().err == (
    "moe-generate: JAX_PLATFORMS=tpu: Unable to initialize backend 'tpu':"
    ' no libtpu.so\n'
  )
