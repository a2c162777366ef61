"""Text: which documents to train on, and which to hold out."""

import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import pathlib
import platform
import re
import sysconfig
import zlib
from collections.abc import Hashable, Iterable
from typing import Annotated, Any, NamedTuple

from moe_jax import paths, ranges

logger = logging.getLogger(__name__)

SOURCES = ('python_stdlib', 'text')
ORDERS = ('shuffled', 'stream')
TOKENIZERS = ('bytes', 'bpe')  # that need no file
MIN_BPE_VOCAB = 257  # every byte, and the separator

# Tests and tools are no library code; the packages differ on every machine.
STDLIB_LEFT_OUT = {
  *('test', 'tests', 'idlelib', 'lib2to3'),
  *('site-packages', 'dist-packages', '__pycache__'),
}
STDLIB_EVAL_BYTES = 1_000_000

# What cannot be read, by the bytes that stand at a place of such a file.
OTHER_ARCHIVES = {
  'tar': (257, b'ustar\0'),
  'GNU tar': (257, b'ustar  \0'),
  'zip': (0, b'PK\x03\x04'),
  'bz2': (4, b'1AY&SY'),
  'zst': (0, b'\x28\xb5\x2f\xfd'),
  '7z': (0, b'7z\xbc\xaf\x27\x1c'),
}


class DataError(ValueError):
  """Data that cannot be used; the message is one line that says why."""


def in_range(config: Any) -> None:
  """DataError if a field of a source's config is not what it may be."""
  try:
    ranges.check(type(config), vars(config), 'data.')
  except ValueError as error:
    raise DataError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """What all text has, wherever it is read.

  Attributes:
    eval_fraction: the part that is held out where nothing else says what, of
      the distinct documents. Copies of what is held out are not trained on,
      whatever says it.
    tokenizer: 'bytes'; 'bpe', trained on the training text; or the path of a
      tokenizer.json of the `tokenizers` library, of any kind.
    separator: the special token of that file that stands between documents;
      '' takes the first of tokenizer.SEPARATORS that it has.
    vocab_size: ids of the 'bpe', or of the file, which must have as many;
      'bytes' has 257 whatever stands here.
    padded_size: ids of the model where they are more than the tokenizer's, as
      published models have them; 0: as many.
    cache_dir: where the 'bpe' and the tokens are kept; '' is the user's cache.
    eval_bytes: held-out text of a periodic evaluation; 0 is all.
    order: 'shuffled' rows, or a 'stream' that goes on from batch to batch.

  Raises:
    DataError: a value is unknown, out of range, or would not be read.
  """

  eval_fraction: ranges.Part = 0.1
  tokenizer: str = 'bpe'
  separator: str = ''
  vocab_size: ranges.Count = 4096
  padded_size: ranges.Natural = 0
  cache_dir: str = ''
  eval_bytes: ranges.Amount = 0
  order: Annotated[str, ranges.OneOf(ORDERS)] = 'shuffled'

  def __post_init__(self):
    in_range(self)
    file = self.tokenizer.endswith('.json')
    if self.tokenizer not in TOKENIZERS and not file:
      raise DataError(
        f'data.tokenizer is {self.tokenizer!r};'
        f' it can be {", ".join(TOKENIZERS)} or the path of a tokenizer.json'
      )
    if self.separator and not file:
      raise DataError(
        f'data.separator is {self.separator!r}, but data.tokenizer is'
        f' {self.tokenizer!r}, which has its own'
      )
    if self.tokenizer == 'bpe' and self.vocab_size < MIN_BPE_VOCAB:
      raise DataError(
        f'data.vocab_size is {self.vocab_size}; bpe needs at least'
        f' {MIN_BPE_VOCAB}: 256 bytes and the separator'
      )


@dataclasses.dataclass(frozen=True)
class DataConfig(TextConfig):
  """The text of the Python standard library, or of files.

  Attributes:
    source: 'python_stdlib' or 'text'.
    path: comma-separated globs of UTF-8 files, plain, .xz or .gz: .jsonl has a
      document a line, any other file is one. What exists as it is written is
      no glob.
    field: the key of a .jsonl line that holds its text; of several by commas
      the text is one after the other, a line end between them.
    eval_path: globs of the held-out files; '' holds out by `eval_fraction`.

  Raises:
    DataError: a value is unknown, out of range, or would not be read.
  """

  source: str = 'python_stdlib'
  path: str = ''
  field: str = ''
  eval_path: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.source not in SOURCES:
      raise DataError(
        f'data.source is {self.source!r}; it can be {" or ".join(SOURCES)}'
      )
    if self.source == 'text' and not self.path:
      raise DataError("data.path is empty; data.source 'text' needs a glob")
    if self.source != 'text':
      for name in ('path', 'field', 'eval_path'):
        if getattr(self, name):
          raise DataError(
            f'data.{name} is set, but data.source is {self.source!r};'
            " data.source='text' reads files"
          )


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents to train on and documents held out.

  `sha256` covers the name, order, split and content of every document, so it
  changes whenever a token could. Sizes are in UTF-8 bytes.
  """

  train: list[str] = dataclasses.field(repr=False)
  eval: list[str] = dataclasses.field(repr=False)
  sha256: str
  train_bytes: int
  eval_bytes: int
  description: str

  def eval_share(self, eval_bytes: int) -> float:
    """The part of the held-out text that `eval_bytes` is; 0 asks for all."""
    return min(1.0, eval_bytes / self.eval_bytes) if eval_bytes else 1.0


class Document(NamedTuple):
  name: str
  text: str
  size: int  # UTF-8 bytes


def load(config: DataConfig) -> Corpus:
  """Reads the corpus that `config` names. Documents without text are left out.

  Raises:
    DataError: a path or glob that matches nothing, a file that is broken, not
      UTF-8 or not JSON lines with the field, or nothing left in a split.
  """
  if config.source == 'python_stdlib':
    name = f'Python {platform.python_version()} standard library'
    return of(name, *_stdlib())
  files, eval_files = split_files(config.path, config.eval_path)
  documents = _read_all(files, config.field)
  if not eval_files:
    return divided(config.path, documents, config.eval_fraction)
  return of(config.path, documents, _read_all(eval_files, config.field))


def read(path: str, field: str, key: str) -> list[Document]:
  """All documents with text of files: globs as given, files sorted, lines.

  Args:
    path, field: as in DataConfig.
    key: what the user calls the path.

  Raises:
    DataError: as for `load`.
  """
  return _read_all([pathlib.Path(n) for n in _matches(path, key)], field)


def divided(name: str, documents: list[Document], fraction: float) -> Corpus:
  """The corpus that `hold_out` makes; of held-out copies one is read.

  Raises:
    DataError: as for `hold_out`.
  """
  train, held_out = hold_out(documents, fraction)
  new = firsts(content(document.text) for document in held_out)
  kept = list(itertools.compress(held_out, new))
  return of(name, train, kept, len(held_out) - len(kept))


def of(
  name: str,
  train: list[Document],
  held_out: list[Document],
  left_out: int = 0,
) -> Corpus:
  """The corpus of these documents, each with text.

  Copies of held-out documents are not trained on.

  Args:
    left_out: copies that were left out before.

  Raises:
    DataError: nothing is left in a split.
  """
  if not train:
    raise DataError(f'{name}: no text is left to train on')
  if not held_out:
    raise DataError(f'{name}: no text is held out')
  known = {content(document.text) for document in held_out}
  apart = [d for d in train if content(d.text) not in known]
  if not apart:
    raise DataError(
      f'{name}: no text is left to train on: all of it is held out, too'
    )
  said = copies_left_out(left_out + len(train) - len(apart), 'documents')
  corpus = Corpus(
    train=[document.text for document in apart],
    eval=[document.text for document in held_out],
    sha256=_digest(apart, held_out),
    train_bytes=_size(apart),
    eval_bytes=_size(held_out),
    description=f'{name}: {_amount(apart)} to train on{said},'
    f' {_amount(held_out)} held out',
  )
  logger.info('%s, sha256 %s', corpus.description, corpus.sha256[:12])
  return corpus


def copies_left_out(number: int, kind: str) -> str:
  """What a description says of held-out documents, images or the like."""
  copies = f'{number:,} cop{"y" if number == 1 else "ies"}'
  return f' ({copies} of held-out {kind} left out)' if number else ''


def _size(documents: list[Document]) -> int:
  return sum(document.size for document in documents)


def _amount(documents: list[Document]) -> str:
  plural = '' if len(documents) == 1 else 's'
  size = _size(documents)
  return f'{len(documents):,} document{plural} ({size:,} bytes)'


def _digest(train: list[Document], held_out: list[Document]) -> str:
  total = hashlib.sha256()
  for split, documents in (('train', train), ('eval', held_out)):
    for document in documents:
      # The header states the size, so no two corpora read the same.
      header = json.dumps([split, document.name, document.size])
      total.update(header.encode() + b'\n')
      total.update(document.text.encode())
  return total.hexdigest()


# --- the standard library ---------------------------------------------------


def _stdlib() -> tuple[list[Document], list[Document]]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  documents = []
  for path in _stdlib_files(root):
    text, size = _decode(path.read_bytes(), path)
    if size:
      documents.append(Document(path.relative_to(root).as_posix(), text, size))
  if _size(documents) <= 2 * STDLIB_EVAL_BYTES:
    raise DataError(
      f'{root} holds {_size(documents)} bytes of .py files, too few to train'
      f" on; use data.source='text'"
    )
  held_out, size = set(), 0
  for document in sorted(documents, key=lambda document: _sha(document.name)):
    if size >= STDLIB_EVAL_BYTES:
      break
    held_out.add(document.name)
    size += document.size
  return _divide(documents, [d.name in held_out for d in documents])


def _stdlib_files(root: pathlib.Path) -> list[pathlib.Path]:
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [s for s in subfolders if s not in STDLIB_LEFT_OUT]
    found += [pathlib.Path(folder, n) for n in names if n.endswith('.py')]
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _sha(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _divide(
  documents: list[Document], held_out: Iterable[bool]
) -> tuple[list[Document], list[Document]]:
  parts: tuple[list[Document], list[Document]] = ([], [])
  for document, held in zip(documents, held_out, strict=True):
    parts[held].append(document)
  return parts


# --- files ------------------------------------------------------------------


def split_files(
  path: str, eval_path: str
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """The files of data.path and those of data.eval_path, none where it is ''.

  Both are comma-separated globs; each file is named once, in sorted order.

  Raises:
    DataError: a glob matches no file, or none is left to train on.
  """
  files = _sorted(path, 'data.path')
  if not eval_path:
    return files, []
  eval_files = _sorted(eval_path, 'data.eval_path')
  # A file that both globs match is held out, or the evaluation would cheat.
  held = {file.resolve() for file in eval_files}
  train_files = [file for file in files if file.resolve() not in held]
  if len(train_files) < len(files):
    logger.info(
      '%d of %d files of data.path are held out by data.eval_path',
      len(files) - len(train_files), len(files),
    )  # fmt: skip
  if not train_files:
    raise DataError(
      f'data.eval_path {eval_path} holds out every file that data.path'
      f' {path} matches'
    )
  return train_files, eval_files


def _sorted(patterns: str, key: str) -> list[pathlib.Path]:
  return [pathlib.Path(name) for name in sorted(_matches(patterns, key))]


def _matches(patterns: str, key: str) -> list[str]:
  """The files of comma-separated globs, in the order of these, then sorted.

  Each is named once, whatever links and globs lead to it. What exists as it
  is written is no glob.

  Raises:
    DataError: a glob matches no file, or a link to none; it begins with `key`.
  """
  found = {}
  one = os.path.isfile(paths.text(patterns))  # with commas in its name
  for pattern in [patterns] if one else patterns.split(','):
    pattern = paths.text(pattern if one else pattern.strip())
    if os.path.isdir(pattern):
      raise DataError(
        f'{key} {pattern} is a directory; name its files, as in'
        f' {os.path.join(pattern, "*.txt")}'
      )
    names = sorted(glob.glob(_literal(pattern), recursive=True))
    for name in names:
      if not os.path.exists(name):
        raise DataError(f'{key} {name} is a link to a file that does not exist')
    files = [name for name in names if os.path.isfile(name)]
    if not files:
      raise DataError(f'{key} {pattern} matches no file')
    for name in files:
      found.setdefault(os.path.realpath(name), name)
  return list(found.values())


def _literal(pattern: str) -> str:
  """The glob, its first folders escaped as far as they exist as written."""
  there = ''
  for name in re.findall(r'[^/]*/+|[^/]+', pattern):
    if not os.path.lexists(there + name):
      break
    there += name
  return glob.escape(there) + pattern[len(there) :]


def _read_all(files: list[pathlib.Path], field: str) -> list[Document]:
  documents = []
  for path in files:
    raw, suffix = uncompressed(path)
    if suffix == '.jsonl':
      documents += _records(raw, path, field)
      continue
    if field:
      raise DataError(f'data.field is {field!r}, but {path} is no .jsonl file')
    text, size = _decode(raw, path)
    documents.append(Document(path.name, text, size))
  documents = [document for document in documents if document.size]
  if not documents:
    raise DataError(f'there is no text in {_listing(files)}')
  return documents


def _listing(files: list[pathlib.Path]) -> str:
  more = f' and {len(files) - 1} more files' if len(files) > 1 else ''
  return f'{files[0]}{more}'


def uncompressed(path: pathlib.Path) -> tuple[bytes, str]:
  """The bytes of a file, plain, .xz or .gz, and the suffix that is theirs.

  An archive is read whole: all its streams, with the padding between them that
  its format knows.

  Raises:
    DataError: the file cannot be read, is a broken archive, also where only
      its end is, or an archive of another form.
  """
  suffixes = path.suffixes
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise DataError(f'cannot read {path}: {error.strerror}') from error
  if suffixes[-1:] in (['.xz'], ['.gz']):
    decompress = _unpack_xz if path.suffix == '.xz' else gzip.decompress
    suffixes = suffixes[:-1]
    try:
      if not raw:
        raise EOFError('it is empty')
      raw = decompress(raw)
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as error:
      raise DataError(f'{path} is broken: {error}') from error
  # Some are valid UTF-8, and would be read as text with marks in between.
  for form, (place, mark) in OTHER_ARCHIVES.items():
    if raw.startswith(mark, place):
      raise DataError(
        f'{path} is a {form} archive; what is read is plain, .xz or .gz'
      )
  return raw, ''.join(suffixes[-1:])


def _unpack_xz(raw: bytes) -> bytes:
  """All streams; lzma.decompress stops at what is none, without a word."""
  parts = []
  while True:
    stream = lzma.LZMADecompressor()
    parts.append(stream.decompress(raw))
    if not stream.eof:
      raise EOFError('it ends within a stream')
    rest = stream.unused_data
    raw = rest.lstrip(b'\0')
    if (len(rest) - len(raw)) % 4:  # padding is of four bytes
      raise lzma.LZMAError('there is more behind a stream, which is none')
    if not raw:
      return b''.join(parts)


def _decode(raw: bytes, path: pathlib.Path) -> tuple[str, int]:
  try:
    return raw.decode(), len(raw)
  except UnicodeDecodeError as error:
    raise DataError(_undecodable(path, raw, error.start)) from error


def _undecodable(path: pathlib.Path, raw: bytes, offset: int) -> str:
  packed = path.suffix in ('.xz', '.gz')
  place = ' of the uncompressed file' if packed else ''
  return (
    f'{path} is not UTF-8: byte 0x{raw[offset]:02x} at offset {offset}{place}'
  )


def _records(raw: bytes, path: pathlib.Path, field: str) -> list[Document]:
  """One document for each line that is not blank."""
  documents = []
  text, _ = _decode(raw, path)
  # Not splitlines: JSON strings may hold the other line ends of Unicode.
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    where = f'{path} line {number}'
    try:
      record = json.loads(line)
    except ValueError as error:
      raise DataError(f'{where} is not JSON: {error}') from error
    except RecursionError as error:
      raise DataError(f'{where} is not usable JSON: too deep') from error
    value = '\n'.join(_field(record, f, where) for f in field.split(','))
    try:
      size = len(value.encode())
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text
      raise DataError(
        f'{where}: field {field!r} holds half a surrogate pair'
        f' at character {error.start}'
      ) from error
    documents.append(Document(f'{path.name}:{number}', value, size))
  return documents


def _field(record: object, field: str, where: str) -> str:
  if not isinstance(record, dict):
    raise DataError(
      f'{where} is a JSON {type(record).__name__}, not an object with fields'
    )
  present = ', '.join(repr(name) for name in record) or 'none'
  if not field:
    raise DataError(
      f'data.field is empty; name the text field of {where}; it has {present}'
    )
  if field not in record:
    raise DataError(f'{where} has no field {field!r}; it has {present}')
  if not isinstance(record[field], str):
    raise DataError(
      f'{where}: field {field!r} is {type(record[field]).__name__},'
      ' not a string'
    )
  return record[field]


# --- holding out a fraction -------------------------------------------------


def content(text: str) -> str:
  """What copies of a text have alike: all but line ends and space around."""
  text = text.removeprefix('\ufeff').replace('\r\n', '\n').strip()
  return hashlib.sha256(text.encode()).hexdigest()


def firsts(keys: Iterable[Hashable]) -> list[bool]:
  """Whether each is none of those before it."""
  seen = set()
  return [not (key in seen or seen.add(key)) for key in keys]


def hold_out(
  documents: list[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
  """(the rest, what is held out): documents by hash, or the end of one.

  Distinct documents are taken in the order of their content's hash, each that
  still fits in the fraction of the distinct text; its copies go with it. Where
  they are so few or so large that this reaches less than half of it, the last
  lines of the largest document serve instead, of each of its copies; where
  that is a single line, a whole document, if it is the lesser part of all.

  Raises:
    DataError: there is no such document either.
  """
  groups = _copies(documents)
  size_of = {key: documents[group[0]].size for key, group in groups.items()}
  target = fraction * sum(size_of.values())
  hashes = {
    key: min(_sha(documents[i].text) for i in group)
    for key, group in groups.items()
  }
  order = sorted(groups, key=hashes.get)
  held, size = [], 0
  for key in order:
    if size + size_of[key] <= target:
      held.append(key)
      size += size_of[key]
  if size < target / 2:
    largest = max(groups, key=size_of.get)
    cut = _cut(documents[groups[largest][0]], target)
    if cut:
      return _cut_all(documents, groups[largest], *cut)
    held = [_smallest(order, size_of, target, documents[groups[largest][0]])]
  chosen = {i for key in held for i in groups[key]}
  return _divide(documents, [i in chosen for i in range(len(documents))])


def _copies(documents: list[Document]) -> dict[str, list[int]]:
  """The places of each content, in the order in which they are first met."""
  groups = {}
  for index, document in enumerate(documents):
    groups.setdefault(content(document.text), []).append(index)
  return groups


def _cut_all(
  documents: list[Document], copies: list[int], head: str, tail: str
) -> tuple[list[Document], list[Document]]:
  """The copies become the head in the one part and the tail in the other."""
  rest, held = list(documents), []
  for index in copies:
    name = documents[index].name
    rest[index] = Document(name, head, len(head.encode()))
    held.append(Document(name, tail, len(tail.encode())))
  return rest, held


def _smallest(
  order: list[str], size_of: dict[str, int], target: float, largest: Document
) -> str:
  """The least of at least half the target, the first of those in the order."""
  total = sum(size_of.values())
  fit = [key for key in order if target <= 2 * size_of[key] < total]
  if not fit:
    raise DataError(
      f'{largest.name} is a single line, of which no part can be held out;'
      ' name what to hold out (data.eval_path, data.eval_split)'
    )
  return min(fit, key=size_of.get)


def _cut(document: Document, tail_size: float) -> tuple[str, str] | None:
  """Cuts at the line end nearest to `tail_size` bytes before the end.

  None if the document is a single line.
  """
  raw = document.text.encode()
  place = min(max(1, round(len(raw) - tail_size)), len(raw) - 1)
  # The last byte's line end would leave an empty tail.
  cuts = [raw.rfind(b'\n', 0, place) + 1, raw.find(b'\n', place, -1) + 1]
  cuts = [cut for cut in cuts if cut > 0]
  if not cuts:
    return None
  cut = min(cuts, key=lambda c: abs(c - place))
  return raw[:cut].decode(), raw[cut:].decode()
