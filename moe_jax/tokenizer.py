"""Text to token ids and back, without loss: plain bytes, or a byte-level BPE.

Both kinds own one id that no text can produce: the separator, which stands
between documents (see data.py).
"""

import abc
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moe_jax import cache
from moe_jax.corpus import Corpus, DataConfig, DataError

logger = logging.getLogger(__name__)

SEPARATOR = '<|endoftext|>'

# What BPE may merge within: a line end with the indent that follows, a word
# with the one mark before it, up to three digits, a run of marks with its line
# end and indent, other white space. Of the patterns tried on the standard
# library (GPT-2's and cl100k's among them) it packs most bytes in a token:
# 3.74 at 4096 tokens, where those two reach 3.66 and 3.68 (held-out files).
PATTERN = (
  r'\s*\n[ \t]*'
  r'|[^\r\n\p{L}\p{N}]?\p{L}+'
  r'|\p{N}{1,3}'
  r'| ?[^\s\p{L}\p{N}]+(?:\n[ \t]*)?'
  r'|\s+'
)
TRAINER_VERSION = 1  # raise it with any change that changes a trained BPE

CHUNK = 1 << 16  # characters: one large document must not fill the memory
CHUNKS_AT_ONCE = 64


class Tokenizer(abc.ABC):
  """A vocabulary of `vocab_size` ids, the `separator` among them.

  `token_bytes` is int32 [V]: the UTF-8 bytes each id stands for, 0 for those
  that no text gives; so `token_bytes[ids].sum()` is the size of the text.
  """

  vocab_size: int
  separator: int
  token_bytes: np.ndarray

  @abc.abstractmethod
  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """One int32 array of ids for each text; never one that no text gives."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`: exact for what `encode` gave.

    Ids that no text gives vanish; bytes that are no UTF-8 become U+FFFD.
    """

  @abc.abstractmethod
  def save(self, path: str | os.PathLike) -> None:
    """Writes a JSON file that `load` reads."""

  @abc.abstractmethod
  def fingerprint(self) -> bytes:
    """Equal for two tokenizers only if they give equal ids."""


class Bytes(Tokenizer):
  """A token is a byte; 256 is the separator."""

  def __init__(self):
    self.vocab_size = 257
    self.separator = 256
    self.token_bytes = np.array([1] * 256 + [0], np.int32)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [
      np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts
    ]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if i != self.separator).decode(errors='replace')

  def save(self, path: str | os.PathLike) -> None:
    content = {
      'type': 'bytes',
      'vocab_size': self.vocab_size,
      'separator': self.separator,
    }
    pathlib.Path(path).write_text(json.dumps(content) + '\n', encoding='utf-8')

  def fingerprint(self) -> bytes:
    return b'bytes'


class BPE(Tokenizer):
  """A byte-level BPE of the `tokenizers` library; the separator is id 0.

  `specials` names the ids that no text gives, the separator among them.
  `save` writes the library's own tokenizer.json, which other tools read too.
  """

  def __init__(self, library: tokenizers.Tokenizer):
    # Else a text that happens to spell the separator would become one.
    library.encode_special_tokens = True
    self._library = library
    self.vocab_size = library.get_vocab_size()
    self.specials = {
      token.content: index
      for index, token in library.get_added_tokens_decoder().items()
      if token.special
    }
    if SEPARATOR not in self.specials:
      raise ValueError(f'the tokenizer has no token {SEPARATOR}')
    self.separator = self.specials[SEPARATOR]
    self._bytes = _token_bytes(library, set(self.specials.values()))
    self.token_bytes = np.array([len(b) for b in self._bytes], np.int32)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    owners, chunks = [], []
    for owner, text in enumerate(texts):
      for chunk in _chunks(text):
        owners.append(owner)
        chunks.append(chunk)
    parts = [[np.zeros(0, np.int32)] for _ in texts]
    for start in range(0, len(chunks), CHUNKS_AT_ONCE):
      stop = start + CHUNKS_AT_ONCE
      encodings = self._library.encode_batch_fast(
        chunks[start:stop], add_special_tokens=False
      )
      for owner, encoding in zip(owners[start:stop], encodings, strict=True):
        parts[owner].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(part) for part in parts]

  def decode(self, ids: Iterable[int]) -> str:
    return b''.join(self._bytes[i] for i in ids).decode(errors='replace')

  def save(self, path: str | os.PathLike) -> None:
    content = self._library.to_str(pretty=True)
    pathlib.Path(path).write_text(content, encoding='utf-8')

  def fingerprint(self) -> bytes:
    return hashlib.sha256(self._library.to_str().encode()).digest()


def get(config: DataConfig, corpus: Corpus) -> Tokenizer:
  """The tokenizer that `config` names; a BPE is trained on `corpus.train`.

  Raises:
    DataError: the text is too short to give a BPE of `config.vocab_size`.
  """
  if config.tokenizer == 'bytes':
    return Bytes()
  return cached_bpe(
    corpus.train, corpus.sha256, config.vocab_size, config.cache_dir
  )


def cached_bpe(
  texts: list[str],
  sha256: str,
  vocab_size: int,
  cache_dir: str,
  specials: tuple[str, ...] = (SEPARATOR,),
) -> BPE:
  """What `train` returns, kept in the cache under the `sha256` of the texts."""
  key = f'{sha256} {vocab_size} {TRAINER_VERSION} {PATTERN} {specials}'
  name = f'bpe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json'

  def read(path: pathlib.Path) -> Tokenizer:
    tokenizer = load(path)
    if tokenizer.vocab_size != vocab_size:
      raise ValueError(f'it has {tokenizer.vocab_size} tokens')
    return tokenizer

  return cache.cached(
    path=cache.directory(cache_dir) / name,
    read=read,
    make=lambda: train(texts, vocab_size, specials),
    write=lambda path, tokenizer: tokenizer.save(path),
  )


def train(
  texts: list[str], vocab_size: int, specials: tuple[str, ...] = (SEPARATOR,)
) -> BPE:
  """A BPE of exactly `vocab_size` tokens; same texts, same BPE.

  The `specials` are ids 0, 1, ...; the separator must be among them.

  Raises:
    DataError: `vocab_size` is below 257 or more than `texts` can fill.
  """
  started = time.monotonic()
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PATTERN), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(specials),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  library.train_from_iterator(_all_chunks(texts), trainer)
  if library.get_vocab_size() != vocab_size:
    raise DataError(
      f'data.vocab_size is {vocab_size}, but this text makes a BPE of'
      f' {library.get_vocab_size()} tokens'
    )
  logger.info(
    'trained a BPE of %d tokens in %.1f s',
    vocab_size, time.monotonic() - started,
  )  # fmt: skip
  return BPE(library)


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` wrote.

  Raises:
    DataError: the file is missing or holds no tokenizer.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
    if json.loads(text).get('type') == 'bytes':
      return Bytes()
    return BPE(tokenizers.Tokenizer.from_str(text))
  except Exception as error:  # the library raises bare exceptions
    raise DataError(f'{path} holds no tokenizer: {error}') from error


def _all_chunks(texts: list[str]) -> Iterator[str]:
  for text in texts:
    yield from _chunks(text)


def _chunks(text: str) -> Iterator[str]:
  """Cuts where PATTERN cuts too: between a line's indent and its text."""
  start = 0
  if len(text) > CHUNK:
    for match in re.finditer(r'\n[ \t]*(?=\S)', text):
      if match.end() - start >= CHUNK:
        yield text[start : match.end()]
        start = match.end()
  if start < len(text):
    yield text[start:]


def _token_bytes(
  library: tokenizers.Tokenizer, specials: set[int]
) -> list[bytes]:
  """The bytes of every id, empty for the specials.

  Raises:
    ValueError: a token is not spelled in the alphabet of byte-level BPE.
  """
  byte_of = _alphabet()
  spelled = []
  for index in range(library.get_vocab_size()):
    token = library.id_to_token(index)
    if index in specials:
      token = ''
    if token is None or not set(token) <= byte_of.keys():
      raise ValueError(f'token {index} is {token!r}, not bytes')
    spelled.append(bytes(byte_of[letter] for letter in token))
  return spelled


def _alphabet() -> dict[str, int]:
  """GPT-2's spelling: printable Latin-1 stands for itself, the rest shifts."""
  byte_of = {}
  shifted = 0
  for byte in range(256):
    if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
      byte_of[chr(byte)] = byte
    else:
      byte_of[chr(256 + shifted)] = byte
      shifted += 1
  return byte_of
