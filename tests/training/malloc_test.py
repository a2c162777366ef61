"""Memory that stays, in a process of its own."""

import subprocess
import sys

CODE = """
import resource, sys
from moe_jax.training import malloc
if sys.argv[1] == 'keep':
  assert malloc.retain_freed_memory()
def faults():
  b'x' * (1 << 27)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first, second = faults(), faults()
print(second - first)
"""


def faults(how):
  done = subprocess.run(
    [sys.executable, '-c', CODE, how],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout)


def test_kept_memory_is_not_taken_again():
  assert faults('keep') < 1000 < faults('return')
