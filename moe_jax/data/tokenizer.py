"""Text to token ids and back: plain bytes, a byte-level BPE, or a file's.

The first two lose nothing; what a tokenizer.json made elsewhere does to a text
is its own affair. Each kind has an id that stands in no document: the
separator, which stands between them (see data.py).
"""

import abc
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax import paths
from moe_jax.data import cache
from moe_jax.data.corpus import Corpus, DataError, TextConfig

logger = logging.getLogger(__name__)

SEPARATOR = '<|endoftext|>'
# What ends a text in the files of others; a file's is the first that it has.
SEPARATORS = (
  *(SEPARATOR, '<|end_of_text|>', '</s>', '<eos>', '[EOS]', '[SEP]'),
)

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
  that no text gives; so `token_bytes[ids].sum()` is the size of the text. It is
  None for a file's, of which `measure` tells more.
  """

  vocab_size: int
  separator: int
  token_bytes: np.ndarray | None

  @abc.abstractmethod
  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """One int32 array of ids for each text; never one that no text gives."""

  def prompt(self, text: str) -> list[int]:
    """The ids of a text's beginning, with the marks that its file puts there.

    Special tokens that it spells, as marks of a chat, are these tokens.
    Published models have seen both in training, models of moe-train have not.
    """
    return self.encode([text])[0].tolist()

  def marks(self) -> list[int]:
    """The ids that `prompt` puts before any text."""
    return []

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`: exact for what `encode` gave, where nothing was lost.

    Ids that no text gives vanish; bytes that are no UTF-8 become U+FFFD.
    """

  def measure(
    self, texts: list[str], ids: Iterable[np.ndarray]
  ) -> np.ndarray | None:
    """`token_bytes`, right for these texts and their ids; None if none are."""
    del texts, ids
    return self.token_bytes

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
    return bytes(i for i in ids if i < self.separator).decode(errors='replace')

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

  def prompt(self, text: str) -> list[int]:
    return _as_prompt(self._library, text)

  def decode(self, ids: Iterable[int]) -> str:
    known = (i for i in ids if i < len(self._bytes))
    return b''.join(self._bytes[i] for i in known).decode(errors='replace')

  def save(self, path: str | os.PathLike) -> None:
    content = self._library.to_str(pretty=True)
    pathlib.Path(path).write_text(content, encoding='utf-8')

  def fingerprint(self) -> bytes:
    return hashlib.sha256(self._library.to_str().encode()).digest()


class Saved(Tokenizer):
  """A tokenizer.json of the `tokenizers` library, whoever made it.

  The separator is the special token of that name, or by default the first of
  SEPARATORS that is one; SEPARATOR itself may be named where the file lacks
  it, and becomes one more id. Special tokens that a text spells are text, as
  far as the tokenizer can read them so. What a file says of truncation,
  padding and tokens around a text is left out.

  Raises:
    DataError: no separator is found, or ids would be drawn at random.
  """

  token_bytes = None

  def __init__(self, library: tokenizers.Tokenizer, name: str, separator: str):
    if getattr(library.model, 'dropout', None):
      raise DataError(
        f'{name} has a dropout of {library.model.dropout:g}: the same text'
        ' would get other ids each time'
      )
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    self._library = library
    self._name = name
    self.separator = _separator(library, name, separator)
    # Ids may have holes.
    self.vocab_size = 1 + max(library.get_vocab().values())
    self._specials = _specials(library)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """As for all; documents are read whole, since none may be cut for sure.

    Raises:
      DataError: the tokenizer fails, or reads a text's own words as the
        separator.
    """
    found = []
    for some in _batches(texts):
      try:
        encodings = self._library.encode_batch_fast(
          some, add_special_tokens=False
        )
      except Exception as error:  # the library raises bare exceptions
        raise DataError(f'{self._name} fails on a text: {error}') from error
      for encoding in encodings:
        ids = np.array(encoding.ids, np.int32)
        if self.separator in ids:
          token = self._library.id_to_token(self.separator)
          raise DataError(
            f'document {len(found) + 1} of {len(texts)} holds what {self._name}'
            f' reads as {token!r}, the separator; data.separator can be'
            f' {_listed(self._specials.keys() - {token}, SEPARATOR)}'
          )
        found.append(ids)
    return found

  def prompt(self, text: str) -> list[int]:
    return _as_prompt(self._library, text)

  def marks(self) -> list[int]:
    whole = self._library.encode('a', add_special_tokens=True)
    own = whole.special_tokens_mask
    return whole.ids[: own.index(0)] if 0 in own else []

  def decode(self, ids: Iterable[int]) -> str:
    """As the file has it, without separators; other special tokens show."""
    ids = [int(i) for i in ids if i != self.separator]
    return self._library.decode(ids, skip_special_tokens=False)

  def measure(
    self, texts: list[str], ids: Iterable[np.ndarray]
  ) -> np.ndarray | None:
    """int32 [V] if the ids spell these very texts, byte by byte, else None.

    Tried are the letters of byte-level tokenizers and those of SentencePiece.
    A space that stands before every text, as some tokenizers have it, counts
    as -1 byte of the separator: the sum is the size of the texts again.
    """
    ids = list(ids)
    for spelled in (self._spelled(_byte_level), self._spelled(_sentence_piece)):
      for before in (b'', b' '):
        if all(
          b''.join(spelled[i] for i in own.tolist()) == before + text.encode()
          for text, own in zip(texts, ids, strict=True)
        ):
          sizes = np.array([len(token) for token in spelled], np.int32)
          sizes[self.separator] = -len(before)
          return sizes
    logger.warning(
      'no bits per byte will be told: the ids of %s do not spell the held-out'
      ' text exactly', self._name,
    )  # fmt: skip
    return None

  def _spelled(self, spell: Callable[[str], bytes | None]) -> list[bytes]:
    """What each id would stand for; nothing where that cannot be said."""
    spelled = [b''] * self.vocab_size
    for token, index in self._library.get_vocab().items():
      spelled[index] = spell(token) or b''
    for index, token in self._library.get_added_tokens_decoder().items():
      if token.special and not _BYTE.fullmatch(token.content):
        spelled[index] = b''
      elif not token.special and spell is _byte_level:
        spelled[index] = token.content.encode()  # these it does not respell
    return spelled

  def save(self, path: str | os.PathLike) -> None:
    content = self._library.to_str(pretty=True)
    pathlib.Path(path).write_text(content, encoding='utf-8')

  def fingerprint(self) -> bytes:
    content = f'{self.separator} {self._library.to_str()}'
    return hashlib.sha256(content.encode()).digest()


def _separator(library: tokenizers.Tokenizer, name: str, separator: str) -> int:
  specials = _specials(library)
  for token in (separator,) if separator else SEPARATORS:
    if token in specials:
      return specials[token]
  if separator == SEPARATOR:
    library.add_special_tokens([separator])
    return library.token_to_id(separator)
  wanted = repr(separator) if separator else f'none of {", ".join(SEPARATORS)}'
  raise DataError(
    f'{name} has {"no special token " if separator else ""}{wanted};'
    f' data.separator can be {_listed(specials, SEPARATOR)}'
  )


def _as_prompt(library: tokenizers.Tokenizer, text: str) -> list[int]:
  library.encode_special_tokens = False
  try:
    return library.encode(text, add_special_tokens=True).ids
  finally:
    library.encode_special_tokens = True


def _specials(library: tokenizers.Tokenizer) -> dict[str, int]:
  return {
    token.content: index
    for index, token in library.get_added_tokens_decoder().items()
    if token.special
  }


def fixed(config: TextConfig) -> Tokenizer | None:
  """The tokenizer that `config` names, or None for a BPE that needs a corpus.

  Raises:
    DataError: a file is missing, holds no tokenizer or no separator, or has
      not `config.vocab_size` ids.
  """
  if config.tokenizer == 'bytes':
    return Bytes()
  if config.tokenizer == 'bpe':
    return None
  found = load(paths.text(config.tokenizer), config.separator)
  if found.vocab_size != config.vocab_size:
    raise DataError(
      f'data.vocab_size is {config.vocab_size}, but {config.tokenizer} has'
      f' {found.vocab_size} ids'
    )
  return found


def get(config: TextConfig, corpus: Corpus) -> Tokenizer:
  """The tokenizer that `config` names; a BPE is trained on `corpus.train`.

  Raises:
    DataError: as for `fixed`, or the text is too short to give a BPE of
      `config.vocab_size`.
  """
  return fixed(config) or cached_bpe(
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
  library = _untrained()
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


def _untrained() -> tokenizers.Tokenizer:
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PATTERN), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  library.decoder = decoders.ByteLevel()
  return library


def load(path: str | os.PathLike, separator: str = '') -> Tokenizer:
  """The tokenizer that `save` wrote, or any that the library can read.

  A run's is in its work directory; `separator` is its config's
  data.separator.

  Raises:
    DataError: the file is missing or holds no tokenizer, or none with that
      separator.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
    if json.loads(text).get('type') == 'bytes' and not separator:
      return Bytes()
    library = tokenizers.Tokenizer.from_str(text)
    if _made_here(library) and separator in ('', SEPARATOR):
      return BPE(library)
  except Exception as error:  # the library raises bare exceptions
    raise DataError(f'{path} holds no tokenizer: {error}') from error
  return Saved(library, str(path), separator)


def published(
  path: pathlib.Path, settings: Mapping[str, Any], family: str, ends: list[int]
) -> tuple[str, str]:
  """A published tokenizer.json as transformers 5 reads it, and its separator.

  Args:
    settings: of the tokenizer_config.json beside it.
    family: model_type of the model.
    ends: ids that end a text. The first that is a token is the separator, and
      becomes a special token if it was none.

  Returns:
    The text of a tokenizer.json, and a token in it, '' if no id is a token.

  Raises:
    DataError: the file holds no tokenizer.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
    kind = (settings.get('tokenizer_class') or '').removesuffix('Fast')
    # Mixtral's, and those whose letters are bytes, are taken as they are.
    own = family == 'mixtral' or 'ByteLevel' in json.dumps(
      [content['pre_tokenizer'], content['decoder']]
    )
    if (
      kind == 'LlamaTokenizer' and content['model']['type'] == 'BPE' and not own
    ):
      content = _as_llama(content, settings)
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # the library raises bare exceptions
    raise DataError(f'{path} holds no tokenizer: {error}') from error
  tokens = [library.id_to_token(i) for i in ends]
  separator = next((t for t in tokens if t is not None), '')
  if separator and separator not in _specials(library):
    library.add_special_tokens([separator])
  return library.to_str(pretty=True), separator


def _as_llama(content, settings):
  """As its class LlamaTokenizer has it: it reads a first space its own way."""
  before = settings.get('add_prefix_space')
  before = True if before is None else before
  scheme = 'always' if settings.get('legacy', False) else 'first'
  library = tokenizers.Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True))
  library.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme=scheme if before else 'never', split=False
  )
  steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback()]
  steps += [decoders.Fuse(), *([decoders.Strip(' ', 1, 0)] if before else [])]
  library.decoder = decoders.Sequence(steps)
  theirs = json.loads(library.to_str())
  model = {
    **theirs['model'],
    **{k: content['model'][k] for k in ('vocab', 'merges')},
  }
  taken = {k: theirs[k] for k in ('normalizer', 'pre_tokenizer', 'decoder')}
  return {**content, **taken, 'model': model}


def _made_here(library: tokenizers.Tokenizer) -> bool:
  """Whether it reads text as `train` has it, so that `_chunks` may cut it."""
  found, own = (json.loads(t.to_str()) for t in (library, _untrained()))
  same = ('normalizer', 'pre_tokenizer', 'truncation', 'padding')
  return (
    all(found[key] == own[key] for key in same)
    and found['model']['type'] == 'BPE'
    and not found['model']['dropout']
  )


def _listed(tokens: Iterable[str], new: str) -> str:
  """Names in one line; `new` is one that can be added."""
  tokens = sorted(tokens)
  more = f' and {len(tokens) - 16} more' if len(tokens) > 16 else ''
  names = ', '.join(map(repr, tokens[:16])) + more
  if new in tokens:
    return names
  return f'{names}{" or " if tokens else ""}{new!r}, which is added'


def _batches(texts: list[str]) -> Iterator[list[str]]:
  """The texts in their order, in groups that end when they have grown large."""
  some, size = [], 0
  for text in texts:
    some.append(text)
    size += len(text)
    if size >= CHUNK * CHUNKS_AT_ONCE:
      yield some
      some, size = [], 0
  if some:
    yield some


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
  spelled = []
  for index in range(library.get_vocab_size()):
    token = '' if index in specials else library.id_to_token(index)
    found = None if token is None else _byte_level(token)
    if found is None:
      raise ValueError(f'token {index} is {token!r}, not bytes')
    spelled.append(found)
  return spelled


def _byte_level(token: str) -> bytes | None:
  """What a token of byte-level BPE spells; None if it is none."""
  byte_of = _alphabet()
  if not set(token) <= byte_of.keys():
    return None
  return bytes(byte_of[letter] for letter in token)


_BYTE = re.compile('<0x([0-9A-F]{2})>')  # of SentencePiece's byte fallback


def _sentence_piece(token: str) -> bytes:
  """What a token of SentencePiece spells: U+2581 is a space, <0x0A> a byte."""
  byte = _BYTE.fullmatch(token)
  if byte:
    return bytes.fromhex(byte[1])
  return token.replace('\u2581', ' ').encode()


@functools.cache
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
