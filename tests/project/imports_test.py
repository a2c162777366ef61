"""The import law of moe_jax/__init__.py, kept by reading the sources."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [
  path.relative_to(ROOT).as_posix()
  for package in ('moe_jax', 'pallas_kernels')
  for path in sorted((ROOT / package).rglob('*.py'))
]

# Each imports what stands below it. A new part is given its place here.
LEVELS = (
  {'__main__'},
  {'main'},
  {'commands'},
  {'analysis', 'decode', 'weights', 'sizing'},
  {'training'},
  {'config'},
  {'models', 'optim', 'objectives', 'evaluators', 'report'},
  {'trunk', 'data'},
  {'blocks'},
  {'routers', 'attention', 'experts', 'residuals', 'parallel'},
  {'fused', 'balance', 'norm', 'init'},
  {'ops'},
  {'plans', 'byname', 'exact', 'paths', 'ranges'},
)
# Who may import a package that the others must not know.
ALONE = {
  'absl': {'main', 'commands'},
  'ml_collections': {'config', 'main', 'commands'},
  'pallas_kernels': {'ops'},
}


def _imported(path):
  """Dotted names; of `from a import b`, both a and a.b."""
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: import by the whole name'
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _is_module(name):
  path = ROOT / name.replace('.', '/')
  return path.is_dir() or path.with_suffix('.py').exists()


def _module(path):
  """The part of moe_jax that a file belongs to, '' for its __init__."""
  parts = pathlib.Path(path).with_suffix('').parts[1:]
  return parts[0] if parts != ('__init__',) else ''


def _level(module):
  return next(i for i, modules in enumerate(LEVELS) if module in modules)


@pytest.mark.parametrize('path', [p for p in SOURCES if 'moe_jax' in p])
def test_imports_go_down(path):
  module = _module(path)
  for name in filter(_is_module, _imported(path)):
    parts = name.split('.')
    if parts[0] != 'moe_jax' or parts[1:2] in ([], [module]):
      continue
    target = parts[1]
    lower = module and _level(target) > _level(module)
    assert lower, f'{path} imports {target}'


@pytest.mark.parametrize('path', [p for p in SOURCES if 'moe_jax' in p])
def test_some_packages_are_known_to_one_module(path):
  module = _module(path)
  for name in _imported(path):
    package = name.split('.')[0]
    assert module in ALONE.get(package, {module}), f'{path} imports {package}'
  if module not in ALONE['pallas_kernels']:  # nor by importlib
    code = ast.walk(ast.parse((ROOT / path).read_text()))
    strings = [n.value for n in code if isinstance(n, ast.Constant)]
    assert not [s for s in strings if str(s).startswith('pallas_kernels')]


@pytest.mark.parametrize(
  'folder',
  [
    *('routers', 'models', 'blocks', 'residuals', 'objectives'),
    'optim/schedules',
  ],
)
def test_those_that_are_found_by_name_do_not_know_each_other(folder):
  files = [p for p in SOURCES if p.startswith(f'moe_jax/{folder}/')]
  assert len(files) > 1
  for path in files:
    package = f'moe_jax.{folder}.'.replace('/', '.')
    inside = [n for n in _imported(path) if n.startswith(package)]
    assert not list(filter(_is_module, inside)), path


KERNELS = [
  p for p in SOURCES if p.startswith('pallas_kernels/') and p.count('/') == 1
]
# Of pallas_kernels, what is run from a shell; the rest are libraries.
TOOLS = tuple(
  f'pallas_kernels/tools/{name}.py' for name in ('bench', 'command', 'cost')
)


@pytest.mark.parametrize('path', [p for p in SOURCES if 'pallas' in p])
def test_kernels_need_jax_alone(path):
  for name in _imported(path):
    package = name.split('.')[0]
    # numpy comes with jax.
    known = package in ('jax', 'numpy', 'pallas_kernels') or (
      package in sys.stdlib_module_names
    )
    assert known or (path in TOOLS and package == 'absl'), (
      f'{path} imports {package}'
    )


@pytest.mark.parametrize('path', KERNELS)
def test_kernels_do_not_know_their_tools(path):
  for name in _imported(path):
    assert 'tools' not in name.split('.'), f'{path} imports {name}'
