"""The data sets of the studies: what each is, who has it, what was read.

They are no part of this repository. A study looks for them in folders of these
names under --data; README.md says how their files were made.
"""

import functools
import hashlib
import itertools
import lzma
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from moe_jax.data import cache
from moe_jax.report import metrics

LANGUAGES = ('de', 'es', 'fr', 'it', 'nl', 'vi')


class Source(NamedTuple):
  """A folder of files.

  Attributes:
    about: what it is, its size and licence, and how anyone gets it.
    files: which the studies read.
    digest: of the files that the results in this repository are of.
  """

  about: str
  files: tuple[str, ...]
  digest: str


SOURCES = {
  'eltec-eng': Source(
    'ELTeC-eng, English novels of 1840-1920, 58 MB: level1 of'
    ' github.com/COST-ELTeC/ELTeC-eng (DOI 10.5281/zenodo.3533868), as plain'
    ' text, a paragraph a line, split by novels; texts in the public domain,'
    ' markup CC BY 4.0',
    ('train.txt.xz', 'valid.txt.xz'),
    '963fc7e2500e5ad9',
  ),
  'gsm8k': Source(
    'GSM8K, grade-school mathematics in words, 5 MB, MIT:'
    ' github.com/openai/grade-school-math, or openai/gsm8k on Hugging Face',
    ('train.jsonl', 'test.jsonl'),
    '7b5069add2f61183',
  ),
  'lohelp-mt': Source(
    "LibreOffice 7.4's help, aligned with its translations, 6 MB, MPL-2.0:"
    ' the Debian packages libreoffice-help-*, paired by page and paragraph,'
    ' lines of source<TAB>target',
    tuple(
      f'{split}.en-{language}.tsv.xz'
      for split in ('train', 'valid')
      for language in LANGUAGES
    ),
    '9ac529809b2032e7',
  ),
  'mnist': Source(
    'MNIST, 10,000 of the training and all 10,000 test images, 3 MB,'
    ' CC BY-SA 3.0: x_train, y_train, x_test, y_test (uint8) in one .npz; the'
    ' whole set is mnist_784 on OpenML and ylecun/mnist on Hugging Face',
    ('mnist_10k_train_10k_test.npz',),
    'a2ec21ffd665635c',
  ),
  'wikitext2-eval': Source(
    'the validation text of WikiText-2, 1 MB, CC BY-SA 3.0: Salesforce/wikitext'
    ' (wikitext-2-v1) on Hugging Face',
    ('valid.txt',),
    'afddc496b3a78f93',
  ),
}


def digests(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """{data set: a digest of its files}; what a row of results was made of.

  Raises:
    ValueError: files are missing; one line that names them and who has them.
  """
  found, missing = {}, []
  for name in names:
    source = SOURCES[name]
    lacks = [f for f in source.files if not (folder / name / f).is_file()]
    if lacks:
      missing.append(
        f'{folder / name} lacks {", ".join(lacks)}: {source.about}'
      )
      continue
    whole = hashlib.sha256()
    for file in source.files:
      with (folder / name / file).open('rb') as stream:
        whole.update(hashlib.file_digest(stream, 'sha256').digest())
    found[name] = whole.hexdigest()[:16]
  if missing:
    raise ValueError('; '.join(missing))
  return found


def others(found: dict[str, str]) -> list[str]:
  """Those of `digests` that are of other files than the results here."""
  return [
    name for name, digest in found.items() if digest != SOURCES[name].digest
  ]


@functools.cache  # all arms of a study ask for the same
def head(path: pathlib.Path, lines: int) -> pathlib.Path:
  """The first lines of a text, as a file of its own in the cache.

  What a run evaluates on should not take longer than what it trains on.
  """
  opened = lzma.open if path.suffix == '.xz' else open
  suffix = [s for s in path.suffixes if s != '.xz'][-1]
  with opened(path, 'rt', encoding='utf-8') as file:
    text = ''.join(itertools.islice(file, lines))
  name = f'head-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}'
  place = cache.directory() / name
  if not place.exists():
    place.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace(str(place), text)
  return place
