"""Where the CPU seconds of tests go.

  python -m pytest -p tests.helpers.seconds --seconds=FILE
  python tests/helpers/seconds.py FILE

The first appends a line of JSON for each test and one for each process of
tests: its CPU seconds, those of child processes, and for how many seconds jax
traced and compiled (which is longer where processes share a core). The second
prints sums by file, and the tests that took most.
"""

import collections
import json
import os
import resource
import sys
import time

import jax
import pytest

TRACE = '/jax/core/compile/jaxpr_trace_duration'
COMPILE = (
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)
spans = {'trace': [], 'compile': []}


def pytest_addoption(parser):
  parser.addoption('--seconds', help='file for the CPU seconds of each test')


def pytest_configure(config):
  if config.getoption('--seconds'):
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(event, seconds, **_):
  kind = {TRACE: 'trace', **dict.fromkeys(COMPILE, 'compile')}.get(event)
  if kind:
    now = time.perf_counter()
    spans[kind].append((now - seconds, now))


def covered(pairs):
  """The length of the union: what jax traces within a trace counts once."""
  total, end = 0.0, float('-inf')
  for a, b in sorted(pairs):
    total += max(0.0, b - max(a, end))
    end = max(end, b)
  return total


def clock():
  """CPU seconds of this process and of its children that have ended."""
  child = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time(), child.ru_utime + child.ru_stime


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
  own, children = clock()
  wall = time.perf_counter()
  for kind in spans:
    spans[kind].clear()
  yield
  now, now_children = clock()
  compile = covered(spans['compile'])
  write(
    item.config,
    test=item.nodeid,
    own=now - own,
    children=now_children - children,
    wall=time.perf_counter() - wall,
    compile=compile,
    trace=covered(spans['trace'] + spans['compile']) - compile,
  )


def pytest_sessionfinish(session):
  write(session.config, process=os.getpid(), own=time.process_time())


def write(config, **line):
  path = config.getoption('--seconds')
  if path:
    with open(path, 'a') as f:
      f.write(json.dumps(line) + '\n')


KINDS = ('tests', 'cpu', 'trace', 'compile', 'children')


def main(path, dearest=30):
  lines = list(map(json.loads, open(path)))
  processes = sum(line['own'] for line in lines if 'process' in line)
  tests = [line for line in lines if 'test' in line]
  sums = collections.defaultdict(collections.Counter)
  for line in tests:
    line |= {'tests': 1, 'cpu': line['own'] + line['children']}
    for name in (line['test'].split('::')[0], 'all'):
      sums[name].update({kind: line[kind] for kind in KINDS})
  print('file'.ljust(32), *(kind.rjust(8) for kind in KINDS))
  for name, row in sorted(sums.items(), key=lambda pair: -pair[1]['cpu']):
    print(name.ljust(32), *(f'{row[kind]:8.0f}' for kind in KINDS))
  own = sum(line['own'] for line in tests)
  print(f'imports and collection: {processes - own:.0f}')
  for line in sorted(tests, key=lambda line: -line['cpu'])[:dearest]:
    print(f'{line["cpu"]:6.1f} {line["test"]}')


if __name__ == '__main__':
  main(sys.argv[1])
