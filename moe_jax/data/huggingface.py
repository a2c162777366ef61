"""Text of the Hugging Face Hub, or of what its `datasets` library reads."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from moe_jax import paths, ranges
from moe_jax.data import corpus
from moe_jax.data.corpus import Corpus, DataError, Document

ROWS_AT_ONCE = 1000
SAVED = ('dataset_dict.json', 'state.json')  # what save_to_disk leaves


@dataclasses.dataclass(frozen=True)
class HubConfig(corpus.TextConfig):
  """Which data set to read, and which of its columns is the text.

  A row is a document; one that is empty or null is left out. No code of a data
  set is run: the library can run none since its version 4. The text that is
  read has to fit in memory, streamed or not.

  Attributes:
    source: 'huggingface'.
    path: a name on the Hub, 'owner/name'; a folder of .parquet, .jsonl or other
      files that the library's load_dataset knows; or one that save_to_disk
      wrote, of a data set or of a dict of them.
    subset: the configuration, where a data set has several.
    split: what to train on. A single data set saved to disk has one split,
      'train' where it has no other name.
    eval_split: what to hold out; '' holds out `eval_fraction` of `split`.
    field: the column of strings, or several by commas, as in corpus.py.
    revision: branch, tag or commit on the Hub; '' is the newest.
    streaming: read rows as they come, with no download or copy of the rest.
    documents: read so many rows of `split`, the first ones; 0 is all.
    eval_documents: the same of `eval_split`.

  Raises:
    DataError: a value is out of range or would not be read.
  """

  source: str = 'huggingface'
  path: str = ''
  subset: str = ''
  split: str = 'train'
  eval_split: str = ''
  field: str = 'text'
  revision: str = ''
  streaming: bool = False
  documents: ranges.Amount = 0
  eval_documents: ranges.Amount = 0

  def __post_init__(self):
    super().__post_init__()
    if self.source != 'huggingface':
      raise DataError(f'data.source is {self.source!r}; it can be huggingface')
    for name in ('path', 'split', 'field'):
      if not getattr(self, name):
        raise DataError(f"data.{name} is empty; 'huggingface' needs it")
    if self.split == self.eval_split:
      raise DataError(f'data.split and data.eval_split are both {self.split!r}')
    if self.eval_documents and not self.eval_split:
      raise DataError(
        f'data.eval_documents is {self.eval_documents}, but data.eval_split'
        ' is empty'
      )


def load(config: HubConfig) -> Corpus:
  """Reads the corpus that `config` names.

  Raises:
    DataError: the library is not installed; it does not find or cannot read
      what is asked for; there is no such column of strings; or nothing is left
      in a split.
  """
  name = ' '.join((config.path, config.subset)).strip()
  documents = _documents(config, config.split, config.documents)
  if not config.eval_split:
    return corpus.divided(name, documents, config.eval_fraction)
  held_out = _documents(config, config.eval_split, config.eval_documents)
  return corpus.of(name, documents, held_out)


def _documents(config: HubConfig, split: str, limit: int) -> list[Document]:
  documents = []
  try:
    for index, text in enumerate(_texts(_open(config, split), config, limit)):
      if text:
        name = f'{split}:{index}'
        documents.append(Document(name, text, len(text.encode())))
  except DataError:
    raise
  except Exception as error:  # of the library, the network, any file format
    raise DataError(f'{_where(config, split)}: {_line(error)}') from error
  if not documents:
    raise DataError(f'there is no text in {_where(config, split)}')
  return documents


def _open(config: HubConfig, split: str) -> Any:
  """The library's data set, mapped from disk or streamed."""
  try:
    import datasets  # takes a second, and few runs need it
  except ImportError as error:
    raise DataError(
      f"data.source='huggingface' needs datasets: pip install -e '.[hf]'"
      f' ({error})'
    ) from error
  path = paths.text(config.path)
  if config.revision and os.path.exists(path):
    raise DataError(
      f'data.revision is {config.revision!r}, but {path} is on this disk'
    )
  if not any(os.path.isfile(os.path.join(path, name)) for name in SAVED):
    return datasets.load_dataset(
      path,
      config.subset or None,
      split=split,
      revision=config.revision or None,
      streaming=config.streaming,
    )
  if config.subset:
    raise DataError(
      f'data.subset is {config.subset!r}, but {path} was saved to disk, where'
      ' there are none'
    )
  found = datasets.load_from_disk(path)  # mapped, so as good as streamed
  if isinstance(found, datasets.Dataset):
    found = {str(found.split or 'train'): found}
  if split not in found:
    raise DataError(
      f'{path} has no split {split!r}; it has {", ".join(map(repr, found))}'
    )
  return found[split]


def _texts(found: Any, config: HubConfig, limit: int) -> Iterator[str | None]:
  """The column, row by row.

  Raises:
    DataError: there is no such column, or it holds something else.
  """
  if found.column_names is None:  # streamed from files without a schema
    columns = {name: '' for name in next(iter(found), {})}
  else:
    columns = found.features or dict.fromkeys(found.column_names, '')
  fields = config.field.split(',')
  for field in fields:
    if field not in columns:
      raise DataError(
        f'{config.path} has no column {field!r} for data.field; it has'
        f' {_listed(columns)}'
      )
  found = found.select_columns(fields)
  if limit:
    found = found.take(min(limit, getattr(found, 'num_rows', limit)))
  for rows in found.iter(ROWS_AT_ONCE):
    for values in zip(*(rows[field] for field in fields), strict=True):
      for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str | None):
          raise DataError(
            f'{config.path}: column {field!r} of data.field holds'
            f' {type(value).__name__}, not strings; there are'
            f' {_listed(columns)}'
          )
      yield None if None in values else '\n'.join(values)


def _listed(columns: dict[str, Any]) -> str:
  kinds = {k: getattr(v, 'dtype', type(v).__name__) for k, v in columns.items()}
  return ', '.join(
    f'{name!r} ({kind})' if columns[name] else repr(name)
    for name, kind in kinds.items()
  )


def _where(config: HubConfig, split: str) -> str:
  return ' '.join(filter(None, (config.path, config.subset, split)))


def _line(error: BaseException) -> str:
  """An error and what caused it, in one line."""
  said = ' '.join(str(error).split()) or type(error).__name__
  return f'{said}: {_line(error.__cause__)}' if error.__cause__ else said
