"""Parts that are found by the name of their file in a package."""

import importlib
import pkgutil
from types import ModuleType


def names(package: str) -> list[str]:
  """Of the files in a package like 'moe_jax.routers', sorted."""
  path = importlib.import_module(package).__path__
  return sorted(module.name for module in pkgutil.iter_modules(path))


def find(package: str, kind: str, name: str, more: str = '') -> ModuleType:
  """The file of that name in the package.

  Args:
    kind: what a message calls it, 'router'.
    more: what a message says at its end.

  Raises:
    ValueError: there is none; one line with those that there are.
  """
  known = names(package)
  if name not in known:
    raise ValueError(f'no {kind} {name!r}; there are {", ".join(known)}{more}')
  return importlib.import_module(f'{package}.{name}')
