"""Files that can be rebuilt: read if sound, else made again, atomically."""

import atexit
import functools
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from moe_jax import paths

logger = logging.getLogger(__name__)


def directory(configured: str = '') -> pathlib.Path:
  """`configured`, else $MOE_JAX_CACHE, else moe_jax in the user's cache."""
  chosen = configured or os.environ.get('MOE_JAX_CACHE', '')
  if chosen:
    return paths.absolute(chosen)
  home = os.environ.get('XDG_CACHE_HOME', '') or '~/.cache'
  try:
    return paths.absolute(home) / 'moe_jax'
  except ValueError:
    return _temporary()


@functools.cache
def _temporary():
  """What stands in for the cache of a user who has no home."""
  folder = tempfile.mkdtemp(prefix='moe_jax-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  logger.warning(
    'there is no home folder for a cache; $MOE_JAX_CACHE can name another'
  )
  return pathlib.Path(folder)


def cached(
  path: pathlib.Path,
  read: Callable[[pathlib.Path], Any],
  make: Callable[[], Any],
  write: Callable[[pathlib.Path, Any], None],
) -> Any:
  """The value in `path`, or what `make` returns, kept there for next time.

  A damaged file costs one logged line and a rebuild; so does a directory that
  cannot be written, which only costs the next run its time.
  """
  if path.exists():
    try:
      return read(path)
    except Exception as error:  # readers raise as they please, some bare ones
      logger.warning('rebuilding the damaged cache file %s: %s', path, error)
  value = make()
  try:
    _replace(path, write, value)
  except OSError as error:
    logger.warning('cannot keep %s for the next run: %s', path, error)
  return value


def _replace(
  path: pathlib.Path, write: Callable[[pathlib.Path, Any], None], value: Any
) -> None:
  """Writes beside `path`, then renames: a reader never sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.new-') as folder:
    new = pathlib.Path(folder) / path.name
    write(new, value)
    os.replace(new, path)
