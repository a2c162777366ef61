"""moe-train: trains what a config says, in a work directory.

  moe-train --config=configs/tiny.py --workdir=runs/tiny --config.steps=50

The same command continues a run that was stopped.
"""

import runpy
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file with get_config(), see configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and the report go.'
)


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  import jax  # pylint: disable=g-import-not-at-top

  from moe_jax import job, malloc, train  # pylint: disable=g-import-not-at-top

  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  try:
    if jax.default_backend() == 'cpu':
      malloc.keep()
    prepared = job.prepare(_CONFIG.value, _WORKDIR.value)
  except (ValueError, TypeError, OSError) as error:
    _stop(error)
  if prepared is None:
    print(f'finished already: {_WORKDIR.value}')
  else:
    train.run(prepared)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; what is wrong with them is said in one line."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      _stop(f'unexpected argument {rest[1]!r}; flags look like --config=FILE')
    for flag in (_CONFIG, _WORKDIR):
      if flag.value is None:
        _stop(f'--{flag.name} is missing')
    _CONFIG.value.to_dict()  # a config file that failed raises only now
    return rest
  except Exception as error:  # pylint: disable=broad-exception-caught
    _stop(_unknown_key(argv) or error)


def _unknown_key(argv):
  """The line about the first --config.KEY that the config file lacks."""
  from moe_jax import config  # pylint: disable=g-import-not-at-top

  try:
    path = next(a.split('=', 1)[1] for a in argv if a.startswith('--config='))
    get_config = runpy.run_path(path.split(':')[0])['get_config']
    known = config.flat(get_config().to_dict())
  except Exception:  # pylint: disable=broad-exception-caught
    return None  # the file itself is the trouble
  for argument in argv:
    key = argument.split('=', 1)[0].lstrip('-').removeprefix('config.')
    sections = {k.rsplit('.', 1)[0] for k in known}
    if argument.startswith('--config.') and key not in {*known, *sections}:
      return config.unknown(key, known)
  return None


def _stop(error):
  line = ' '.join(str(error).split())
  print(f'moe-train: {line or repr(error)}', file=sys.stderr)
  sys.exit(2)


def console() -> None:
  """The entry point `moe-train`."""
  # --help tells of the program that was started: a script that imports this.
  sys.modules['__main__'].__doc__ = __doc__
  for flag in (_CONFIG, _WORKDIR):
    flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], flags.FLAGS[flag.name]
    )
  app.run(main, flags_parser=_parse)


if __name__ == '__main__':
  console()
