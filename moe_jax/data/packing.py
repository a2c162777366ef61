"""Batches of packed text: deterministic, resumable, read in parts.

The documents of a split form one stream, each after a separator token, with a
last separator at the end:

  | doc doc doc | doc | doc doc |        "|" is the separator

The separator is the first token of its document, from which the first real one
is predicted, and the target of the last token of the document before. A row
reads `seq_len` inputs of the stream and predicts the token after each. A batch
is a dict of arrays, B rows of L tokens:

  ids_BxL      int32    inputs
  target_BxL   int32    the next token
  segment_BxL  int32    document within the row, from 0, or -1 on padding;
                        attention stays inside
  pos_BxL      int32    position within the document, from 0 at its separator,
                        or at the row's first token where the row cuts it: so
                        a document's numbers are the same wherever it is packed
  mask_BxL     float32  1 where the target counts, 0 on padding
  row_B        int32    row number in the global batch
  begins_B     int32    1 where a row begins anew, in streams alone

A process may read a part of each global batch: its `row_B`, an array given to
the functions below, tells which rows, in that order, and None is all of them.
A row is the same whoever reads it.
"""

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator

import grain
import numpy as np

from moe_jax import exact
from moe_jax.data import cache
from moe_jax.data.batches import Batch, evenly_spaced, of_batch, READ
from moe_jax.data.corpus import Corpus, DataConfig, DataError, load, TextConfig
from moe_jax.data.tokenizer import Tokenizer

__all__ = (
  'Corpus', 'DataConfig', 'DataError', 'EvalBatches', 'eval_batches', 'load',
  'pack', 'stream_iterator', 'streams', 'train_iterator', 'unpack',
)  # fmt: skip


def unpack(stream: np.ndarray) -> list[np.ndarray]:
  """The documents of a stream that `pack` made."""
  cuts = np.flatnonzero(stream == stream[0])
  return [stream[a + 1 : b] for a, b in itertools.pairwise(cuts)]


def pack(documents: list[np.ndarray], separator: int) -> np.ndarray:
  """int32 [N], N = tokens + documents + 1: each after a separator, one last."""
  mark = np.array([separator], np.int32)
  parts = []
  for document in documents:
    parts += [mark, document]
  return np.concatenate([*parts, mark], dtype=np.int32, casting='same_kind')


def streams(
  config: TextConfig, corpus: Corpus, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """The packed training and held-out tokens, int32 [N] each, kept in the cache.

  Arrays from the cache are mapped from disk, read-only.
  """
  if config.tokenizer == 'bytes':  # faster made than read
    return (
      pack(tokenizer.encode(corpus.train), tokenizer.separator),
      pack(tokenizer.encode(corpus.eval), tokenizer.separator),
    )
  folder = cache.directory(config.cache_dir)
  key = hashlib.sha256(corpus.sha256.encode() + tokenizer.fingerprint())
  name = f'tokens-{key.hexdigest()[:16]}'
  return (
    _stream(
      folder / f'{name}-train.npy', corpus.train, corpus.train_bytes, tokenizer
    ),
    _stream(
      folder / f'{name}-eval.npy', corpus.eval, corpus.eval_bytes, tokenizer
    ),
  )


def _stream(
  path: pathlib.Path, texts: list[str], size: int, tokenizer: Tokenizer
) -> np.ndarray:
  def read(path: pathlib.Path) -> np.ndarray:
    stream = np.load(path, mmap_mode='r', allow_pickle=False)
    _check(stream, len(texts), size, tokenizer)
    return stream

  return cache.cached(
    path=path,
    read=read,
    make=lambda: pack(tokenizer.encode(texts), tokenizer.separator),
    write=lambda path, stream: np.save(path, stream, allow_pickle=False),
  )


def _check(
  stream: np.ndarray, documents: int, size: int, tokenizer: Tokenizer
) -> None:
  """Raises ValueError unless it may be the stream of this text."""
  if stream.dtype != np.int32 or stream.ndim != 1 or not stream.size:
    raise ValueError(f'it holds {stream.dtype} of shape {stream.shape}')
  if stream.min() < 0 or stream.max() >= tokenizer.vocab_size:
    raise ValueError(f'an id is outside 0..{tokenizer.vocab_size - 1}')
  if not stream[0] == stream[-1] == tokenizer.separator:
    raise ValueError('it does not start and end with the separator')
  separators = np.count_nonzero(stream == tokenizer.separator)
  if separators != documents + 1:
    raise ValueError(f'{separators} separators around {documents} documents')
  if tokenizer.token_bytes is None:
    return
  found = tokenizer.token_bytes[stream].sum(dtype=np.int64)
  if found != size:
    raise ValueError(f'its tokens stand for {found} of {size} bytes')


def train_iterator(
  train_N: np.ndarray,
  batch_size: int,
  seq_len: int,
  seed: int,
  row_B: np.ndarray | None = None,
) -> grain.DatasetIterator:
  """Endless batches of the rows `row_B` of `batch_size`, by default of all.

  For training the stream is a ring: its two ends are the same separator. Each
  epoch cuts the ring into rows from a new random place and shuffles them, so
  no token is a target twice in an epoch and fewer than `seq_len` are skipped.

  `get_state()` is a small dict of ints that counts the batches given out, the
  same for every `row_B`; `set_state` continues there exactly, also with another
  `row_B`.

  Raises:
    DataError: the stream is too short for one batch, or `row_B` are not
      distinct rows of it.
  """
  row_B = of_batch(batch_size, row_B)
  _check_sizes('training', train_N, batch_size, seq_len)
  ring = len(train_N) - 1
  rows = ring // seq_len
  # Derived here, because grain does not promise to keep its own derivation.
  shuffle_seed, cut_seed = np.random.SeedSequence(seed).generate_state(2)

  @functools.lru_cache(maxsize=4)
  def first_token(epoch: int) -> int:
    return int(np.random.default_rng([cut_seed, epoch]).integers(ring))

  def start(index: int, row: int) -> int:
    return first_token(index // rows) + row * seq_len

  def batch(starts: list[int]) -> Batch:
    local = np.array(starts)[row_B]
    place = (local[:, None] + np.arange(seq_len + 1)) % ring
    return _batch(train_N[place], np.ones_like(place), row_B, train_N[0])

  return iter(
    grain.MapDataset.range(rows)
    .shuffle(seed=int(shuffle_seed))  # anew each epoch
    .repeat()
    .map_with_index(start)
    # Without drop_remainder grain overflows at batch_size 1.
    .batch(batch_size, drop_remainder=True, batch_fn=batch)
    .to_iter_dataset(READ)
  )


def stream_iterator(
  train_N: np.ndarray,
  batch_size: int,
  seq_len: int,
  seed: int,
  row_B: np.ndarray | None = None,
) -> grain.DatasetIterator:
  """Endless batches whose rows go on where those of the batch before ended.

  The ring of `train_iterator` is cut, in each epoch from a new random place,
  into `batch_size` tracks; a batch takes the next `seq_len` tokens of each.
  `begins_B` is 1 in the first batch of an epoch. State, `row_B` and errors
  are those of `train_iterator`.
  """
  row_B = of_batch(batch_size, row_B)
  _check_sizes('training', train_N, batch_size, seq_len)
  ring = len(train_N) - 1
  track = ring // batch_size
  blocks = track // seq_len
  (cut_seed,) = np.random.SeedSequence(seed).generate_state(1)

  def batch(index: int, block: int) -> Batch:
    epoch = index // blocks
    cut = int(np.random.default_rng([cut_seed, epoch]).integers(ring))
    first_B = cut + row_B * track + block * seq_len
    place = (first_B[:, None] + np.arange(seq_len + 1)) % ring
    found = _batch(train_N[place], np.ones_like(place), row_B, train_N[0])
    begins_B = np.full(len(row_B), int(block == 0), np.int32)
    return {**found, 'begins_B': begins_B}

  return iter(
    grain.MapDataset.range(blocks)
    .repeat()
    .map_with_index(batch)
    .to_iter_dataset(READ)
  )


class EvalBatches:
  """A finite sequence of batches that can be read again; len() counts them."""

  def __init__(
    self,
    eval_N: np.ndarray,
    row_n: np.ndarray,
    batch_size: int,
    seq_len: int,
    row_B: np.ndarray,
    streams: bool,
  ):
    self._eval_N = eval_N
    self._streams = streams
    self._row_n = row_n  # int64 [n]: which rows of the stream to read
    self._batch_size = batch_size
    self._seq_len = seq_len
    self._row_B = row_B

  def __len__(self) -> int:
    return -(-len(self._row_n) // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    last = len(self._eval_N) - 1
    for start in range(0, len(self._row_n), self._batch_size):
      # Padding reads the last separator, which is in the last row already.
      first_B = np.full(self._batch_size, last + 1)
      rows = self._row_n[start : start + self._batch_size]
      first_B[: len(rows)] = rows * self._seq_len
      place = first_B[self._row_B, None] + np.arange(self._seq_len + 1)
      window = self._eval_N[np.minimum(place, last)]
      found = _batch(window, place <= last, self._row_B, self._eval_N[0])
      if self._streams:
        begins_B = np.full(len(self._row_B), int(start == 0), np.int32)
        found['begins_B'] = begins_B
      yield found


def eval_batches(
  eval_N: np.ndarray,
  batch_size: int,
  seq_len: int,
  share: float = 1.0,
  row_B: np.ndarray | None = None,
  streams: bool = False,
) -> EvalBatches:
  """Batches in which every token after the first is a target exactly once.

  The end of the last row and what is missing from the last batch are padding:
  separators, with mask 0. A `share` below 1 reads about that part of the rows,
  in full batches, spread evenly over the stream; with `streams` each row of a
  batch goes on where that of the batch before ended, and `begins_B` is 1 in
  the first. Of each batch the rows `row_B` are read, by default all.

  Raises:
    DataError: the stream is too short for one batch, or `row_B` are not
      distinct rows of it.
  """
  row_B = of_batch(batch_size, row_B)
  _check_sizes('held-out', eval_N, batch_size, seq_len)
  rows = -(-(len(eval_N) - 1) // seq_len)
  row_n = evenly_spaced(rows, exact.nearest(share, rows), batch_size)
  if streams:  # a track of consecutive rows for each row of the batch
    batches = -(-len(row_n) // batch_size)
    tracks = np.arange(batch_size)[None] * -(-rows // batch_size)
    row_n = (tracks + np.arange(batches)[:, None]).reshape(-1)
  return EvalBatches(
    eval_N=eval_N,
    row_n=row_n,
    batch_size=batch_size,
    seq_len=seq_len,
    row_B=row_B,
    streams=streams,
  )


def _check_sizes(
  split: str,
  stream: np.ndarray,
  batch_size: int,
  seq_len: int,
) -> None:
  need, have = batch_size * seq_len + 1, len(stream)
  if have < need:
    raise DataError(
      f'the {split} text is too small for one batch: {batch_size} rows of'
      f' {seq_len} need {need} tokens, it has {have}'
    )


def _batch(
  window_BxM: np.ndarray,
  real_BxM: np.ndarray,
  row_B: np.ndarray,
  separator: int,
) -> Batch:
  """A batch of int32 windows that are one token longer than its rows.

  `real_BxM` is 0 on padding.
  """
  ids_BxL = window_BxM[:, :-1]
  starts_BxL = ids_BxL == separator
  number_BxL = np.cumsum(starts_BxL, axis=1, dtype=np.int32)
  index_L = np.arange(ids_BxL.shape[1], dtype=np.int32)
  begin_BxL = np.maximum.accumulate(starts_BxL * index_L, axis=1)
  return {
    'ids_BxL': np.ascontiguousarray(ids_BxL),
    'target_BxL': np.ascontiguousarray(window_BxM[:, 1:]),
    'segment_BxL': np.where(
      real_BxM[:, :-1], number_BxL - starts_BxL[:, :1], -1
    ),
    'pos_BxL': index_L - begin_BxL,
    'mask_BxL': real_BxM[:, 1:].astype(np.float32),
    'row_B': row_B.astype(np.int32),
  }
