"""What a run reads, be it text, pairs of sentences or images."""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from moe_jax.data import huggingface, images, packing, pairs, tokenizer
from moe_jax.data.corpus import (
  Corpus,
  DataConfig,
  DataError,
  TextConfig,
  TOKENIZERS,
)


class Dataset(Protocol):
  """Batches to train on and to evaluate on; each is a dict of arrays.

  Of each batch the rows `row_B` are read, in that order; None reads all.

  Attributes:
    description: one line for the log.
    sha256: covers all that could change a batch.
    sizes: what the model has to know: its fields that the data decides.
    length: targets a row, padding included.
    eval_share: the part of the held-out rows that a periodic evaluation reads.
    token_bytes: int32 [V], the bytes each id stands for, or None: then no bits
      per byte are told.
    streams: a row goes on where that of the batch before ended, unless the
      batch's `begins_B` says that it begins anew.
  """

  description: str
  sha256: str
  sizes: dict[str, Any]
  length: int
  eval_share: float
  token_bytes: np.ndarray | None
  streams: bool

  def train_batches(
    self, batch_size: int, seed: int, row_B: np.ndarray | None = None
  ) -> grain.DatasetIterator: ...

  def eval_batches(
    self,
    batch_size: int,
    share: float = 1.0,
    row_B: np.ndarray | None = None,
  ) -> Iterator: ...

  def save(self, workdir: pathlib.Path) -> None: ...


@dataclasses.dataclass(frozen=True)
class Text:
  """Packed documents, cut into rows of `length` tokens."""

  corpus: Corpus
  tokenizer: tokenizer.Tokenizer
  padded_size: int
  train_N: np.ndarray
  eval_N: np.ndarray
  sha256: str
  token_bytes: np.ndarray | None
  length: int
  eval_share: float
  streams: bool

  @property
  def description(self) -> str:
    return self.corpus.description

  @property
  def sizes(self) -> dict[str, Any]:
    return {'V': self.padded_size or self.tokenizer.vocab_size}

  def train_batches(
    self, batch_size: int, seed: int, row_B: np.ndarray | None = None
  ) -> grain.DatasetIterator:
    make = packing.stream_iterator if self.streams else packing.train_iterator
    return make(self.train_N, batch_size, self.length, seed, row_B)

  def eval_batches(
    self,
    batch_size: int,
    share: float = 1.0,
    row_B: np.ndarray | None = None,
  ) -> packing.EvalBatches:
    return packing.eval_batches(
      self.eval_N,
      batch_size,
      self.length,
      share=share,
      row_B=row_B,
      streams=self.streams,
    )

  def save(self, workdir: pathlib.Path) -> None:
    self.tokenizer.save(workdir / 'tokenizer.json')


def _text(
  read: Callable[[Any], Corpus], config: TextConfig, length: int
) -> Text:
  tokenizer.fixed(config)  # a bad file, before the time that reading takes
  corpus = read(config)
  tok = tokenizer.get(config, corpus)
  if 0 < config.padded_size < tok.vocab_size:
    raise DataError(
      f'data.padded_size is {config.padded_size}, less than the'
      f' {tok.vocab_size} ids of the tokenizer'
    )
  train_N, eval_N = packing.streams(config, corpus, tok)
  sha256 = corpus.sha256
  if config.tokenizer not in TOKENIZERS:  # a file's name is not its content
    both = bytes.fromhex(sha256) + tok.fingerprint()
    sha256 = hashlib.sha256(both).hexdigest()
  return Text(
    corpus=corpus,
    tokenizer=tok,
    padded_size=config.padded_size,
    train_N=train_N,
    eval_N=eval_N,
    sha256=sha256,
    token_bytes=tok.measure(corpus.eval, packing.unpack(eval_N)),
    length=length,
    eval_share=corpus.eval_share(config.eval_bytes),
    streams=config.order == 'stream',
  )


def _pairs(config: pairs.PairsConfig, length: int) -> pairs.Pairs:
  if config.bleu_lines and not importlib.util.find_spec('sacrebleu'):
    raise DataError(
      f'data.bleu_lines={config.bleu_lines} needs sacrebleu:'
      " pip install -e '.[translation]'"
    )
  return pairs.load(dataclasses.replace(config, max_length=length))


def _images(config: images.ImagesConfig, length: int) -> images.Images:
  del length  # one target an image
  return images.load(config)


class Source(NamedTuple):
  """A kind of data: its config, its reader, the model that it is for."""

  Config: type
  load: Callable[[Any, int], Dataset]  # (config, length)
  model: str


TEXT = Source(DataConfig, functools.partial(_text, packing.load), 'decoder')
HUB = Source(
  huggingface.HubConfig, functools.partial(_text, huggingface.load), 'decoder'
)
PAIRS = Source(pairs.PairsConfig, _pairs, 'translator')
IMAGES = Source(images.ImagesConfig, _images, 'classifier')
SOURCES = {
  'python_stdlib': TEXT,
  'text': TEXT,
  'huggingface': HUB,
  'pairs': PAIRS,
  'digits': IMAGES,
  'images': IMAGES,
}


def source(name: str) -> Source:
  """The kind of data of that name; ValueError if there is none."""
  if name not in SOURCES:
    raise ValueError(f'data.source is {name!r}; it can be {", ".join(SOURCES)}')
  return SOURCES[name]
