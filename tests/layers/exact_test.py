"""Counts of decimal factors, which floats miss by one."""

import pytest

from moe_jax import exact


@pytest.mark.parametrize(
  'factor, n, of, count',
  [
    (1.1, 10, 1, 11),  # the float product is 11.000000000000002
    (0.07, 100, 1, 7),
    (0.1, 3, 1, 1),
    (1.25, 8, 4, 3),
    (2.0, 6, 4, 3),
    (1, 0, 1, 0),
  ],
)
def test_ceil_is_of_the_decimal_number(factor, n, of, count):
  assert exact.ceil(factor, n, of) == count


def test_nearest_is_of_the_decimal_number():
  assert exact.nearest(1.005, 1000) == 1005  # 1004.9999999999999 as floats
  assert [exact.nearest(0.5, n) for n in (1, 2, 3)] == [0, 1, 2]


def test_a_product_is_exact():
  assert exact.ceil(exact.product(1.1, 2), 5) == 11
  assert exact.ceil(exact.product(0.1, 3), 10) == 3  # 0.1 * 3 * 10 > 3
