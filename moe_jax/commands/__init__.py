"""Commands; moe-train is in main.py. A mistake is one line and exit code 2."""

import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from moe_jax import ranges


def run(
  program: str,
  main: Callable[[list[str]], Any],
  about: str,
  required: Sequence[flags.FlagHolder],
  optional: Sequence[flags.FlagHolder] = (),
  check: Callable[[], None] = lambda: None,
) -> None:
  """Parses flags and calls main, as an entry point.

  Args:
    about: what --help says.
    required: flags that must be given; if there is a config file, it is first.
    optional: other flags that --help shows.
    check: raises what is wrong with the flags, taken together.
  """
  # --help tells of the program that was started: a script that imports this.
  sys.modules['__main__'].__doc__ = about
  for flag in (*required, *optional):
    flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], flags.FLAGS[flag.name]
    )

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
      if len(rest) > 1:
        raise ValueError(
          f'unexpected argument {rest[1]!r}; flags look like --config=FILE'
        )
      for flag in required:
        if flag.value is None:
          raise ValueError(f'--{flag.name} is missing')
      check()
      if required and hasattr(required[0].value, 'to_dict'):
        required[0].value.to_dict()  # a config file that failed raises only now
      return rest
    except Exception as error:  # pylint: disable=broad-exception-caught
      stop(program, _unknown_key(argv) or error)

  app.run(main, flags_parser=parse)


def within(flag: flags.FlagHolder, hint: Any) -> None:
  """Refuses what an annotation of ranges.py does not allow; --help shows it."""
  option = ranges.option(hint)

  def fits(value):
    try:
      if value is not None:
        option.check(flag.name, value)
    except ValueError as error:
      raise flags.ValidationError(str(error)) from None
    return True

  flags.register_validator(flag.name, fits)
  flags.FLAGS[flag.name].help += f' ({option})'


def mesh_sizes(given: list[str]) -> dict[str, int]:
  """Devices along each axis, of a flag like --mesh=fsdp=4,expert=2."""
  from moe_jax import parallel  # pylint: disable=g-import-not-at-top

  sizes = dict.fromkeys(parallel.AXES, 1)
  for text in given:
    axis, _, size = text.partition('=')
    if axis not in sizes or not size.isdecimal() or int(size) < 1:
      raise ValueError(
        f'--mesh={text} is not AXIS=DEVICES; axes are {", ".join(sizes)}'
      )
    sizes[axis] = int(size)
  return sizes


def stop(program: str, error: Any, code: int = 2) -> NoReturn:
  """Ends the program with one line: 2 is a mistake of whoever started it."""
  line = ' '.join(str(error).split())
  print(f'{program}: {line or repr(error)}', file=sys.stderr)
  sys.exit(code)


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
