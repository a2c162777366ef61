"""Which part of a published model's tensor is which parameter of ours.

families.py says it with letters; here these are the layers, experts, rows and
columns of one model.
"""

from typing import Any, NamedTuple

import numpy as np

from moe_jax.weights import families


class Leaf(NamedTuple):
  """A parameter of ours, or of stacked ones that of one layer."""

  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]  # without the axes of the index
  letters: tuple[str, ...]  # of the shape


class Piece(NamedTuple):
  """A tensor of theirs, and the leaves that follow one another in it."""

  name: str
  axes: tuple[str, ...]
  leaves: tuple[Leaf, ...]
  wide: bool

  def factors(self) -> list[list[tuple[int, ...]]]:
    """Of each axis and each of its letters the sizes, of every leaf at '+'."""
    size = lambda leaf, a: leaf.shape[leaf.letters.index(self._letter(leaf, a))]
    of = lambda a: self.leaves if a == '+' else self.leaves[:1]
    return [
      [tuple(size(leaf, a) for leaf in of(a)) for a in axis]
      for axis in self.axes
    ]

  @property
  def shape(self) -> tuple[int, ...]:
    of = lambda axis: int(np.prod([sum(sizes) for sizes in axis]))
    return tuple(of(axis) for axis in self.factors())

  def letters(self, part: int) -> list[str]:
    """Of a leaf, in the order of the tensor's axes."""
    leaf = self.leaves[part]
    return [self._letter(leaf, a) for axis in self.axes for a in axis]

  def _letter(self, leaf, a):
    if a != '+':
      return a
    (left,) = set(leaf.letters) - set(''.join(self.axes))
    return left


def find(
  tensors: tuple[families.Tensor, ...], c: Any, tree: dict[tuple[str, ...], Any]
) -> list[Piece]:
  """The tensors that a model of this config has.

  Args:
    c: of a decoder with pools of one layer.
    tree: path -> array or shape, of parameters and router state.
  """
  found = []
  for tensor in tensors:
    layers = range(c.N) if '{layer}' in tensor.name else [None]
    experts = range(c.E) if '{expert}' in tensor.name else [None]
    for layer in layers:
      where = place(c, layer)
      for expert in experts:
        leaves = [
          _leaf(name, tensor.axes.split(), where, expert, tree)
          for name in tensor.leaves
        ]
        if all(leaves):
          name = tensor.name.format(layer=layer, expert=expert)
          axes = tuple(tensor.axes.split())
          found.append(Piece(name, axes, tuple(leaves), tensor.wide))
  return found


class Place(NamedTuple):
  """Where a layer lies in our tree, and its pool if it has one."""

  path: tuple[str, ...]
  index: tuple[int, ...]
  pools: tuple[str, ...] = ()
  pool: tuple[int, ...] = ()


def place(c: Any, layer: int | None) -> Place:
  """Of a layer of a decoder with pools of one layer; None is the model."""
  if layer is None:
    return Place((), ())
  if layer < c.first:
    return Place(('trunk', 'first'), (layer,))
  layer -= c.first
  for name, (G, R, pattern) in zip(
    ('body', 'ragged'), c.segments, strict=False
  ):
    if layer < G * R * len(pattern):
      group, at = divmod(layer, len(pattern))
      here = ('trunk', name)
      if pattern[at] == 'm':
        stack = *here, 'moe'
        return Place(stack, (group, 0), (*here, 'pools'), (group,))
      d = pattern[:at].count('d')
      return Place((*here, 'dense'), (group, 0, d))
    layer -= G * R * len(pattern)
  raise ValueError(f'there is no layer {layer}')


def _leaf(name, axes, place, expert, tree):
  """The leaf of that name at that place; None if the model has none."""
  *outer, last = name.split('.')
  path, index = place.path, place.index
  if outer[:1] == ['pools']:
    path, index, outer = place.pools, place.pool, outer[1:]
    if not path:
      return None
  elif outer[:2] == ['feed', 'routers']:
    index = *index, 0  # of one iteration
  path = *path, *outer, last
  if path not in tree:
    return None
  letters = last.rsplit('_', 1)[1].split('x')
  if letters[0] == 'E' and not any('E' in axis for axis in axes):
    index, letters = (*index, expert or 0), letters[1:]
  shape = tree[path].shape[len(index) :]
  return Leaf(path, index, shape, tuple(letters))


def stacked(path, tree):
  """How many axes of a leaf come before those of its name."""
  return len(tree[path].shape) - len(path[-1].rsplit('_', 1)[1].split('x'))


def joined(piece: Piece, parts: list[np.ndarray]) -> np.ndarray:
  """Their tensor of our leaves."""
  turned, along = [], 0
  for part, (leaf, a) in enumerate(zip(piece.leaves, parts, strict=True)):
    order = [leaf.letters.index(letter) for letter in piece.letters(part)]
    turned.append(a.transpose(order))
  marks = ''.join(piece.axes)
  if '+' in marks:
    along = marks.index('+')
    whole = np.concatenate(turned, axis=along)
  else:
    (whole,) = turned
  return np.ascontiguousarray(whole.reshape(piece.shape))
