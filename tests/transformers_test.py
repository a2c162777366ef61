"""Imported weights against transformers' own models; extra `torch`.

The table of README.md is `python -m experiments.parity`.
"""

import functools
import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import convert, parallel, routing

missing = "torch and transformers are not installed: pip install -e '.[torch]'"
pytest.importorskip('torch', reason=missing)
pytest.importorskip('transformers', reason=missing)

cases = importlib.import_module('experiments.parity.cases')


@functools.cache
def _made(name, place):
  return cases.make(name, place), place


@pytest.fixture(scope='module')
def case(request, tmp_path_factory):
  """A model of transformers, its folder and the work directory made of it."""
  place = tmp_path_factory.getbasetemp() / request.param
  return _made(request.param, place)


all_cases = pytest.mark.parametrize(
  'case', cases.CASES, indirect=True, scope='module'
)
routed = pytest.mark.parametrize(
  'case', cases.ROUTED, indirect=True, scope='module'
)


@all_cases
def test_it_is_the_model_of_transformers(case):
  model, folder = case
  found = cases.compare(model, folder)
  assert found.logits < 1e-5
  assert found.choices == found.chosen
  assert bool(found.chosen) == (folder.name in cases.ROUTED)
  assert found.same == found.tokens == 2 * cases.NEW
  assert found.bits == found.tensors
  assert found.opened == 0
  assert len(list((folder / 'again').glob('*.safetensors'))) > 1
  own, opened = (
    model.config,
    type(model.config).from_pretrained(folder / 'again'),
  )
  for key in ('eos_token_id', 'max_position_embeddings', 'hidden_act'):
    assert getattr(own, key) == getattr(opened, key)


@routed
def test_fused_tensors_are_read_too(case, tmp_path):
  """As transformers 5 has them in memory."""
  model, folder = case
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  assert any('gate_up_proj' in name for name in state)
  if model.config.tie_word_embeddings:
    del state['lm_head.weight']
  save_file(state, tmp_path / 'model.safetensors')
  text = (folder / 'published' / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text)
  family, keys, _ = convert.read_config(tmp_path)
  c, _ = convert.model_config(keys)
  mesh = parallel.mesh({'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2})
  cut, _ = convert.load(tmp_path, family, c, mesh)
  job = routing.load(str(folder / 'run'))
  whole = routing.restore(job, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((cut.params, cut.router_state)),
    jax.device_get((whole.params, whole.router_state)),
  )


@all_cases
def test_a_cut_import_is_the_same_bits_on_a_mesh(case):
  """Each device reads its slices, of split experts too."""
  _, folder = case
  family, keys, _ = convert.read_config(folder / 'published')
  c, _ = convert.model_config(keys)
  job = routing.load(str(folder / 'run'))
  whole = jax.device_get(routing.restore(job, 0))
  for sizes in ((1, 2, 2, 2), (2, 4, 1, 1)):
    mesh = parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))
    cut, _ = convert.load(folder / 'published', family, c, mesh)
    jax.tree.map(
      np.testing.assert_array_equal,
      (whole.params, whole.router_state),
      jax.device_get((cut.params, cut.router_state)),
    )
    trunk = cut.params['trunk']
    if folder.name in cases.ROUTED:
      gate = trunk['body']['pools']['gate_ExDxF']
    else:
      gate = trunk['first']['feed']['one']['gate_ExDxF']
    assert not gate.sharding.is_fully_replicated
