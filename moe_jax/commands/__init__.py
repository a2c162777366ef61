"""Commands; moe-train is in main.py. A mistake is one line and exit code 2."""

import contextlib
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

import moe_jax
from moe_jax import paths, ranges

_VERSION = flags.DEFINE_bool('version', False, 'Print the version.')


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
  for flag in (*required, *optional, _VERSION):
    flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], flags.FLAGS[flag.name]
    )

  def parse(argv):
    if '--version' in argv[1:]:
      print(f'{program} {moe_jax.__version__}')
      sys.exit()
    try:
      argv = _located_config(_config_first(argv))
      sys.argv = argv  # where ml_collections looks
      with _quiet():  # of what is told below
        rest = flags.FLAGS(_switched(argv))
      if len(rest) > 1:
        raise ValueError(
          f'unexpected argument {rest[1]!r}; flags look like --config=FILE'
        )
      for flag in required:
        if flag.value is None:
          raise ValueError(f'--{flag.name} is missing')
      check()
      if required and required[0].name == 'config':
        required[0].value.to_dict()  # a config file that failed raises only now
      return rest
    except Exception as error:  # pylint: disable=broad-exception-caught
      stop(program, _wrong_config(argv) or error)

  _say_all(sys.stdout)
  with leaving(program):
    app.run(main, flags_parser=parse)


@contextlib.contextmanager
def _quiet():
  refuse = lambda record: False
  logging.get_absl_logger().addFilter(refuse)
  try:
    yield
  finally:
    logging.get_absl_logger().removeFilter(refuse)


def _say_all(stream):
  """A letter that a terminal lacks is its number there; no text is lost."""
  if stream.errors in ('strict', 'surrogateescape'):
    stream.reconfigure(errors='backslashreplace')


@contextlib.contextmanager
def leaving(program: str) -> Iterator[None]:
  """A signal ends what is done within it as an error does, with one line.

  So nothing half done is left. The first signal counts; later ones do not
  disturb its cleaning. Who has a signal ignored, as nohup has, keeps that.
  """
  handlers = {number: signal.getsignal(number) for number in _SIGNALS}
  heard = [n for n in _SIGNALS if handlers[n] is not signal.SIG_IGN]

  def interrupt(number, frame):
    del frame
    for other in heard:
      signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)

  for number in heard:
    signal.signal(number, interrupt)
  try:
    yield
  except KeyboardInterrupt as error:
    number = next(iter(error.args), signal.SIGINT)
    name = signal.Signals(number).name
    stop(program, f'interrupted by {name}', 128 + number)
  finally:
    for number in heard:
      signal.signal(number, handlers[number])


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _located_config(argv):
  """The same flags, --config with the path of its file.

  A ~ that no shell saw is the home folder; 'tiny' is a config that ships.

  Raises:
    ValueError: there is no such file.
  """
  begin, end = _config_at(argv)
  given = _config_file(argv)
  if not given:
    return argv
  from moe_jax import config  # pylint: disable=g-import-not-at-top

  name, colon, argument = given.partition(':')
  path = f'--config={config.find(paths.text(name))}{colon}{argument}'
  return [*argv[:begin], path, *argv[end:]]


def check_devices(program: str) -> None:
  """Ends the program with one line where jax finds no device."""
  import jax  # pylint: disable=g-import-not-at-top

  try:
    jax.devices()
  except RuntimeError as error:
    asked = os.environ.get('JAX_PLATFORMS', '')
    stop(program, f'JAX_PLATFORMS={asked}: {error}')


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


def _wrong_config(argv):
  """What is wrong with the config file, or a key that it lacks, in one line."""
  from moe_jax import config  # pylint: disable=g-import-not-at-top
  from moe_jax.commands import switched  # pylint: disable=g-import-not-at-top

  path = _config_file(argv).partition(':')[0]
  if not os.path.isfile(path):
    return None
  try:
    if 'get_config' not in runpy.run_path(path):
      return f'{path} has no function get_config'
    c = config.read(_config_file(argv))
  except Exception as error:  # pylint: disable=broad-exception-caught
    return _located(path, error)
  if not hasattr(c, 'to_dict'):
    return f'{path}: get_config returns {c!r}, no config like config.default()'
  try:
    config.switch(c, switched.chosen(argv))
  except ValueError as error:
    return error
  known = config.flat(c.to_dict())
  for argument in argv:
    key = argument.split('=', 1)[0].lstrip('-').removeprefix('config.')
    sections = {k.rsplit('.', 1)[0] for k in known}
    if argument.startswith('--config.') and key not in {*known, *sections}:
      return config.unknown(key, known)
  return None


def _config_at(argv):
  """The place of --config, or len(argv), and of what follows what it says."""
  for i, argument in enumerate(argv):
    flag, equals, _ = argument.partition('=')
    if flag in ('--config', '-config'):
      return i, i + (1 if equals else 2)
  return len(argv), len(argv)


def _config_file(argv):
  """What --config says, in each of its forms; '' without one."""
  begin, end = _config_at(argv)
  return argv[begin:end][-1].removeprefix('--config=') if begin < end else ''


def _config_first(argv):
  """The same flags, in an order that ml_collections takes."""
  begin, end = _config_at(argv)
  return [*argv[:1], *argv[begin:end], *argv[1:begin], *argv[end:]]


def _switched(argv):
  """--config by way of switched.py, if a flag names a choice."""
  names = re.compile(r'--?config\.[\w.]+\.(name|source)(=|$)')
  if not any(names.match(argument) for argument in argv):
    return argv
  begin, end = _config_at(argv)
  reads = pathlib.Path(__file__).with_name('switched.py')
  through = f'--config={reads}:{_config_file(argv)}'
  return [*argv[:begin], through, *argv[end:]]


def _located(path, error):
  """An error with the line of the config file where it came from."""
  said = error.args[0] if isinstance(error, KeyError) else error
  # ml_collections tells all fields of a config that lacks one.
  fields = r'Other fields present.*?(?=Did you mean|\Z)'
  said = re.sub(fields, '', str(said), flags=re.DOTALL)
  if isinstance(error, SyntaxError):
    path, line, said = error.filename, error.lineno, error.msg
  else:
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in frames[::-1] if f.filename == path), None)
  place = path if line is None else f'{path}:{line}'
  return f'{place}: {type(error).__name__}: {said}'
