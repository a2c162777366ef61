"""safetensors files of a published model: read by slices, written by files.

Where both are there, transformers reads the single file and not the index.
"""

import collections
import json
import math
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

from moe_jax.weights.tensors import joined, Piece, stacked

INDEX, WHOLE = 'model.safetensors.index.json', 'model.safetensors'
SHARD = 5 * 10**9  # bytes of a file, at the most
ROWS_BYTES = 1 << 26  # of two tensors that are compared
# By the library's names, as they are written: nothing here computes in float16,
# and float32 has all its numbers. Those of 8 bits would need their scales.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float32'}


class Shards:
  """Tensors by name, in the safetensors files of a folder.

  Raises:
    ValueError: one line; no file, one that is missing or damaged.
  """

  def __init__(self, folder: pathlib.Path):
    self._files, self._of = {}, {}
    for file, names in sorted(_listed(folder).items()):
      path = folder / file
      try:
        opened = safetensors.safe_open(path, framework='np', backend='pread')
      except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'{path} is damaged: {error}') from None
      self._files[file] = opened
      there = set(opened.keys())
      for name in there if names is None else names:
        if name not in there:
          raise ValueError(f'{path} has no tensor {name}, {INDEX} says it has')
        self._of[name] = file

  def names(self) -> set[str]:
    return set(self._of)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """ValueError if the tensor has another shape, or no floats."""
    if self.shape(name) != shape:
      raise ValueError(
        f'{name} has the shape {self.shape(name)}, config.json says {shape}'
      )
    dtype = self._slice(name).get_dtype()
    if dtype not in DTYPES:
      raise ValueError(
        f'{name} is of {dtype}, which is not supported, only'
        f' {", ".join(sorted(DTYPES))}'
      )

  def dtype(self, name: str) -> str | None:
    """One of those in DTYPES, None if the tensor has another."""
    return DTYPES.get(self._slice(name).get_dtype())

  def first_dtype(self) -> str:
    """That of the first tensor of floats in the first file, else float32."""
    file = self._files[min(self._files)]
    kinds = (self.dtype(name) for name in file.keys() if name in self._of)
    return next((kind for kind in kinds if kind), 'float32')

  def equal(self, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; some rows are read at once."""
    shape = self.shape(one)
    if self.shape(other) != shape:
      return False
    some = max(1, ROWS_BYTES // (4 * math.prod(shape[1:])))
    starts = range(0, shape[0], some)
    parts = (slice(at, min(at + some, shape[0])) for at in starts)
    return all(
      np.array_equal(self.read(one, (part,)), self.read(other, (part,)))
      for part in parts
    )

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slice(name).get_shape())

  def read(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
    return self._slice(name)[where]

  def _slice(self, name):
    return self._files[self._of[name]].get_slice(name)


def _listed(folder):
  """{file: names of its tensors, or None for all that it has}"""
  if not folder.is_dir():
    raise ValueError(f'{folder} is no folder')
  index = folder / INDEX
  if (folder / WHOLE).exists():
    return {WHOLE: None}
  if not index.exists():
    raise ValueError(f'{folder} has neither {INDEX} nor {WHOLE}')
  try:
    listed = json.loads(index.read_text(encoding='utf-8'))['weight_map']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{index} is no index of tensors: {error!r}') from None
  found = collections.defaultdict(list)
  for name, file in listed.items():
    if pathlib.PurePath(file).name != file:
      raise ValueError(f'{index}: {file!r} is no name of a file')
    found[file].append(name)
  return found


def read_piece(
  files: Shards, piece: Piece, part: int, where: tuple[slice, ...]
) -> np.ndarray:
  """A slice of a leaf: only those rows and columns that hold it are read."""
  leaf, factors = piece.leaves[part], piece.factors()
  wanted = dict(zip(leaf.letters, where, strict=True))
  size = dict(zip(leaf.letters, leaf.shape, strict=True))
  letters = piece.letters(part)
  outer, inner, shape, at = [], [], [], 0
  for axis, sizes in zip(piece.axes, factors, strict=True):
    own = letters[at : at + len(axis)]
    at += len(axis)
    spans = []
    for letter, of in zip(own, sizes, strict=True):
      first, last, _ = wanted[letter].indices(size[letter])
      before = sum(of[:part]) if len(of) > 1 else 0
      spans.append((first + before, last + before, sum(of)))
    # All of the inner letters' rows are read, and cut afterwards.
    (first, last, _), rest = spans[0], spans[1:]
    step = int(np.prod([n for *_, n in rest], dtype=int))
    outer.append(slice(first * step, last * step))
    shape += [last - first, *(n for *_, n in rest)]
    inner += [slice(None), *(slice(a, b) for a, b, _ in rest)]
  got = files.read(piece.name, tuple(outer)).reshape(shape)[tuple(inner)]
  order = [letters.index(letter) for letter in leaf.letters]
  return np.ascontiguousarray(got.transpose(order))


def write(
  own: list[Piece],
  leaves: dict[tuple[str, ...], jax.Array],
  dtypes: list[np.dtype],
  folder: pathlib.Path,
  shard: int,
) -> int:
  """Writes tensors in files of at most that size; returns how many files.

  Args:
    dtypes: of each piece.
  """
  kind = {p.name: dtype for p, dtype in zip(own, dtypes, strict=True)}
  bytes_of = lambda p: math.prod(p.shape) * kind[p.name].itemsize
  files, room = [[]], shard
  for piece in own:
    if files[-1] and bytes_of(piece) > room:
      files.append([])
      room = shard
    files[-1].append(piece)
    room -= bytes_of(piece)
  of, last = {}, (None, None)
  for i, some in enumerate(files, 1):
    name = f'model-{i:05}-of-{len(files):05}.safetensors'
    name = WHOLE if len(files) == 1 else name
    made = {}
    for piece in some:
      parts = []
      for leaf in piece.leaves:
        ahead = stacked(leaf.path, leaves)
        key = leaf.path, leaf.index[:ahead]
        if last[0] != key:  # experts of a layer follow one another
          last = key, np.asarray(jax.device_get(leaves[leaf.path][key[1]]))
        parts.append(last[1][leaf.index[ahead:]])
      made[piece.name] = joined(piece, parts).astype(kind[piece.name])
      of[piece.name] = name
    safetensors.numpy.save_file(made, folder / name, {'format': 'pt'})
    (folder / name).chmod(0o644)  # the library lets nobody else read
  if len(files) > 1:
    total = sum(bytes_of(piece) for piece in own)
    index = {'metadata': {'total_size': total}, 'weight_map': of}
    text = json.dumps(index, indent=2) + '\n'
    (folder / INDEX).write_text(text, encoding='utf-8')
  return len(files)
