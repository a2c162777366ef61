"""Counts from factors: by the decimal number that a config shows.

1.1 * 10 is 11 here, though the float 1.1 is a little more.
"""

import fractions
import math


def ceil(factor: float | fractions.Fraction, n: int, of: int = 1) -> int:
  """The least integer that is not below factor * n / of."""
  return math.ceil(_decimal(factor) * n / of)


def product(a: float, b: float) -> fractions.Fraction:
  """a * b, a factor."""
  return _decimal(a) * _decimal(b)


def nearest(factor: float, n: int) -> int:
  """factor * n, to the nearest integer; a half goes to the even one."""
  return round(_decimal(factor) * n)


def _decimal(number):
  if isinstance(number, fractions.Fraction):
    return number
  return fractions.Fraction(repr(float(number)))
