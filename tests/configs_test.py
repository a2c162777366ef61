"""Every config builds, is one claim, and has no key that nothing reads."""

import ast
import dataclasses
import pathlib
import re
import runpy

import pytest
from flax import nnx

from moe_jax import config, corpus, models, objective, optimizer, parallel
from moe_jax.models import decoder

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


IDEAS = re.findall(
  r'^\| .+ \| `(c\..+)` \|$', (ROOT / 'README.md').read_text(), re.MULTILINE
)


def load(path):
  return runpy.run_path(str(path))['get_config']()


def build(c):
  """The cost of the model of a resolved config, and the model, abstract."""
  values = {**c['model'], 'gmm': 'cpu'}
  module = models.get(values.pop('name'))
  shape = module.Config(V=c['data']['vocab_size'], **values)
  model = nnx.eval_shape(
    lambda: module.build(shape, parallel.local, rngs=nnx.Rngs(0))
  )
  return module.cost(model, c['seq_len']), model


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_it_builds(path):
  c = config.resolve(load(path))
  optimizer.Config(**c['optimizer'])
  objective.get(**c['objective'])
  corpus.DataConfig(**c['data'])
  cost, _ = build(c)
  assert cost['params_active'] <= cost['params_total']
  assert c['batch_size'] % 8 == 0 and c['model']['E'] % 8 == 0


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_it_is_short_and_says_how_to_run_it(path):
  source = path.read_text()
  body = ast.parse(source).body[-1]
  assert body.name == 'get_config' and len(ast.unparse(body).split('\n')) <= 25
  assert f'moe-train --config=configs/{path.name}' in source
  assert 'Claim:' in source


def test_the_dense_twin_has_the_active_parameters_of_the_main_job():
  load_config = lambda name: config.resolve(load(ROOT / 'configs' / name))
  tiny, dense = (
    build(load_config(name))[0] for name in ('tiny.py', 'dense.py')
  )
  # But for the routers' matrices.
  assert dense['params_active'] == pytest.approx(
    tiny['params_active'], rel=0.01
  )
  assert dense['expert_params'] == 0 < tiny['expert_params']


def attributes(*folders, leave_out):
  """Names read as x.name in these sources, but for a class's own body."""
  found = set()
  for path in sorted(p for f in folders for p in (ROOT / f).rglob('*.py')):
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ClassDef) and node.name == leave_out:
        node.body = [n for n in node.body if getattr(n, 'decorator_list', [])]
      found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
  return found


@pytest.mark.parametrize(
  'cls', [decoder.Config, optimizer.Config, corpus.DataConfig]
)
def test_every_field_of_a_section_is_read(cls):
  read = attributes('moe_jax', leave_out=cls.__name__)
  assert {f.name for f in dataclasses.fields(cls)} <= read


def test_every_other_key_is_read():
  source = ''.join(
    (ROOT / 'moe_jax' / f).read_text() for f in ('train.py', 'job.py')
  )
  sections = {'data', 'model', 'optimizer', 'objective', 'mesh', 'parallel'}
  for key in config.default():
    assert f"'{key}'" in source, key
  for key, values in config.default().items():
    if key in sections - {'mesh'}:
      assert f"'{key}'" in source, key
      assert len(values)
  assert set(config.default().mesh) == set(parallel.AXES)
  assert list(config.default().parallel) == ['strategy']


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
  cost, _ = build(config.resolve(c))
  assert cost['flops_per_token'] > 0


def test_the_readme_has_ideas():
  assert len(IDEAS) >= 10
