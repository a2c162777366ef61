"""Which functions each test calls, on Python 3.12 or newer.

  python -m pytest -p tests.helpers.reach --reach=FILE

Appends a line of JSON for each test: the functions of this project that it
called in the process of the tests, as 'moe_jax/plans.py:sort', and whether it
started other processes. `python -m experiments.checks.mutations` reads them.
"""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = tuple(f'{ROOT}/{name}/' for name in ('moe_jax', 'pallas_kernels'))
TOOL = 4  # of sys.monitoring, one that no tool of the standard library has
called = set()
started = []


def pytest_addoption(parser):
  parser.addoption('--reach', help='file for the functions that tests call')


def pytest_configure(config):
  if config.getoption('--reach'):
    events = sys.monitoring.events.PY_START
    sys.monitoring.use_tool_id(TOOL, 'reach')
    sys.monitoring.register_callback(TOOL, events, _note)
    sys.monitoring.set_events(TOOL, events)
    sys.addaudithook(_start)


def _note(code, offset):
  del offset
  if code.co_filename.startswith(PACKAGES):
    name = code.co_qualname.replace('.<locals>', '').split('.<')[0]
    path = pathlib.Path(code.co_filename).relative_to(ROOT).as_posix()
    called.add(f'{path}:{name}')
  return sys.monitoring.DISABLE  # until the next test


def _start(event, args):
  del args
  if event == 'subprocess.Popen':
    started.append(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
  path = item.config.getoption('--reach')
  if not path:
    yield
    return
  called.clear()
  started.clear()
  sys.monitoring.restart_events()
  yield
  line = {'test': item.nodeid, 'calls': sorted(called), 'starts': bool(started)}
  with open(path, 'a') as f:
    f.write(json.dumps(line) + '\n')
