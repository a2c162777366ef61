"""moe-options: every option of every part, its default and what it may be.

  moe-options
  moe-options --part=router

The ranges are those by which a config is checked; moe_jax/config.py and the
parts' docstrings say what each option means.
"""

from absl import flags

from moe_jax import commands

_PART = flags.DEFINE_string(
  'part', '', "Only parts whose title has this: 'optimizer', 'router topk'."
)


def main(argv: list[str]) -> None:
  del argv
  try:
    print(text(_PART.value))
  except ValueError as error:
    commands.stop('moe-options', error)


def text(part: str = '') -> str:
  """The listing of the parts with this in their title; ValueError if none."""
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax import config  # pylint: disable=g-import-not-at-top

  every = config.every()
  titles = [title for title in every if part in title]
  if not titles:
    raise ValueError(f'no part {part!r}; there are {", ".join(every)}')
  return '\n\n'.join(_table(title, every[title]) for title in titles)


def _table(title, options):
  begin = {name: f'{name} = {o.default!r}' for name, o in options.items()}
  width = max(map(len, begin.values()), default=0)
  lines = [f'  {begin[n]:{width}}  {o.allowed}' for n, o in options.items()]
  return '\n'.join([title, *lines])


def console() -> None:
  """The entry point `moe-options`."""
  commands.run('moe-options', main, __doc__, (), (_PART,))


if __name__ == '__main__':
  console()
