"""Routing trouble, told once each, by lines as metrics.jsonl has them."""

import numpy as np

from moe_jax.training import health

E = 8
EVEN = np.full(E, 1 / E)


def told(loads, drops=None, iterations=1):
  """What is told after each line; loads are [lines, routers, E]."""
  routing = health.Routing(iterations)
  drops = np.zeros(np.shape(loads)[:2]) if drops is None else drops
  return [
    routing.see({'step': i, 'load': list(load), 'dropped': list(drop)})
    for i, (load, drop) in enumerate(zip(loads, drops, strict=True), start=1)
  ]


def test_even_load_is_no_trouble():
  draw = np.random.default_rng(0)
  loads = draw.dirichlet(np.full(E, 5.0), size=(40, 3))
  assert not any(told(loads))


def test_a_dead_expert_is_told_once_with_its_layer():
  dead = np.where(np.arange(E) == 3, 0, 1 / (E - 1))
  found = told([[EVEN, dead]] * 30)
  assert [i for i, texts in enumerate(found, start=1) if texts] == [10]
  (text,) = found[9]
  assert text == (
    'step 10: MoE layer 1: 1 of 8 experts had no token in 10 logged steps: 3'
  )


def test_an_expert_that_had_one_token_is_alive():
  dead = np.where(np.arange(E) == 3, 0, 1 / (E - 1))
  assert not any(told([[dead]] * 9 + [[EVEN]] + [[dead]] * 9))
  assert sum(map(len, told([[EVEN]] + [[dead]] * 20))) == 1


def test_collapsed_load():
  one = np.where(np.arange(E) == 5, 0.93, 0.01)
  found = told([[one]] * 12)
  (text,) = found[9]
  assert 'MoE layer 0: the load has collapsed: as uneven as over 1.5' in text


def test_rising_drops():
  drops = np.concatenate([np.full((12, 1), 0.02), np.full((20, 1), 0.06)])
  texts = [t for texts in told([[EVEN]] * 32, drops) for t in texts]
  assert len(texts) == 1
  assert 'of the choices are dropped' in texts[0] and 'MoE layer 0' in texts[0]
  assert not any(told([[EVEN]] * 40, np.full((40, 1), 0.3)))  # they do not rise


def test_iterations_are_named():
  dead = np.where(np.arange(E) == 3, 0, 1 / (E - 1))
  texts = told([[EVEN, EVEN, EVEN, dead]] * 10, iterations=2)[9]
  assert len(texts) == 1 and 'MoE layer 1, iteration 1: ' in texts[0]


def test_lines_of_a_dense_model_and_of_evaluations_are_passed_over():
  routing = health.Routing()
  assert routing.see({'step': 1, 'eval_loss': 2.0}) == []
