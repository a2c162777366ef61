"""Every config builds, is one claim, and has no key that nothing reads."""

import ast
import dataclasses
import functools
import json
import math
import pathlib
import re
import runpy

import pytest

from moe_jax import config, models, objectives, parallel
from moe_jax.data import corpus, dataset, huggingface, images, pairs
from moe_jax.models import classifier, decoder, translator
from moe_jax.optim import optimizer
from moe_jax.training import jobs

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))


IDEAS = re.findall(
  r'^\| .+ \| `(c\..+)` \|$', (ROOT / 'README.md').read_text(), re.MULTILINE
)


def load(path):
  return runpy.run_path(str(path))['get_config']()


def sizes(c):
  """What the data will tell the model; of the papers' images, ImageNet's."""
  if 'vocab_size' in c['data']:
    return {'V': c['data']['vocab_size']}
  if c['data']['source'] == 'images':
    return {'V': 1000, 'size': (224, 224, 3)}
  return models.get(c['model']['name']).smallest(c['model'])


def build(c):
  """The cost of the model of a resolved config."""
  cost = models.get(c['model']['name']).cost
  return cost(model_of(c), c['seq_len'])


def model_of(c):
  """The model of a resolved config, without arrays."""
  return _model(json.dumps({**c['model'], 'gmm': 'cpu', **sizes(c)}))


@functools.cache
def _model(text):
  fields = json.loads(text)
  if 'size' in fields:
    fields['size'] = tuple(fields['size'])
  return models.abstract(models.initializer(fields, parallel.Layout()))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_it_builds(path):
  c = config.resolve(load(path))
  optimizer.Config(**c['optimizer'])
  objectives.get(**c['objective'])
  if c['data']['source'] in ('text', 'pairs', 'images'):
    c['data']['path'] = 'what the user gives'
  dataset.source(c['data']['source']).Config(**c['data'])
  cost = build(c)
  assert cost['params_active'] <= cost['params_total']
  jobs._check_groups(c, model_of(c))
  assert c['batch_size'] % 8 == 0


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_it_is_short_and_says_how_to_run_it(path):
  source = path.read_text()
  body = ast.parse(source).body[-1]
  assert body.name == 'get_config' and len(ast.unparse(body).split('\n')) <= 25
  assert f'--config={path.relative_to(ROOT)}' in source
  assert 'Claim:' in source


def test_the_dense_twin_has_the_active_parameters_of_the_main_job():
  load_config = lambda name: config.resolve(load(ROOT / 'configs' / name))
  tiny, dense = (build(load_config(name)) for name in ('tiny.py', 'dense.py'))
  # But for the routers' matrices.
  assert dense['params_active'] == pytest.approx(
    tiny['params_active'], rel=0.01
  )
  assert dense['expert_params'] == 0 < tiny['expert_params']


MEBI = 2**20


def paper(name, **changes):
  """The cost of a paper's own setting, with changes to its model."""
  c = load(ROOT / 'configs' / 'paper' / f'{name}.py')
  for key, value in changes.items():
    c.update_from_flattened_dict({f'model.{key.replace("__", ".")}': value})
  return build(config.resolve(c))


@pytest.mark.parametrize(
  'changes, published',
  [
    ({'iterations': 1}, 544.51),  # MoE(8/64)
    ({}, 544.75),  # CoE-2(8/64)
    ({'E': 47, 'router__k': 4}, 412.63),  # CoE-2(4/48)
    ({'iterations': 1, 'N': 8}, 1089.01),
    ({'iterations': 1, 'N': 12}, 1633.52),
  ],
)
def test_coe_has_the_published_parameters(changes, published):
  """Mi without embedding, head and last norm (arXiv 2506.18945, plots)."""
  cost = paper('coe', **changes)
  found = cost['params_total'] - 2 * 102_400 * 1024 - 1024
  assert round(found / MEBI, 2) == published


@pytest.mark.parametrize(
  'name, N, E, D, printed',
  [('rexmoe_half', 16, 32, 768, 0.5), ('rexmoe_2b', 32, 64, 512, 2.3)],
)
def test_rexmoe_has_the_printed_parameters(name, N, E, D, printed):
  """In billions, cut at the printed digit (arXiv 2510.17483, table 1).

  The 7B row of that table is left out: 64 experts of width 1408 in 32 layers
  of width 2048 would be 17.7B.
  """
  reused = paper(name)
  assert math.floor(reused['params_total'] / 1e8) / 10 == printed
  vanilla = paper(name, layers_per_pool=1)
  assert reused['expert_params'] == vanilla['expert_params']
  more = reused['params_total'] - vanilla['params_total']
  assert more == (4 - 1) * E * D * N


def test_momentum_small_has_the_logged_parameters():
  """But for a norm of 2 x 128 in each layer that the authors never use."""
  assert paper('momentum_small')['params_total'] == 70_603_015 - 3 * 256


def test_momentum_medium_follows_the_formula():
  """Ours, no published number: 215.68 M."""
  D, E, V, N = 352, 16, 267_735, 6
  layer = 4 * D * D + E * (2 * D * D + 2 * D) + E * (D + 1) + 3 * 2 * D
  total = 2 * V * D + V + N * layer + D // 8 * 1024
  assert paper('momentum_medium')['params_total'] == total


def test_thor_follows_its_formula():
  """Ours, no published number."""
  D, F, V, E = 512, 1024, 10_000, 2
  attention, norm = 4 * (D * D + D), 2 * D
  feed = 2 * D * F + F + D
  encoder = 6 * (attention + 2 * norm) + 3 * feed + 3 * E * feed
  decoder = 6 * (2 * attention + 3 * norm) + 3 * feed + 3 * E * feed
  assert paper('thor')['params_total'] == V * D + encoder + decoder


def test_vmoe_follows_its_formula():
  """Ours, no published number."""
  D, F, E, L = 512, 2048, 8, 50
  layer = 4 * (D * D + D) + 3 * 2 * D  # with the norm after it
  feed = 2 * D * F + F + D
  layers = 8 * layer + 4 * feed + 4 * (E * feed + D * E)
  ends = 32 * 32 * 3 * D + D + D + L * D + 2 * D + D * 1000 + 1000
  assert paper('momentum_vmoe')['params_total'] == layers + ends


def attributes(*folders, leave_out):
  """Names read as x.name or x['name'], but for a class's own body."""
  found = set()
  for path in sorted(p for f in folders for p in (ROOT / f).rglob('*.py')):
    for name, whole, decorated in _attributes(path):
      found |= decorated if name == leave_out else whole
  return found


@functools.cache
def _attributes(path):
  """Of each node of a file: a class's name, all it reads, what its body may."""
  found = []
  for node in ast.parse(path.read_text()).body:
    whole = own = _read(node)
    if isinstance(node, ast.ClassDef):
      node.body = [n for n in node.body if getattr(n, 'decorator_list', [])]
      own = _read(node)
    found.append((getattr(node, 'name', ''), whole, own))
  return found


def _read(node):
  found = set()
  for n in ast.walk(node):
    if isinstance(n, ast.Attribute):
      found.add(n.attr)
    elif isinstance(n, ast.Subscript):
      found.add(getattr(n.slice, 'value', None))
  return found


@pytest.mark.parametrize(
  'cls',
  [
    *(decoder.Config, translator.Config, classifier.Config),
    *(optimizer.Config, corpus.DataConfig, huggingface.HubConfig),
    *(pairs.PairsConfig, images.ImagesConfig),
  ],
)
def test_every_field_of_a_section_is_read(cls):
  read = attributes('moe_jax', leave_out=cls.__name__)
  fields = {f.name for f in dataclasses.fields(cls)}
  assert fields - {'ragged_pool'} <= read  # which permits, and sets nothing


def test_every_other_key_is_read():
  source = ''.join(
    (ROOT / 'moe_jax/training' / f).read_text() for f in ('loop.py', 'jobs.py')
  )
  sections = {'data', 'model', 'optimizer', 'objective', 'mesh', 'parallel'}
  for key in config.default():
    assert f"'{key}'" in source, key
  for key, values in config.default().items():
    if key in sections - {'mesh'}:
      assert f"'{key}'" in source, key
      assert len(values)
  assert set(config.default().mesh) == set(parallel.AXES)
  assert set(config.default().parallel) == {'strategy', 'buffer_factor'}


def test_a_router_named_alone_gets_its_options():
  c = config.default()
  c.model.router = dict(name='switch')
  resolved = config.resolve(c)['model']['router']
  assert resolved == {
    'name': 'switch',
    'capacity': 1.25,
    'group': None,
    'jitter': 0.0,
  }


def test_configs_differ_in_words_that_can_be_read():
  old = config.resolve(config.default())
  c = config.default()
  c.steps, c.model.D, c.log_every = 2000, 512, 7
  mathematics, rest = config.differences(old, config.resolve(c))
  assert mathematics == ['model.D: 256 -> 512']
  assert rest == ['log_every: 10 -> 7', 'steps: 1000 -> 2000']
  c.steps = 500
  mathematics, _ = config.differences(old, config.resolve(c))
  assert 'steps: 1000 -> 500' in mathematics


@pytest.mark.parametrize('line', IDEAS)
def test_the_lines_of_the_readme_are_one_idea_each(line):
  tiny = load(ROOT / 'configs' / 'tiny.py')
  c = load(ROOT / 'configs' / 'tiny.py')
  exec(line, {'c': c, 'config': config})
  assert config.resolve(c) != config.resolve(tiny)
  cost = build(config.resolve(c))
  assert cost['flops_per_token'] > 0


def test_the_readme_has_ideas():
  assert len(IDEAS) >= 10
