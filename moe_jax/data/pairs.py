"""Aligned sentences for translation: batches, references and BLEU.

A pair is a line `source<TAB>target`. One BPE serves both sides; among its ids
are a mark that begins and ends a sentence, a pad, and, where several target
languages share a model, one id for each of them, which begins the source:

  source   language? token token token end pad pad
  ids      begin token token pad pad pad
  target   token token end pad pad pad

Both sides are `max_length` long, padded at the right. A batch is a dict of
arrays, B pairs of S source and L target tokens:

  source_BxS       int32
  source_mask_BxS  float32  1 on tokens and the end mark, 0 on padding
  ids_BxL          int32    what the decoder reads
  target_BxL       int32    the next token
  mask_BxL         float32  1 where the target counts, 0 on padding
  segment_BxL      int32    0 where the target counts, -1 on padding
  pos_BxL          int32    position, from 0 at the begin mark
  row_B            int32    row number in the global batch

A row of an evaluation's last batch that has no pair is padding. Processes share
a global batch by `row_B`, as in data.py.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import grain
import numpy as np

from moe_jax import exact, ranges
from moe_jax.data import cache, corpus, tokenizer
from moe_jax.data.batches import Batch, Batches, evenly_spaced, of_batch, READ
from moe_jax.data.corpus import DataError, in_range

logger = logging.getLogger(__name__)

PAD = '<|pad|>'
MIN_VOCAB = 258  # every byte, the mark and the pad


@dataclasses.dataclass(frozen=True)
class PairsConfig:
  """Which pairs to read and how to cut them into tokens.

  Attributes:
    source: 'pairs'.
    path: comma-separated globs of .tsv files, plain, .xz or .gz, UTF-8.
    eval_path: globs of the held-out files; '' holds out by `eval_fraction`.
    eval_fraction: the part of the distinct source sentences that is held out,
      each with all its translations. Pairs that share a sentence with a
      held-out pair are not trained on, whatever holds it out.
    vocab_size: ids in all: both sides' BPE, the marks and the languages.
    cache_dir: where the BPE and the tokens are kept; '' is the user's cache.
    language: '' for one pair of languages; else a regular expression whose one
      group, searched in a file's name, is the target language, as `en-(..)`.
    eval_lines: held-out pairs of a periodic evaluation; 0 is all.
    bleu_lines: held-out pairs that a finished run translates; 0 is none.
    beam: hypotheses a sentence.
    penalty: exponent of the length that scores are divided by.
    max_length: tokens of a side with its marks, a run's seq_len. Longer
      training pairs are left out, longer held-out ones cut.

  Raises:
    DataError: a value is out of range or no such regular expression.
  """

  source: str = 'pairs'
  path: str = ''
  eval_path: str = ''
  eval_fraction: ranges.Part = 0.05
  # Bytes, a mark and a pad at the least.
  vocab_size: Annotated[int, ranges.Within(f'[{MIN_VOCAB}, 2^31)')] = 8192
  cache_dir: str = ''
  language: str = ''
  eval_lines: ranges.Natural = 0
  bleu_lines: ranges.Natural = 200
  beam: ranges.Count = 4
  penalty: ranges.Real = 1.0
  max_length: ranges.Count = 64

  def __post_init__(self):
    in_range(self)
    if self.source != 'pairs':
      raise DataError(f'data.source is {self.source!r}; it can be pairs')
    if not self.path:
      raise DataError('data.path is empty; pairs need a glob of .tsv files')
    if self.max_length < 3:
      raise DataError(
        f'seq_len is {self.max_length}; it must be 3 (a language, a token, a'
        ' mark) or more'
      )
    try:
      groups = re.compile(self.language).groups
    except re.error as error:
      raise DataError(
        f'data.language {self.language!r} is no regular expression: {error}'
      ) from error
    if self.language and groups != 1:
      raise DataError(
        f'data.language {self.language!r} has {groups} groups; it needs one,'
        ' the language'
      )


class Pair(NamedTuple):
  source: str
  target: str
  language: str  # of the target; '' where data.language is
  file: str  # its name without folders


class Rows(NamedTuple):
  """Tokens end to end: row r is token_N[bound_Q[r] : bound_Q[r + 1]]."""

  token_N: np.ndarray  # int32
  bound_Q: np.ndarray  # int64, Q = rows + 1; the first is 0

  def padded(
    self, row_B: np.ndarray, width: int, pad: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, width], int64 [B]): rows, cut at the width, and their lengths.

    Row -1 is empty.
    """
    start_B = self.bound_Q[row_B]
    length_B = np.where(row_B >= 0, self.bound_Q[row_B + 1] - start_B, 0)
    place_BxW = start_B[:, None] + np.arange(width)
    token_BxW = self.token_N[np.minimum(place_BxW, len(self.token_N) - 1)]
    return np.where(_first(length_B, width), token_BxW, pad), length_B

  def lengths(self) -> np.ndarray:
    return np.diff(self.bound_Q)


class Split(NamedTuple):
  """The tokens of pairs, with the languages and end marks; R rows a side."""

  source: Rows
  target: Rows


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs to train on and pairs held out, as batches.

  `sha256` covers the name, order, split, language and content of every pair, so
  it changes whenever a token could. `sizes` are what a model is made with: V
  ids, among them `begin`, `end` and `pad`. A row has `length` targets.
  """

  description: str
  sha256: str
  sizes: dict[str, int]
  begin: int
  end: int
  pad: int
  length: int
  eval_share: float  # the part of the held-out pairs that eval_lines asks for
  tokenizer: tokenizer.BPE
  train: Split = dataclasses.field(repr=False)
  train_R: np.ndarray = dataclasses.field(repr=False)  # rows that fit
  eval: Split = dataclasses.field(repr=False)
  eval_pairs: list[Pair] = dataclasses.field(repr=False)
  streams = False

  @property
  def token_bytes(self) -> np.ndarray:
    return self.tokenizer.token_bytes

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    row_B: np.ndarray | None = None,
  ) -> grain.DatasetIterator:
    """Endless batches of `row_B`, by default all, of `batch_size` pairs.

    No row is padding. Each epoch takes every pair that fits once, in a new
    order; a batch may begin in one epoch and end in the next. `get_state()` is
    a small dict of ints that counts the batches given out, the same for every
    `row_B`; `set_state` continues there exactly, also with another `row_B`.

    Raises:
      DataError: the pairs are too few for one batch, or `row_B` are not
        distinct rows of it.
    """
    row_B = of_batch(batch_size, row_B)
    if len(self.train_R) < batch_size:
      raise DataError(
        f'too few training pairs for a batch of {batch_size}: there are'
        f' {len(self.train_R)} of at most {self.length} tokens a side'
      )

    def batch(indices: list[int]) -> Batch:
      return self._batch(self.train, self.train_R[indices][row_B], row_B)

    # Derived here, because grain does not promise to keep its own derivation.
    (shuffle_seed,) = np.random.SeedSequence(seed).generate_state(1)
    return iter(
      grain.MapDataset.range(len(self.train_R))
      .shuffle(seed=int(shuffle_seed))  # anew each epoch
      .repeat()
      # Without drop_remainder grain overflows at batch_size 1.
      .batch(batch_size, drop_remainder=True, batch_fn=batch)
      .to_iter_dataset(READ)
    )

  def eval_batches(
    self,
    batch_size: int,
    share: float = 1.0,
    row_B: np.ndarray | None = None,
  ) -> Batches:
    """Batches in which every held-out pair is once, in order.

    What is missing from the last batch are rows of padding. A `share` below 1
    reads about that part of the pairs, in full batches, spread evenly.
    Of each batch the rows `row_B` are read, by default all.

    Raises:
      DataError: `row_B` are not distinct rows of a batch.
    """
    row_B = of_batch(batch_size, row_B)
    batch = lambda pair_B: self._batch(self.eval, pair_B, row_B)
    return Batches(batch, self._spread(share, batch_size), batch_size, row_B)

  def references(self, share: float, batch_size: int) -> list[dict[str, str]]:
    """source, target and language, uncut, of the rows of `eval_batches`."""
    chosen = [self.eval_pairs[i] for i in self._spread(share, batch_size)]
    return [
      {'source': pair.source, 'target': pair.target, 'language': pair.language}
      for pair in chosen
    ]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of what follows a begin mark, as far as the first end mark."""
    kept = itertools.takewhile(
      lambda index: index != self.end, np.asarray(ids).tolist()
    )
    return self.tokenizer.decode(kept)

  def save(self, workdir: str | os.PathLike) -> None:
    self.tokenizer.save(pathlib.Path(workdir) / 'tokenizer.json')

  def _spread(self, share: float, batch_size: int) -> np.ndarray:
    """int64 [n]: which held-out pairs to read."""
    pairs = len(self.eval_pairs)
    return evenly_spaced(pairs, exact.nearest(share, pairs), batch_size)

  def _batch(
    self, split: Split, pair_B: np.ndarray, row_B: np.ndarray
  ) -> Batch:
    """Pair -1 is padding."""
    L = self.length
    source_BxS, size_B = split.source.padded(pair_B, L, self.pad)
    target_BxL, length_B = split.target.padded(pair_B, L, self.pad)
    size_B = np.minimum(size_B, L)
    # Where it is already; but a cut source lost its own.
    has = np.flatnonzero(size_B)
    source_BxS[has, size_B[has] - 1] = self.end
    ids_BxL = np.roll(target_BxL, 1, axis=1)
    ids_BxL[:, 0] = self.begin
    ids_BxL = np.where(_first(length_B, L), ids_BxL, self.pad)
    return {
      'source_BxS': source_BxS,
      'source_mask_BxS': _first(size_B, L).astype(np.float32),
      'ids_BxL': ids_BxL,
      'target_BxL': target_BxL,
      'mask_BxL': _first(length_B, L).astype(np.float32),
      'segment_BxL': _first(length_B, L).astype(np.int32) - 1,
      'pos_BxL': np.tile(np.arange(L, dtype=np.int32), (len(pair_B), 1)),
      'row_B': row_B.astype(np.int32),
    }


def _first(length_B: np.ndarray, width: int) -> np.ndarray:
  """bool [B, width]: the first `length_B` places."""
  return np.arange(width) < length_B[:, None]


def load(config: PairsConfig) -> Pairs:
  """Reads the pairs, and trains or finds the BPE of the training ones.

  Raises:
    DataError: one line that names the file and line, or the value, at fault.
  """
  train, held_out, left_out = _read(config)
  sha256 = _digest(train, held_out)
  languages = sorted({pair.language for pair in train} - {''})
  tok = tokenizer.cached_bpe(
    [text for pair in train for text in (pair.source, pair.target)],
    sha256,
    config.vocab_size,
    config.cache_dir,
    (tokenizer.SEPARATOR, PAD, *map(_mark, languages)),
  )
  key = hashlib.sha256(sha256.encode() + tok.fingerprint()).hexdigest()[:16]
  folder = cache.directory(config.cache_dir)
  train_split = _cached_split(folder / f'pairs-{key}-train.npz', train, tok)
  eval_split = _cached_split(folder / f'pairs-{key}-eval.npz', held_out, tok)
  fits_R = np.logical_and(
    *(side.lengths() <= config.max_length for side in train_split)
  )
  lines = config.eval_lines or len(held_out)
  found = Pairs(
    description=_description(
      config, train, held_out, left_out, fits_R, eval_split
    ),
    sha256=sha256,
    sizes={'V': tok.vocab_size},
    begin=tok.separator,
    end=tok.separator,
    pad=tok.specials[PAD],
    length=config.max_length,
    eval_share=min(1.0, lines / len(held_out)),
    tokenizer=tok,
    train=train_split,
    train_R=np.flatnonzero(fits_R),
    eval=eval_split,
    eval_pairs=held_out,
  )
  logger.info('%s, sha256 %s', found.description, sha256[:12])
  return found


def _mark(language: str) -> str:
  return f'<|to {language}|>'


def _description(
  config: PairsConfig,
  train: list[Pair],
  held_out: list[Pair],
  left_out: int,
  fits_R: np.ndarray,
  eval_split: Split,
) -> str:
  languages = ', '.join(sorted({pair.language for pair in train} - {''}))
  sources, targets = (
    np.count_nonzero(side.lengths() > config.max_length) for side in eval_split
  )
  return (
    f'{config.path}{" to " * bool(languages)}{languages}:'
    f' {_amount(train)} to train on, of which'
    f' {np.count_nonzero(~fits_R):,} longer than {config.max_length} tokens'
    f' left out{_shared(left_out)}; {_amount(held_out)} held out, of which'
    f' {sources:,} sources and {targets:,} targets cut'
  )


def _shared(left_out: int) -> str:
  if not left_out:
    return ''
  return f', besides {left_out:,} that share a sentence with held-out pairs'


def _amount(pairs: list[Pair]) -> str:
  files = len({pair.file for pair in pairs})
  return f'{len(pairs):,} pairs in {files} file{"s" * (files != 1)}'


# --- reading ----------------------------------------------------------------


def _read(config: PairsConfig) -> tuple[list[Pair], list[Pair], int]:
  """Pairs to train on, held-out pairs, and how many are neither."""
  files, eval_files = corpus.split_files(config.path, config.eval_path)
  found = _read_all(files, config.language)
  if eval_files:
    train, held_out = found, _read_all(eval_files, config.language)
  else:
    train, held_out = _hold_out(found, config)
  apart = _apart(train, held_out)
  if not apart:
    raise DataError(
      f'{config.path}: no pair is left to train on: all {len(train)} share a'
      ' sentence with held-out pairs'
    )
  known = {pair.language for pair in apart}
  for pair in held_out:
    if pair.language not in known:
      raise DataError(
        f'{pair.file} is held out in language {pair.language!r}, in which there'
        ' is nothing to train on'
      )
  kept = held_out if eval_files else _distinct(held_out)
  left_out = len(train) - len(apart) + len(held_out) - len(kept)
  return apart, kept, left_out


def _apart(train: list[Pair], held_out: list[Pair]) -> list[Pair]:
  """The pairs of which neither side is a sentence of a held-out pair.

  Nor in the other direction: files may have two languages both ways.
  """
  known = {corpus.content(text) for pair in held_out for text in pair[:2]}
  return [
    pair
    for pair in train
    if known.isdisjoint(corpus.content(text) for text in pair[:2])
  ]


def _distinct(pairs: list[Pair]) -> list[Pair]:
  """Each pair once in its language."""
  new = corpus.firsts(
    (*map(corpus.content, pair[:2]), pair.language) for pair in pairs
  )
  return list(itertools.compress(pairs, new))


def _read_all(files: list[pathlib.Path], language: str) -> list[Pair]:
  pairs = []
  for path in files:
    target_language = _language(path, language)
    for source, target in _lines(path):
      pairs.append(Pair(source, target, target_language, path.name))
  return pairs


def _language(path: pathlib.Path, pattern: str) -> str:
  if not pattern:
    return ''
  match = re.search(pattern, path.name)
  if not match or not match[1]:
    raise DataError(
      f'data.language {pattern!r} finds no language in the name of {path}'
    )
  return match[1]


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  raw, _ = corpus.uncompressed(path)
  if not raw:
    raise DataError(f'{path} is empty')
  try:
    text = raw.decode()
  except UnicodeDecodeError as error:
    number = raw.count(b'\n', 0, error.start) + 1
    raise DataError(
      f'{path}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8'
    ) from error
  # Not splitlines: a sentence may hold the other line ends of Unicode.
  lines = text.removesuffix('\n').split('\n')
  for number, line in enumerate(lines, start=1):
    sides = line.removesuffix('\r').split('\t')
    if len(sides) != 2:
      raise DataError(
        f'{path}:{number}: {len(sides) - 1} tabs, not one, in {line[:60]!r}'
      )
    source, target = sides
    if not source.strip() or not target.strip():
      side = 'target' if source.strip() else 'source'
      raise DataError(f'{path}:{number}: the {side} is empty in {line[:60]!r}')
    yield source, target


def _hold_out(
  pairs: list[Pair], config: PairsConfig
) -> tuple[list[Pair], list[Pair]]:
  """Holds out source sentences, in the order of their hash.

  With all their translations: else one would be trained on in one language and
  held out in another.
  """
  of = {source: corpus.content(source) for source in {p.source for p in pairs}}
  hashes = {}  # of copies the least
  for source, key in of.items():
    digest = hashlib.sha256(source.encode()).digest()
    hashes[key] = min(hashes.get(key, digest), digest)
  count = max(1, round(config.eval_fraction * len(hashes)))
  if count == len(hashes):
    raise DataError(
      f'{config.path}: with data.eval_fraction {config.eval_fraction} no pair'
      f' is left to train on, of {len(hashes)} distinct sources'
    )
  held = set(sorted(hashes, key=hashes.get)[:count])
  train = [pair for pair in pairs if of[pair.source] not in held]
  return train, [pair for pair in pairs if of[pair.source] in held]


def _digest(train: list[Pair], held_out: list[Pair]) -> str:
  total = hashlib.sha256()
  for split, pairs in (('train', train), ('eval', held_out)):
    for name, group in itertools.groupby(pairs, lambda p: (p.file, p.language)):
      lines = [f'{pair.source}\t{pair.target}' for pair in group]
      # The header states the lines, so no two splits read the same.
      total.update(json.dumps([split, *name, len(lines)]).encode() + b'\n')
      total.update('\n'.join(lines).encode() + b'\n')
  return total.hexdigest()


# --- tokens -----------------------------------------------------------------


def _cached_split(
  path: pathlib.Path, pairs: list[Pair], tok: tokenizer.BPE
) -> Split:
  sources = [pair.source for pair in pairs]
  targets = [pair.target for pair in pairs]

  def read(path: pathlib.Path) -> Split:
    # A broken file that numpy opened itself would stay open.
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      split = Split(
        Rows(arrays['source_N'], arrays['source_bound_Q']),
        Rows(arrays['target_N'], arrays['target_bound_Q']),
      )
    _check(split.source, sources, tok)
    _check(split.target, targets, tok)
    return split

  def make() -> Split:
    marks = [
      [tok.specials[_mark(pair.language)]] if pair.language else []
      for pair in pairs
    ]
    return Split(
      _encode(sources, marks, tok), _encode(targets, [[]] * len(pairs), tok)
    )

  def write(path: pathlib.Path, split: Split) -> None:
    np.savez(
      path,
      source_N=split.source.token_N,
      source_bound_Q=split.source.bound_Q,
      target_N=split.target.token_N,
      target_bound_Q=split.target.bound_Q,
    )

  return cache.cached(path=path, read=read, make=make, write=write)


def _encode(
  texts: list[str], marks: list[list[int]], tok: tokenizer.BPE
) -> Rows:
  """Each text after its marks and before the end mark."""
  parts, lengths = [], [0]
  for mark, ids in zip(marks, tok.encode(texts), strict=True):
    parts += [mark, ids, [tok.separator]]
    lengths.append(len(mark) + len(ids) + 1)
  # An empty list of marks is float64 to numpy.
  token_N = np.concatenate(parts, dtype=np.int32, casting='unsafe')
  return Rows(token_N, np.cumsum(lengths, dtype=np.int64))


def _check(rows: Rows, texts: list[str], tok: tokenizer.BPE) -> None:
  """Raises ValueError unless they may be the rows of these texts."""
  token_N, bound_Q = rows
  if (token_N.dtype, bound_Q.dtype) != (np.int32, np.int64):
    raise ValueError(f'it holds {token_N.dtype} and {bound_Q.dtype}')
  if bound_Q.shape != (len(texts) + 1,) or token_N.shape != (bound_Q[-1],):
    raise ValueError(f'its shapes are {token_N.shape} and {bound_Q.shape}')
  if token_N.min() < 0 or token_N.max() >= tok.vocab_size:
    raise ValueError(f'an id is outside 0..{tok.vocab_size - 1}')
  last_R = bound_Q[1:] - 1
  if rows.lengths().min() < 1 or (token_N[last_R] != tok.separator).any():
    raise ValueError('a row does not end with the mark')
  found_R = np.cumsum(tok.token_bytes[token_N], dtype=np.int64)[last_R]
  size_R = np.cumsum([len(text.encode()) for text in texts], dtype=np.int64)
  if (found_R != size_R).any():
    raise ValueError('its tokens stand for other texts')


# --- BLEU -------------------------------------------------------------------


def bleu(hypotheses: list[str], references: list[str]) -> dict[str, float]:
  """`bleu` and `chrf` of a corpus, 0 to 100, by sacrebleu as it is by default.

  BLEU is of detokenised text: 13a tokens, cased, exponential smoothing.

  Raises:
    DataError: sacrebleu is not installed.
    ValueError: there is no sentence, or not one reference for each hypothesis.
  """
  try:
    import sacrebleu
  except ImportError as error:
    raise DataError(
      "BLEU needs sacrebleu: pip install -e '.[translation]'"
    ) from error
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f'{len(hypotheses)} hypotheses for {len(references)} references'
    )
  return {
    'bleu': sacrebleu.corpus_bleu(hypotheses, [references]).score,
    'chrf': sacrebleu.corpus_chrf(hypotheses, [references]).score,
  }
