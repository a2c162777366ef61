"""Every mesh gives the same answer: systems, strategies, dtypes, in pairs.

A few cells have each mesh, and each way to cut the work with each way to
compute it; the slow ones have all pairs. The full grid is `python -m
experiments.checks.mesh`. What a layer alone does on meshes is in
parallel_test.py.
"""

import itertools
import json
import random

import jax
import numpy as np
import pytest

from experiments.checks.mesh import cells
from moe_jax import parallel
from moe_jax.training import jobs, loop, train_step
from tests.helpers.small import small_config

STEPS = 3
# Two ideas at once where they meet, so that few cells have all on every mesh.
SYSTEMS = (
  'balance loss + loss-free bias + grouped capacity',
  'CoE + expert choice',
  'MomentumSMoE + ReXMoE',
  'decoding THOR',
)
FACTORS = (
  SYSTEMS, tuple(cells.BOUNDS), (1, 4),
  tuple(cells.MESHES), tuple(parallel.STRATEGIES), (False, True),
)  # fmt: skip


ONE = '1x1x1'
# What they exchange with one device is tested on eight, in replicas.
EXCHANGES = set(parallel.STRATEGIES) - set(parallel.LOCAL_STRATEGIES)


def _possible():
  every = itertools.starmap(cells.Cell, itertools.product(*FACTORS))
  alone = lambda cell: cell.mesh == ONE and cell.strategy in EXCHANGES
  return [cell for cell in every if cell.possible() and not alone(cell)]


def _pairs(cell):
  """All pairs of (buffer_factor, value) that a cell has."""
  return set(itertools.combinations(vars(cell).items(), 2))


def _ways(cell):
  """The mesh, and of the pairs those of what is cut with how it is computed."""
  how, cut = {'accumulate', 'remat'}, {'system', 'strategy', 'dtype'}
  mixed = lambda a, b: {a[0], b[0]} & how and {a[0], b[0]} & cut
  return {cell.mesh} | {pair for pair in _pairs(cell) if mixed(*pair)}


def _covering(cells, parts):
  """Some of the cells that have every part which any of them has."""
  left, chosen = set().union(*map(parts, cells)), []
  while left:  # the first of those with the most new parts
    best = max(cells, key=lambda cell: len(parts(cell) & left))
    chosen.append(best)
    left -= parts(best)
  return chosen


def _shuffled(cells, seed):
  """An order of which few are enough."""
  order = list(cells)
  random.Random(seed).shuffle(order)
  return order


# Sorted, so that cells of one reference are together.
CELLS = sorted(_covering(_shuffled(_possible(), 19), _pairs))
FEW = sorted(_covering(_shuffled(CELLS, 49), _ways))


def test_the_cells_cover_all_pairs():
  """By counting, pair of factors by pair of factors."""
  assert len(CELLS) <= 30
  for i, j in itertools.combinations(range(len(FACTORS)), 2):
    found = {
      (tuple(vars(c).values())[i], tuple(vars(c).values())[j]) for c in CELLS
    }
    expected = set(itertools.product(FACTORS[i], FACTORS[j]))
    if FACTORS[i] is FACTORS[3] and FACTORS[j] is FACTORS[4]:
      cut = [m for m, sizes in cells.MESHES.items() if sizes[2] > 1]
      expected -= set(itertools.product(cut, parallel.LOCAL_STRATEGIES))
      expected -= set(itertools.product([ONE], EXCHANGES))
    assert found == expected


def test_a_few_cells_have_every_mesh_and_way():
  assert len(FEW) <= 13
  for i, j in [(2, 0), (2, 4), (2, 1), (5, 0), (5, 4), (5, 1), (3, 3)]:
    found = {
      (tuple(vars(c).values())[i], tuple(vars(c).values())[j]) for c in FEW
    }
    assert len(found) == len(FACTORS[i]) * (i == j or len(FACTORS[j]))


@pytest.mark.parametrize(
  'cell',
  [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in CELLS],
  ids=str,
)
def test_a_cell_is_its_reference(cell):
  found = cells.compare(cell, STEPS)
  assert cells.within(cell, found), found


def test_a_difference_is_seen():
  """Of the last number of any step and of the gradient; NaN is one."""
  made = lambda last=1.0, gradient=2.0: cells.Run(
    [{'a': np.ones(2)}, {'a': np.array([4.0, last]), 'b.z': np.float64(0)}],
    {'w': np.array([gradient, 0.5]), 'noise': np.array([gradient * 1e-9])},
  )
  assert cells.difference(made(), made()) == (0, 0, 0, '')
  assert cells.difference(made(last=2.0), made()) == (0, 0.25, 0, 'a')
  assert cells.difference(made(last=2.0), made(), ('a',)) == (0, 0, 0, '')
  assert cells.difference(made(gradient=3.0), made()) == (0, 0, 0.5, '')
  cell = CELLS[0]
  for bad in made(last=np.nan), made(gradient=np.nan):
    assert not cells.within(cell, cells.difference(bad, made()))
  assert cells.within(cell, cells.Difference(1e-5, 1e-4, 1e-5, ''))


@pytest.mark.parametrize('mesh', ['1x8x1', '1x2x2x2'])
def test_a_mesh_starts_with_the_same_parameters(mesh):
  """And nothing that a rule cuts is left whole."""
  start = lambda mesh: train_step.initial_state(
    cells.prepared(cells.Cell(SYSTEMS[1], 'float32', 1, mesh, 'auto', False))
  )
  found, expected = start(mesh), start('1x1x1')
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  up = found.params['trunk']['body']['pools']['up_ExDxF']
  assert up.addressable_shards[0].data.size == up.size // 8


@pytest.mark.slow
def test_a_run_on_eight_expert_devices_logs_what_one_device_does(
  corpus, tmp_path
):
  """By moe-train's own loop, evaluations too."""
  lines = {}
  for n in 1, 8:
    c = small_config(corpus, steps=4, model__E=8, eval_every=2, mesh__expert=n)
    loop.run(jobs.prepare(c, str(tmp_path / f'{n}')))
    text = (tmp_path / f'{n}' / 'metrics.jsonl').read_text()
    lines[n] = [json.loads(line) for line in text.splitlines()]
  assert len(lines[8]) == len(lines[1]) == 6
  for found, expected in zip(lines[8], lines[1], strict=True):
    assert found.keys() == expected.keys()
    for key in found.keys() - {'tokens_per_second'}:
      np.testing.assert_allclose(found[key], expected[key], 1e-5, 1e-7, key)
