"""Which rows of a split a batch has, and which of them one process reads."""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from moe_jax.data.corpus import DataError

Batch = dict[str, np.ndarray]

# One thread keeps ahead of any device: a batch is a gather of a few kilobytes.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def of_batch(batch_size: int, row_B: np.ndarray | None) -> np.ndarray:
  """int64 [B]: `row_B`, rows of a global batch; all of them for None.

  Raises:
    DataError: they are not distinct integers in 0..batch_size-1, or none.
  """
  if row_B is None:
    return np.arange(batch_size)
  row_B = np.asarray(row_B)
  known = np.intersect1d(row_B, np.arange(batch_size))  # each once
  integers = np.issubdtype(row_B.dtype, np.integer)
  if not (integers and known.size and known.shape == row_B.shape):
    raise DataError(
      f'row_B is {row_B.tolist()}; the rows of a batch that are read here must'
      f' be distinct integers in 0..{batch_size - 1}, at least one'
    )
  return row_B.astype(np.int64)


def evenly_spaced(rows: int, wanted: int, batch_size: int) -> np.ndarray:
  """int64 [n]: the rows of as many full batches as `wanted` rows need.

  Spread evenly, each at most once, in order; all where `wanted` is as many.
  """
  batches = max(1, -(-wanted // batch_size))
  count = min(rows, batches * batch_size)
  return np.arange(count) * rows // count


class Batches:
  """A finite sequence of batches that can be read again; len() counts them.

  Args:
    batch: makes a batch of these rows; -1 is padding.
    row_n: int64 [n], the rows, batch after batch.
    row_B: those of a global batch that are read here.
  """

  def __init__(
    self,
    batch: Callable[[np.ndarray], Batch],
    row_n: np.ndarray,
    batch_size: int,
    row_B: np.ndarray,
  ):
    row_n = np.pad(row_n, (0, -len(row_n) % batch_size), constant_values=-1)
    self._batch, self._row_nxB = batch, row_n.reshape(-1, batch_size)[:, row_B]

  def __len__(self) -> int:
    return len(self._row_nxB)

  def __iter__(self) -> Iterator[Batch]:
    return map(self._batch, self._row_nxB)
