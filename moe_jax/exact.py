"""Counts from factors: by the decimal number that a config shows.

1.1 * 10 is 11 here, though the float 1.1 is a little more.
"""

import fractions
import functools


def ceil(factor: float | fractions.Fraction, n: int, of: int = 1) -> int:
  """The least integer that is not below factor * n / of."""
  exact = _decimal(factor)
  return -(-exact.numerator * n // (exact.denominator * of))


def product(a: float, b: float) -> fractions.Fraction:
  """a * b, a factor."""
  return _decimal(a) * _decimal(b)


def nearest(factor: float, n: int) -> int:
  """factor * n, to the nearest integer; a half goes to the even one."""
  return round(_decimal(factor) * n)


@functools.lru_cache
def _decimal(number):
  if isinstance(number, fractions.Fraction):
    return number
  return fractions.Fraction(repr(float(number)))
