"""Processes that share the rows of a batch of 8, whatever is read."""

import numpy as np
import pytest

SPLITS = {
  'interleaved': [np.arange(s, 8, 4) for s in range(4)],
  'contiguous': np.split(np.arange(8), 2),
  'uneven': [np.array([6]), np.array([7, 0, 3]), np.array([5, 4, 2, 1])],
}
every_split = pytest.mark.parametrize('split', SPLITS.values(), ids=SPLITS)


def check(make, split):
  """That `make(row_B)`, a list of batches, reads those rows of each."""
  whole = make(None)
  parts = [make(row_B) for row_B in split]
  for step, batch in enumerate(whole):
    assert batch['row_B'].tolist() == list(range(8))
    for row_B, part in zip(split, parts, strict=True):
      assert len(part) == len(whole)
      assert part[step].keys() == batch.keys()
      for name, value in batch.items():
        assert part[step][name].dtype == value.dtype
        np.testing.assert_array_equal(part[step][name], value[row_B])
