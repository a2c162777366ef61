"""One strict setting for all tests: CPU, 8 virtual devices, no silent casts."""

import gc
import itertools
import os
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

# Tracing makes objects that stay: to search them for cycles as often as Python
# does takes a tenth of a test's time.
gc.set_threshold(200_000, 20, 100)

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """A text file that a small model learns something from at once."""
  path = tmp_path_factory.mktemp('corpus') / 'text.txt'
  lines = [f'{i} squared is {i * i}, and so it goes\n' for i in range(300)]
  path.write_text(''.join(lines))
  return path


@pytest.fixture(scope='session', autouse=True)
def _compile_once(tmp_path_factory):
  """Runs that are killed and continued compile the same programs again."""
  folder = tmp_path_factory.mktemp('compiled')
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@pytest.fixture(autouse=True)
def _let_go():
  """Drops the programs of the last tests now and then.

  A process may map 65,530 pieces of memory (Linux' default) and dies of one
  more; a test of a whole model takes up to two thousand.
  """
  yield
  if next(_tests) % 20 == 0:
    jax.clear_caches()


_tests = itertools.count(1)
