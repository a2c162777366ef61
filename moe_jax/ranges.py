"""What an option may be, said once: by the annotation of its argument or field.

  k: ranges.Count = 2
  jitter: Annotated[float, Within('[0, 1)')] = 0.0
  window: ranges.Count | None = None
  score: Literal['softmax', 'sigmoid'] = 'softmax'
  norm: Annotated[str, OneOf(NORMS)]

What checks a config reads it here, and so does moe-options, which lists them.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Within:
  """An interval: '[0, 1)' has 0 and not 1; an end may be inf, or 2^31."""

  text: str

  @property
  def ends(self) -> tuple[float, float]:
    low, high = self.text[1:-1].split(',')
    return _number(low), _number(high)

  def __contains__(self, value: float) -> bool:
    low, high = self.ends
    above = low <= value if self.text[0] == '[' else low < value
    below = value <= high if self.text[-1] == ']' else value < high
    return above and below  # of NaN neither is true


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
  """These names, as the keys of a table."""

  names: tuple[str, ...]

  def __init__(self, names: Iterable[str]):
    object.__setattr__(self, 'names', tuple(names))

  def __contains__(self, value: Any) -> bool:
    return value in self.names


def _number(text):
  base, _, power = text.partition('^')
  return float(base) ** int(power or 1)


# Of arrays and steps, which are counted in int32.
Count = Annotated[int, Within('[1, 2^31)')]
Natural = Annotated[int, Within('[0, 2^31)')]
Amount = Annotated[int, Within('[0, inf)')]  # of bytes or documents
Seed = Annotated[int, Within('[0, 2^32)')]  # that a jax key is made of
Real = Annotated[float, Within('(-inf, inf)')]
Positive = Annotated[float, Within('(0, inf)')]
NonNegative = Annotated[float, Within('[0, inf)')]
Fraction = Annotated[float, Within('[0, 1]')]
Part = Annotated[float, Within('(0, 1)')]  # something, and not all
Decay = Annotated[float, Within('[0, 1)')]  # of an exponential average


class Option(NamedTuple):
  """What an annotation says: bool, int, float or str, and which of them."""

  kind: type
  bounds: Within | OneOf | None = None
  none: bool = False  # it may be None

  def __str__(self) -> str:
    """Of `moe-options`, as "int in [1, 2^31) or None"."""
    if isinstance(self.bounds, OneOf):
      text = ', '.join(self.bounds.names)
    else:
      text = self.kind.__name__
      text += f' in {self.bounds.text}' if self.bounds else ''
    return text + (' or None' if self.none else '')

  def check(self, name: str, value: Any) -> None:
    """ValueError, one line with the name, for a value that it may not be."""
    if self._has(value) or (self.none and value is None):
      return
    if isinstance(self.bounds, OneOf):
      names = ', '.join(self.bounds.names)
      raise ValueError(f'{name}={value!r}; there are {names}')
    article = 'an' if self.kind is int else 'a'
    raise ValueError(f'{name}={value!r} is not {article} {self}')

  def _has(self, value):
    kinds = (float, int) if self.kind is float else self.kind
    if not isinstance(value, kinds):
      return False
    if isinstance(value, bool) and self.kind is not bool:
      return False
    if self.bounds is not None:
      return value in self.bounds
    return self.kind is not float or math.isfinite(value)


def option(hint: Any) -> Option | None:
  """What an annotation says; None for one that is of no plain value."""
  if hint in (bool, int, float, str):
    return Option(hint)
  origin, inside = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    found = option(inside[0])
    bounds = [a for a in inside[1:] if isinstance(a, (Within, OneOf))]
    return found._replace(bounds=bounds[0]) if found and bounds else found
  if origin is Literal:
    return Option(type(inside[0]), OneOf(inside))
  if origin in (typing.Union, types.UnionType):
    found = [option(a) for a in inside if a is not type(None)]
    if len(found) == 1 < len(inside) and found[0]:
      return found[0]._replace(none=True)
  return None


@functools.cache
def options(part: Callable[..., Any]) -> dict[str, Option]:
  """{name: Option} of a function's arguments, or of a class's fields.

  `name.*` stands for the values of a dict. An argument without an annotation
  is what its default is.
  """
  try:
    hints = typing.get_type_hints(part, include_extras=True)
  except NameError:  # of what is imported for type checkers alone
    hints = {}
  optional = set()
  if not isinstance(part, type):
    for name, parameter in inspect.signature(part).parameters.items():
      hints.setdefault(name, type(parameter.default))
      optional |= {name} if parameter.default is None else set()
  found = {}
  for name, hint in hints.items():
    if typing.get_origin(hint) is dict:
      name, hint = f'{name}.*', typing.get_args(hint)[1]
    said = option(hint)
    if said is not None:
      found[name] = said._replace(none=said.none or name in optional)
  return found


def check(
  part: Callable[..., Any], values: dict[str, Any], prefix: str = ''
) -> None:
  """ValueError, one line, for the first of these values that cannot be."""
  known = options(part)
  for name, value in values.items():
    if isinstance(value, dict) and f'{name}.*' in known:
      for key, one in value.items():
        known[f'{name}.*'].check(f'{prefix}{name}.{key}', one)
    elif name in known:
      known[name].check(prefix + name, value)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, which checks its arguments first."""
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args, **kwargs):
    check(function, signature.bind(*args, **kwargs).arguments)
    return function(*args, **kwargs)

  return call
