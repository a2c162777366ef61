"""The config file of a command whose flags name other choices than the file.

ml_collections reads it in place of the file that --config says, since it takes
flags only for keys that a config has: those of the choices that are named.
"""

import sys

import ml_collections

from moe_jax import config


def chosen(argv: list[str]) -> dict[str, str]:
  """{'model.router.name': 'switch'} of --config.model.router.name=switch."""
  found = {}
  for argument, following in zip(argv, [*argv[1:], ''], strict=True):
    flag, equals, value = argument.partition('=')
    key = flag.lstrip('-').removeprefix('config.')
    if flag.startswith('-') and key in config.SWITCHES:
      found[key] = value if equals else following
  return found


def get_config(file: str) -> ml_collections.ConfigDict:
  c = config.read(file)
  config.switch(c, chosen(sys.argv))
  return c
