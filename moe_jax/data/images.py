"""Labelled images: which to train on, which to hold out, and their batches.

A batch is a dict of arrays, B rows of one image each; L = 1, as an image has
one target:

  image_BxYxXxC  float32  pixels less the training images' mean, over their
                          deviation: one of each per channel
  target_BxL     int32    the class
  mask_BxL       float32  1 where the row counts, 0 on padding
  segment_BxL    int32    0, or -1 on padding
  row_B          int32    row number in the global batch

Processes share a global batch by `row_B`, as in data.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import grain
import numpy as np

from moe_jax import exact, ranges
from moe_jax.data import corpus
from moe_jax.data.batches import Batch, Batches, evenly_spaced, of_batch, READ
from moe_jax.data.corpus import DataError, in_range

logger = logging.getLogger(__name__)

SOURCES = ('digits', 'images')
CHANNELS = ('auto', 'last', 'first')
MOST_CHANNELS = 4  # of a picture; a side has more pixels

# What numpy, zipfile and zlib say of a file that is broken or packed in a way
# they do not know.
UNREADABLE = (
  *(OSError, ValueError, EOFError, RuntimeError),
  *(zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
  """What to read, and what to hold out.

  'digits' are scikit-learn's: 1797 images of 8x8, nothing is downloaded.
  'images' are .npz files by globs and commas: arrays [n, Y, X] or [n, Y, X, C]
  of uint8 or floats, and integer labels [n]. A key is a list by commas, of
  which a file's first counts. Arrays [n, C, Y, X] are turned.

  Held out is the first of these that there is: the files of `eval_path`, the
  arrays under the eval keys, an `eval_fraction` of the distinct images by the
  hash of the pixels. Copies of held-out images are not trained on.

  Attributes:
    channels: the axis of an image that has them, 'last' or 'first'; 'auto'
      tells by the shape, see `_channels`.

  Raises:
    DataError: a value is unknown, out of range, or would not be read.
  """

  source: str = 'digits'
  path: str = ''
  images_key: str = 'images,x_train'
  labels_key: str = 'labels,y_train'
  channels: Annotated[str, ranges.OneOf(CHANNELS)] = 'auto'
  eval_path: str = ''
  eval_images_key: str = 'x_test'
  eval_labels_key: str = 'y_test'
  eval_fraction: ranges.Part = 0.1
  eval_images: ranges.Natural = 0  # of a periodic evaluation; 0 is all
  # Pixels by which training images move at the most; 0 fills in.
  shift: ranges.Natural = 0

  def __post_init__(self):
    in_range(self)
    if self.source not in SOURCES:
      raise DataError(
        f'data.source is {self.source!r}; it can be {" or ".join(SOURCES)}'
      )
    if self.source == 'images' and not self.path:
      raise DataError("data.path is empty; data.source 'images' needs a glob")
    if self.source == 'digits':
      for name, unset in (
        ('path', ''),
        ('channels', 'auto'),
        ('eval_path', ''),
      ):
        if getattr(self, name) != unset:
          raise DataError(
            f"data.{name} is set, but data.source is 'digits';"
            " data.source='images' reads files"
          )


class Split(NamedTuple):
  """n images as they were read, uint8 or float32, and their classes."""

  image_nxYxXxC: np.ndarray
  label_n: np.ndarray  # int32


class Images:
  """The images of a config, ready to be read in batches.

  `sizes` is what a model must know: 'V', the number of classes, and 'size',
  (Y, X, C). `sha256` covers every pixel and label of both splits.
  `eval_share` is the part of the held-out images that a periodic evaluation
  reads.
  """

  length = 1
  token_bytes = None
  streams = False

  def __init__(
    self,
    config: ImagesConfig,
    name: str,
    train: Split,
    held: Split,
    left_out: int,
  ):
    self._train, self._held, self._shift = train, held, config.shift
    self.mean_C, self.deviation_C = _moments(train.image_nxYxXxC)
    size = train.image_nxYxXxC.shape[1:]
    classes = int(train.label_n.max()) + 1
    have, kept = len(train.label_n), len(held.label_n)
    self.sizes = {'V': classes, 'size': size}
    self.sha256 = _digest(train, held)
    self.eval_share = min(1.0, (config.eval_images or kept) / kept)
    self.description = (
      f'{name}: {have:,} images of {_by(size)} to train on'
      f'{corpus.copies_left_out(left_out, "images")}, {kept:,} held out,'
      f' {classes} classes'
    )

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    row_B: np.ndarray | None = None,
  ) -> grain.DatasetIterator:
    """Endless batches of `row_B`, by default all, of `batch_size` images.

    Each epoch shows every image once, in a new order, and moves each anew.
    `get_state()` and `set_state` are those of data.train_iterator: the same
    for every `row_B`, and exact with another.

    Raises:
      DataError: there are too few images for one batch, or `row_B` are not
        distinct rows of it.
    """
    row_B = of_batch(batch_size, row_B)
    n = len(self._train.label_n)
    if n < batch_size:
      raise DataError(
        f'the training images are too few for one batch: it takes {batch_size},'
        f' there are {n}'
      )
    shuffle_seed, shift_seed = np.random.SeedSequence(seed).generate_state(2)

    @functools.lru_cache(maxsize=4)
    def shifts(epoch: int) -> np.ndarray:
      rng = np.random.default_rng([shift_seed, epoch])
      return rng.integers(-self._shift, self._shift, (n, 2), endpoint=True)

    def batch(places: list[tuple[int, int]]) -> Batch:
      local = [places[row] for row in row_B]
      image_B = np.array([image for _, image in local])
      pixels = self._train.image_nxYxXxC[image_B]
      if self._shift:
        moves = [shifts(epoch)[image] for epoch, image in local]
        pixels = _moved(pixels, np.array(moves))
      label_B = self._train.label_n[image_B]
      return self._batch(pixels, label_B, np.ones(len(row_B)), row_B)

    return iter(
      grain.MapDataset.range(n)
      .shuffle(seed=int(shuffle_seed))  # anew each epoch
      .repeat()
      .map_with_index(lambda index, image: (index // n, image))
      .batch(batch_size, drop_remainder=True, batch_fn=batch)
      .to_iter_dataset(READ)
    )

  def eval_batches(
    self,
    batch_size: int,
    share: float = 1.0,
    row_B: np.ndarray | None = None,
  ) -> Batches:
    """Batches that hold every held-out image once, padded at the end.

    A `share` below 1 reads about that part of the images, in full batches,
    spread evenly. Of each batch the rows `row_B` are read, by default all.

    Raises:
      DataError: `row_B` are not distinct rows of a batch.
    """
    row_B = of_batch(batch_size, row_B)
    n = len(self._held.label_n)

    def batch(image_B: np.ndarray) -> Batch:
      """Padding, -1, shows the last image, with mask 0."""
      pixels = self._held.image_nxYxXxC[image_B]
      label_B = self._held.label_n[image_B]
      return self._batch(pixels, label_B, image_B >= 0, row_B)

    chosen = evenly_spaced(n, exact.nearest(share, n), batch_size)
    return Batches(batch, chosen, batch_size, row_B)

  def save(self, workdir: str | os.PathLike) -> None:
    """Writes images.json: what prediction must know about the training data."""
    content = {
      'classes': self.sizes['V'],
      'size': list(self.sizes['size']),
      'mean': self.mean_C.tolist(),
      'deviation': self.deviation_C.tolist(),
    }
    path = pathlib.Path(workdir) / 'images.json'
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')

  def _batch(self, pixels_BxYxXxC, label_B, counts_B, row_B) -> Batch:
    mean_C, deviation_C = (
      x.astype(np.float32) for x in (self.mean_C, self.deviation_C)
    )
    return {
      'image_BxYxXxC': (pixels_BxYxXxC - mean_C) / deviation_C,
      'target_BxL': label_B[:, None],
      'mask_BxL': counts_B[:, None].astype(np.float32),
      'segment_BxL': counts_B[:, None].astype(np.int32) - 1,
      'row_B': row_B.astype(np.int32),
    }


def _moments(image_nxYxXxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """float64 [C]: mean and deviation; 1 for a channel that never varies."""
  mean_C = image_nxYxXxC.mean(axis=(0, 1, 2), dtype=np.float64)
  square_C = np.zeros_like(mean_C)
  for start in range(0, len(image_nxYxXxC), 1024):  # few in float64 at a time
    part = image_nxYxXxC[start : start + 1024] - mean_C
    square_C += np.square(part).sum(axis=(0, 1, 2))
  deviation_C = np.sqrt(square_C * len(mean_C) / image_nxYxXxC.size)
  return mean_C, np.where(deviation_C > 0, deviation_C, 1.0)


def _moved(pixels_BxYxXxC: np.ndarray, by_Bx2: np.ndarray) -> np.ndarray:
  """Each image moved down and right by its (y, x); raw 0 comes in."""
  rows, height, width, _ = pixels_BxYxXxC.shape
  y_BxY = np.arange(height) - by_Bx2[:, :1]
  x_BxX = np.arange(width) - by_Bx2[:, 1:]
  moved = pixels_BxYxXxC[
    np.arange(rows)[:, None, None],
    np.clip(y_BxY, 0, height - 1)[:, :, None],
    np.clip(x_BxX, 0, width - 1)[:, None, :],
  ]
  inside_BxY = (y_BxY >= 0) & (y_BxY < height)
  inside_BxX = (x_BxX >= 0) & (x_BxX < width)
  inside_BxYxX = inside_BxY[:, :, None] & inside_BxX[:, None, :]
  return np.where(inside_BxYxX[..., None], moved, np.zeros_like(moved))


def _digest(train: Split, held: Split) -> str:
  total = hashlib.sha256()
  for split in (train, held):
    for array in split:
      # The header states the size, so no two data sets read the same.
      total.update(json.dumps([array.dtype.str, array.shape]).encode() + b'\n')
      total.update(np.ascontiguousarray(array))
  return total.hexdigest()


# --- reading ----------------------------------------------------------------


def load(config: ImagesConfig) -> Images:
  """Reads the images that `config` names.

  Raises:
    DataError: a file, key or package that is missing, a file that is broken or
      holds Python objects, arrays of another rank, size or type than they
      should have, pixels that are no numbers, classes without a training
      image, or nothing left in a split.
  """
  if config.source == 'digits':
    name = "scikit-learn's digits"
    train, held, left_out = _hold_out(_digits(), config.eval_fraction, name)
  else:
    name = config.path
    train, held, left_out = _files(config)
  _check_classes(train, held, name)
  smallest = min(train.image_nxYxXxC.shape[1:3])
  if config.shift >= smallest:
    raise DataError(
      f'data.shift is {config.shift}; the images have {smallest} pixels'
    )
  images = Images(config, name, train, held, left_out)
  logger.info('%s, sha256 %s', images.description, images.sha256[:12])
  return images


def _digits() -> Split:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise DataError(
      "data.source 'digits' needs scikit-learn: pip install -e '.[vision]'"
    ) from error
  digits = datasets.load_digits()
  return _split(digits.images, digits.target, 'last', "scikit-learn's digits")


def _files(config: ImagesConfig) -> tuple[Split, Split, int]:
  files, eval_files = corpus.split_files(config.path, config.eval_path)
  keys = config.images_key, config.labels_key
  eval_keys = config.eval_images_key, config.eval_labels_key
  if eval_files:  # their arrays may have either name
    eval_keys = [','.join(pair) for pair in zip(eval_keys, keys, strict=True)]
  else:
    eval_files = [file for file in files if _has(file, config.eval_images_key)]
  train = _read_all(files, *keys, config.channels)
  if not eval_files:
    return _hold_out(train, config.eval_fraction, config.path)
  held = _read_all(eval_files, *eval_keys, config.channels)
  _check_alike(train, config.path, held, config.eval_path or 'the held-out')
  known = set(_hashes(held))
  apart_n = np.array([digest not in known for digest in _hashes(train)])
  if not apart_n.any():
    raise DataError(
      f'{config.path}: no image is left to train on: all are held out, too'
    )
  left_out = int(np.count_nonzero(~apart_n))
  return (_chosen(train, apart_n) if left_out else train), held, left_out


def _read_all(
  files: list[pathlib.Path], images_key: str, labels_key: str, channels: str
) -> Split:
  splits = [_read(file, images_key, labels_key, channels) for file in files]
  for file, split in zip(files, splits, strict=True):
    _check_alike(splits[0], str(files[0]), split, str(file))
  return Split(
    *(np.concatenate(arrays) for arrays in zip(*splits, strict=True))
  )


def _read(
  path: pathlib.Path, images_key: str, labels_key: str, channels: str
) -> Split:
  with _open(path) as arrays:
    images = _array(arrays, path, images_key)
    labels = _array(arrays, path, labels_key)
  return _split(images, labels, channels, str(path))


def _has(path: pathlib.Path, key: str) -> bool:
  with _open(path) as arrays:
    return _first(arrays, key) is not None


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[np.lib.npyio.NpzFile]:
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, 'rb'))  # numpy would not close it
      arrays = np.load(file, allow_pickle=False)
    except UNREADABLE as error:
      raise DataError(f'cannot read {path}: {_line(error)}') from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
      raise DataError(f'{path} is one array, not an .npz file of several')
    stack.enter_context(arrays)
    _check_one(arrays, path)
    yield arrays


def _check_one(arrays: np.lib.npyio.NpzFile, path: pathlib.Path) -> None:
  """Refuses what would be read in part: joined archives, a name met twice."""
  members = arrays.zip.infolist()
  first = min((member.header_offset for member in members), default=0)
  if first:
    raise DataError(
      f'cannot read {path}: {first} bytes stand before its archive;'
      ' files are not joined by cat, but by a glob'
    )
  end = arrays.zip.fp
  end.seek(-len(arrays.zip.comment) - 22, os.SEEK_END)
  if end.read(4) != b'PK\5\6':
    raise DataError(f'cannot read {path}: bytes stand behind its archive')
  if len({member.filename for member in members}) < len(members):
    raise DataError(f'cannot read {path}: it holds arrays of the same name')


def _first(arrays: np.lib.npyio.NpzFile, key: str) -> str | None:
  names = [name.strip() for name in key.split(',')]
  return next((name for name in names if name in arrays.files), None)


def _array(
  arrays: np.lib.npyio.NpzFile, path: pathlib.Path, key: str
) -> np.ndarray:
  name = _first(arrays, key)
  if name is None:
    present = ', '.join(map(repr, arrays.files)) or 'nothing'
    raise DataError(
      f'{path} holds no array {key.replace(",", " or ")}; it holds {present}'
    )
  try:
    return np.asarray(arrays[name])
  except UNREADABLE as error:
    raise DataError(
      f'cannot read {name!r} of {path}: {_line(error)}'
    ) from error


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())


def _split(
  images: np.ndarray, labels: np.ndarray, channels: str, where: str
) -> Split:
  """Checked arrays: uint8 or float32 with a channel axis, int32 labels."""
  if images.ndim not in (3, 4) or not images.size:
    raise DataError(
      f'{where}: images have shape {_by(images.shape)};'
      ' they need [n, Y, X] or [n, Y, X, C]'
    )
  if images.dtype != np.uint8 and images.dtype.kind != 'f':
    raise DataError(
      f'{where}: images are {images.dtype}; they can be uint8 or floats'
    )
  if labels.dtype.kind not in 'iu' or labels.ndim != 1:
    raise DataError(
      f'{where}: labels are {labels.dtype} of shape {_by(labels.shape)};'
      ' they must be integers, one for each image'
    )
  if len(images) != len(labels):
    raise DataError(
      f'{where}: there are {len(images)} images but {len(labels)} labels'
    )
  if images.dtype != np.uint8:
    with np.errstate(over='ignore'):
      images = images.astype(np.float32)
    if not np.isfinite(images).all():
      raise DataError(f'{where}: a pixel is NaN, infinite or beyond float32')
  # A label that is no number of a class must not wrap around to one that is.
  if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
    raise DataError(
      f'{where}: labels run from {labels.min()} to {labels.max()};'
      ' classes count from 0'
    )
  if images.ndim == 3:
    return Split(images[..., None], labels.astype(np.int32))
  if channels == 'auto':
    channels = _channels(images.shape, where)
  if channels == 'first':
    images = np.ascontiguousarray(np.moveaxis(images, 1, -1))
  return Split(images, labels.astype(np.int32))


def _channels(shape: tuple[int, ...], where: str) -> str:
  """Where the channels are: the axis of at most four, or beside a square.

  Raises:
    DataError: neither tells.
  """
  _, a, b, c = shape
  few = a <= MOST_CHANNELS, c <= MOST_CHANNELS
  if few[0] != few[1]:
    return 'first' if few[0] else 'last'
  if (a == b) != (b == c):
    return 'first' if b == c else 'last'
  raise DataError(
    f'{where}: images have shape {_by(shape)}, which does not tell where the'
    " channels are; data.channels can be 'last' or 'first'"
  )


def _by(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape)) or '()'


def _check_alike(a: Split, a_name: str, b: Split, b_name: str) -> None:
  said = [
    f'{_by(split.image_nxYxXxC.shape[1:])} {split.image_nxYxXxC.dtype}'
    for split in (a, b)
  ]
  if said[0] != said[1]:
    raise DataError(
      f'the images of {a_name} are {said[0]}, those of {b_name} are {said[1]}'
    )


def _check_classes(train: Split, held: Split, name: str) -> None:
  """Refuses labels that are not 0..V-1 with an image of each to train on."""
  seen = np.unique(train.label_n)
  if len(seen) <= seen[-1]:
    missing = np.flatnonzero(seen != np.arange(len(seen)))[0]
    raise DataError(
      f'{name}: of the classes 0..{seen[-1]}, {missing} has no training image'
    )
  if held.label_n.max() > seen[-1]:
    raise DataError(
      f'{name}: class {held.label_n.max()} is held out but has no training'
      f' image; those have classes 0..{seen[-1]}'
    )


def _hold_out(
  whole: Split, fraction: float, name: str
) -> tuple[Split, Split, int]:
  """Holds out the distinct images with the smallest hashes.

  Also tells how many copies of them are left out.
  """
  hashes = _hashes(whole)
  order = sorted(set(hashes))
  held = set(order[: max(1, round(fraction * len(order)))])
  held_n = np.array([digest in held for digest in hashes])
  if held_n.all():
    raise DataError(f'{name}: no image is left to train on')
  first_n = held_n & corpus.firsts(hashes)
  left_out = int(np.count_nonzero(held_n & ~first_n))
  return _chosen(whole, ~held_n), _chosen(whole, first_n), left_out


def _hashes(split: Split) -> list[str]:
  return [
    hashlib.sha256(image.tobytes()).hexdigest() for image in split.image_nxYxXxC
  ]


def _chosen(split: Split, chosen_n: np.ndarray) -> Split:
  return Split(*(array[chosen_n] for array in split))
