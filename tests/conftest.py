"""One strict setting for all tests: CPU, 8 virtual devices, no silent casts."""

import gc
import itertools
import json
import os
import pathlib
import zlib
from importlib import metadata

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # Most of a test is compiling it, and most of that is LLVM's optimiser.
  + ' --xla_backend_optimization_level=0'
  + ' --xla_llvm_disable_expensive_passes=true'
  + ' --xla_cpu_parallel_codegen_split_count=1'
)
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  # It still has what it had before its fusion emitters, which compiles in 3/5
  # of the time; a newer one knows no such flag.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

import jax
import pytest

from moe_jax.training import train_step

# Tracing makes objects that stay: to search them for cycles as often as Python
# does takes a tenth of a test's time.
gc.set_threshold(200_000, 20, 100)

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Each operation else has the lines of ten callers with it.
jax.config.update('jax_traceback_in_locations_limit', 1)


def pytest_addoption(parser):
  parser.addoption(
    '--tenth', type=int, help='run the tests of this tenth (modulo ten) alone'
  )


def pytest_collection_modifyitems(config, items):
  tenth = config.getoption('--tenth')
  if tenth is not None:
    items[:] = [item for item in items if _tenth(item) == tenth % 10]


def _tenth(item):
  """The same for all tests of a case, which share what it compiles."""
  name = item.callspec.id if hasattr(item, 'callspec') else item.name
  return zlib.crc32(name.encode()) % 10


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """A text file that a small model learns something from at once."""
  path = tmp_path_factory.mktemp('corpus') / 'text.txt'
  lines = [f'{i} squared is {i * i}, and so it goes\n' for i in range(300)]
  path.write_text(''.join(lines))
  return path


@pytest.fixture(scope='session', autouse=True)
def _compile_once(tmp_path_factory, worker_id):
  """Processes of tests, and of what tests start, share what they compile."""
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  if not folder:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent) / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


_traced = {}


@pytest.fixture
def traced_once(monkeypatch):
  """Steps and evaluations of runs with one config are traced once.

  A run that was killed and is continued is the same program, and tracing it is
  most of its time. An objective that is not the config's has a `variant`.
  """

  def once(make):
    def made(job):
      variant = getattr(job.objective, 'variant', '')
      key = make.__name__, variant, json.dumps(job.config, sort_keys=True)
      if key not in _traced:
        _traced[key] = make(job)
      return _traced[key]

    return made

  for make in train_step.make_step, train_step.make_eval:
    monkeypatch.setattr(train_step, make.__name__, once(make))


@pytest.fixture(autouse=True)
def _let_go():
  """Drops all programs when there are many.

  A process may map 65,530 pieces of memory (Linux' default) and dies of one
  more; a test of a whole model takes up to two thousand.
  """
  yield
  if next(_tests) % 5 == 0 and _maps() > 30_000:
    jax.clear_caches()
    gc.collect()


def _maps():
  path = pathlib.Path('/proc/self/maps')
  return path.read_bytes().count(b'\n') if path.exists() else 0


_tests = itertools.count(1)
