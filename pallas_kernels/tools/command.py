"""Commands that say what is wrong with them in one line, and exit with 2."""

import pathlib
import sys

from absl import app, flags


def run(main):
  """Parses the flags that are defined, and runs main(argv)."""
  app.run(main, flags_parser=_parse)


def stop(error):
  line = ' '.join(str(error).split())
  name = pathlib.Path(sys.argv[0]).stem
  print(f'{name}: {line or repr(error)}', file=sys.stderr)
  sys.exit(2)


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    stop(error)
  if len(rest) > 1:
    stop(f'unexpected argument {rest[1]!r}; flags look like --name=value')
  return rest
