"""Memory that a CPU run frees and takes again at every step."""

import ctypes
import sys

# Of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def retain_freed_memory() -> bool:
  """Lets freed memory stay with this process; False where malloc cannot.

  XLA takes all temporaries of a program in one piece, which glibc gets fresh
  from the operating system, page by page, every time that the program runs.
  Kept, they cost nothing from the second step on; the process stays as large as
  it was at its largest. experiments/LOG.md has what it is worth.
  """
  if sys.platform != 'linux':
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # not glibc
    return False
  forever = 2**31 - 1
  settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, forever), (_ARENA_MAX, 1)
  return all([mallopt(*setting) == 1 for setting in settings])
