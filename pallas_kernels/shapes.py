"""The problems that tests, bench and cost share."""

import re
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
  """M rows of width A, sorted by expert, times E matrices [A, B]."""

  M: int
  A: int
  B: int
  E: int


# Small shapes, bound by the product (A), by its tiles (B), by its weights (C).
BENCH = {
  'A': Shape(4096 * 2, 512, 1024, 8),
  'B': Shape(4096 * 8, 512, 256, 64),
  'C': Shape(512 * 8, 256, 128, 256),
}

# name: model width D, expert width F, experts E, choices per token K; from
# the configurations published with the weights.
_MODELS = {
  'mixtral': (4096, 14336, 8, 2),
  'olmoe': (2048, 1024, 64, 8),
  'qwen3': (2048, 768, 128, 8),
  'deepseek': (7168, 2048, 256, 8),
}
_TOKENS = 8192

# Both projections of the expert layers of Mixtral-8x7B, OLMoE-1B-7B,
# Qwen3-30B-A3B and DeepSeek-V3, for 8192 tokens.
LAYERS = {
  f'{name}-{side}': Shape(_TOKENS * K, *widths, E)
  for name, (D, F, E, K) in _MODELS.items()
  for side, widths in (('up', (D, F)), ('down', (F, D)))
}

# name: (M, A, B, group_sizes_E). Each holds what has broken some kernel before.
CASES = {
  'even': (256, 32, 48, (64, 64, 64, 64)),
  'skewed': (300, 32, 24, (3, 251, 17, 1, 28)),
  'empty_experts': (200, 16, 32, (0, 90, 0, 0, 110, 0)),
  'one_hot': (257, 24, 16, (0, 0, 257, 0)),
  'odd_rows': (331, 40, 24, (100, 131, 100)),
  'one_expert': (65, 16, 16, (65,)),
  'one_row': (1, 16, 16, (0, 1, 0)),
  'sum_below_M': (300, 16, 24, (50, 0, 99, 40)),
  'no_rows_used': (20, 8, 8, (0, 0)),
  'no_rows': (0, 8, 8, (0, 0)),
  'decode': (
    8,
    32,
    16,
    tuple(int(e in (1, 5, 6, 20, 33, 40, 41, 63)) for e in range(64)),
  ),
  'many_small': (256, 8, 8, tuple(e % 5 for e in range(128))),
  'large_tiles': (5000, 8, 16, (1, 4000, 777, 222)),
  'narrow': (90, 1, 1, (40, 0, 50)),
}


def even(M: int, E: int) -> np.ndarray:
  """int32 [E]: equal groups, the first M % E of them one row larger."""
  return (M // E + (np.arange(E) < M % E)).astype(np.int32)


def zipf(M: int, E: int) -> np.ndarray:
  """int32 [E]: the r-th largest group has a share of M in 1 / r.

  Large and small experts are strewn by a fixed permutation, as a router would.
  """
  share_E = 1 / np.arange(1, E + 1)
  edge_E = np.round(np.cumsum(share_E) / share_E.sum() * M).astype(np.int32)
  group_sizes_E = np.diff(edge_E, prepend=np.int32(0))
  return np.random.default_rng(0).permutation(group_sizes_E)


GROUPS = {'even': even, 'zipf': zipf}


def find(name: str) -> Shape:
  """The shape of that name, or the one that MxAxBxE spells.

  Raises ValueError for anything else.
  """
  if name in CASES and CASES[name][0]:
    M, A, B, group = CASES[name]
    return Shape(M, A, B, len(group))
  known = {**BENCH, **LAYERS}
  if name in known:
    return known[name]
  if re.fullmatch(r'[1-9]\d*(x[1-9]\d*){3}', name):
    return Shape(*map(int, name.split('x')))
  raise ValueError(
    f'shape {name!r} is not MxAxBxE, nor one of {", ".join([*known, *CASES])}'
  )


def groups(name: str, groupings: list[str]) -> dict[str, np.ndarray]:
  """{grouping: int32 [E]} for a name that `find` knows; a case has its own."""
  if name in CASES:
    return {'own': np.array(CASES[name][3], np.int32)}
  shape = find(name)
  return {g: GROUPS[g](shape.M, shape.E) for g in groupings}
