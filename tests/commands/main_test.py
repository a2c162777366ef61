"""The command line as a user meets it, in processes of its own."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import moe_jax
from moe_jax import main

ROOT = pathlib.Path(__file__).parents[2]


def moe_train(*arguments, config='configs/tiny.py', **environment):
  return subprocess.run(
    [sys.executable, '-m', 'moe_jax.main', f'--config={config}', *arguments],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': '', **environment},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--config.stesp=3', "unknown config key 'stesp'; the nearest is 'steps'"),
    ('--config.model.experts_F=3', "nearest is 'model.expert_F'"),
    ('--config.steps=many', '--config.steps=many: invalid literal for int()'),
    ('--confg.steps=3', "Unknown command line flag 'confg.steps'"),
    ('steps=3', "unexpected argument 'steps=3'"),
    ('--config.seq_len=1', 'seq_len=1 is not an int in [2, 2^31)'),
    ('--process=-1', 'process=-1 is not an int in [0, 2^31)'),
    ('--process=0', 'go with --coordinator=host:port, not without it'),
  ],
)
def test_a_mistake_is_one_line(tmp_path, argument, message):
  run = moe_train(f'--workdir={tmp_path}/run', argument)
  assert run.returncode == 2
  assert message in run.stderr
  assert run.stderr.startswith('moe-train: ') and run.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'flags, message',
  [
    ((None, 2, 0), 'not without it'),
    (('auto', 2, None), 'not with --coordinator=auto'),
    (('host:1', None, None), 'coordinator=host:1 needs --processes=N and'),
    (('host:1', 2, None), 'needs --processes=N and --process=0 .. N-1'),
    (('host', 2, 0), '--coordinator=host is neither host:port.* nor auto'),
    (('host:port', 2, 0), 'host:port is neither'),
    (('host:1', 2, 2), r'--process=2 is not one of 0 .. 1; --processes=2'),
    (('host:1', 0, 0), '--processes=0'),
  ],
)
def test_flags_of_processes_that_do_not_go_together(flags, message):
  with pytest.raises(ValueError, match=message):
    main._check_processes(*flags)


def test_flags_of_processes_that_go_together():
  main._check_processes(None, None, None)
  main._check_processes('auto', None, None)
  main._check_processes('10.0.0.1:1234', 2, 1)
  main._check_processes('[::1]:1234', 2, 1)


def test_a_choice_is_switched_with_its_options(tmp_path):
  run = moe_train(
    '--config.model.router.capacity=0.0',
    f'--workdir={tmp_path}/run',
    '--config.model.router.name=switch',
  )
  told = 'model.router.capacity=0.0 is not a float in (0, inf) or None'
  assert run.stderr == f'moe-train: {told}\n'
  assert not (tmp_path / 'run').exists()


def test_auto_where_jax_knows_no_cluster_is_one_line(tmp_path):
  run = moe_train(f'--workdir={tmp_path}/run', '--coordinator=auto')
  assert run.returncode == 2
  assert run.stderr.startswith('moe-train: coordinator=auto: jax sees neither')
  assert run.stderr.count('\n') == 1


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
  run = moe_train(f'--workdir={tmp_path}/run', JAX_PLATFORMS='abacus')
  assert run.returncode == 2
  assert run.stderr.startswith('moe-train: JAX_PLATFORMS=abacus: ')
  assert run.stderr.count('\n') == 1 and not (tmp_path / 'run').exists()


def test_the_version_is_that_of_the_package():
  run = moe_train('--version')
  assert run.stdout == f'moe-train {moe_jax.__version__}\n'


def test_the_config_is_printed_with_where_it_is_from():
  run = moe_train(
    '--print_config',
    '--config.model.router.name=random',
    '--config.model.router.per=sequence',
    '--config.model.E=8',
  )
  assert run.returncode == 0, run.stderr
  found = {}
  for line in run.stdout.splitlines():
    key, value, origin = re.fullmatch(r'(\S+) +(.*?) {2,}(\S.*)', line).groups()
    found[key] = value, origin
  assert found['model.router.per'] == ("'sequence'", 'command line')
  assert found['model.router.k'] == ('1', 'default')
  assert found['model.E'] == ('8', 'command line')
  assert found['steps'] == ('840', 'config file')


def test_a_dry_run_checks_all_and_writes_nothing(tmp_path):
  arguments = f'--workdir={tmp_path}/run', '--dry_run', '--config.steps=7'
  run = moe_train(*arguments)
  assert run.returncode == 0, run.stderr
  assert 'standard library' in run.stdout and 'steps=7' in run.stdout
  assert 'dry run: all is sound' in run.stdout
  assert not (tmp_path / 'run').exists()


def test_help_tells_of_the_flags():
  run = moe_train('--help')
  assert '--config=configs/tiny.py' in run.stdout
  assert 'How many there are. (int in [1, 2^31))' in run.stdout
  assert 'Where checkpoints, metrics and the report go' in run.stdout


def test_a_config_that_is_not_there_is_one_line(tmp_path):
  run = moe_train(f'--workdir={tmp_path}/run', config='configs/none.py')
  assert run.returncode == 2
  assert 'configs/none.py' in run.stderr and run.stderr.count('\n') == 1


@pytest.mark.slow
def test_the_main_job_in_few_steps(tmp_path):
  arguments = (f'--workdir={tmp_path}/run', '--config.steps=6')
  first = moe_train(*arguments, '--config.log_every=2')
  assert first.returncode == 0, first.stderr
  assert '\r' not in first.stderr  # not a terminal
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert summary['eval_bits_per_byte'] < 8
  assert 'standard library' in summary['corpus']
  again = moe_train(*arguments)
  assert again.returncode == 0
  assert 'finished already' in again.stdout
