"""Which slow parts of CI a change needs.

  python3 .ci/stages.py [--all | --passed] FOLDER ENVIRONMENT ...

Prints a line 'stage<TAB>argument' for each part to run, and on stderr what it
left out and why. A part runs when a file that it reads, through imports and
names, has changed since the commit in .ci/passed, or when the version of a
package has. All parts run with --all, without that file, when its commit is
unknown or more than 40 back, and when a file changed that is not understood.
Of a test file that is left out on the newest jax, a line of stage 'tenth' says
that a tenth of it runs, another tenth at each commit.

FOLDER has a report of pip for each environment, ENVIRONMENT.json. With --passed
the commit and the versions are written to .ci/passed.
"""

import ast
import functools
import json
import pathlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

PASSED = '.ci/passed'
FARTHEST = 40  # commits
# Parts that are found by a name in a config or an option, not by an import.
BY_NAME = (
  'moe_jax/routers',
  'moe_jax/attention',
  'moe_jax/models',
  'moe_jax/blocks',
  'moe_jax/experts',
  'moe_jax/residuals',
  'moe_jax/objectives',
  'moe_jax/optim/schedules',
  'moe_jax/commands',
  'pallas_kernels',
  'configs',
  'configs/paper',
)
ALIAS = {'interpret': 'tpu'}  # a kernel by another name
MODULE = re.compile(r'\b(?:moe_jax|pallas_kernels|experiments|tests)(?:\.\w+)+')
DEFAULTS = 'moe_jax/config.py'  # where the library itself names its choices
SHARED = ('setup.cfg', 'pyproject.toml', 'tests/conftest.py', '.ci/')
READ_BY_NO_PART = ('.md', '.png', '.jsonl', 'LICENSE', '.gitignore')
# What another jax can change: kernels, layers, meshes, steps, checkpoints.
NEWER = (
  *('attention', 'checkpoint', 'decoder', 'fused', 'fused_tpu', 'generate'),
  *('gmm', 'gmm_gpu', 'gmm_tpu', 'golden', 'hopper', 'mesh', 'optimizer'),
  *('parallel', 'processes', 'routers', 'train'),
)
# Packages that are not asked for by name, but decide what is tested.
UNDER = ('jaxlib', 'libtpu')
# The environment of .ci/run that a stage has.
ENVIRONMENT = {
  'slow': 'env',
  'job': 'env',
  'faults': 'env',
  'parity': 'parity',
  'newer': 'newer',
  'chips': 'chips',
}


class Part(NamedTuple):
  """A piece of a stage, and the files that it begins with."""

  stage: str
  argument: str
  roots: tuple[str, ...]

  def __str__(self):
    return ' '.join(filter(None, (self.stage, self.argument)))


def parts(root: pathlib.Path) -> list[Part]:
  """All that exist in this tree."""
  files = lambda pattern: [
    path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))
  ]
  cpu = ('moe_jax/main.py', 'configs/tiny.py', 'pallas_kernels/cpu.py')
  found = [
    Part('job', '', cpu),
    Part('faults', '', (*cpu, *files('experiments/checks/faults/*.py'))),
    Part('parity', 'tests/weights/transformers_test.py', ()),
    *(Part('chips', path, ()) for path in files('tests/**/aot*_test.py')),
    *(
      Part('newer', path, ())
      for name in NEWER
      for path in files(f'tests/**/{name}_test.py')
    ),
  ]
  for path in files('tests/**/*_test.py'):
    elsewhere = pathlib.Path(path).name.startswith(('aot', 'colab'))
    if _slow(root / path) and not elsewhere:
      found.append(Part('slow', path, ()))
  for path in files('colab/*.ipynb'):
    name = pathlib.Path(path).stem
    test = 'tests/project/colab_test.py'
    runs = f'{test}::test_it_runs_top_to_bottom[{name}]'
    found.append(Part('slow', runs, (test, path, 'tests/conftest.py')))
  of_file = lambda part: (part.argument, 'tests/conftest.py')
  found = [part._replace(roots=part.roots or of_file(part)) for part in found]
  return [
    part._replace(roots=part.roots + tuple(files('tests/golden/*')))
    if part.argument == 'tests/golden/golden_test.py'
    else part
    for part in found
    if all((root / path).exists() for path in part.roots)
  ]


def _slow(path: pathlib.Path) -> bool:
  """Whether a file of tests has slow ones."""
  nodes = ast.walk(ast.parse(path.read_text()))
  return any(isinstance(n, ast.Attribute) and n.attr == 'slow' for n in nodes)


class Tree:
  """The files of a checkout, and which of them each one reads."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.named = {
      folder: {path.stem: path for path in sorted((root / folder).glob('*.py'))}
      for folder in BY_NAME
    }

  def closure(self, roots: tuple[str, ...]) -> set[str]:
    """The roots and all that they read, directly or not."""
    seen, left = set(), list(roots)
    while left:
      path = left.pop()
      if path not in seen:
        seen.add(path)
        left += self.reads(path)
    return seen

  @functools.cache  # noqa: B019, one tree a process
  def reads(self, path: str) -> tuple[str, ...]:
    """What a file imports and, outside the library, what it names."""
    if not path.endswith(('.py', '.ipynb')):
      return ()
    nodes = list(ast.walk(ast.parse(self._code(path))))
    modules, names = set(_imported(nodes)), set()
    if path == DEFAULTS or not path.startswith(('moe_jax/', 'pallas_kernels/')):
      words = set(_strings(nodes))
      names = set(self._called(words, set(_listed(nodes))))
      for word in words:
        modules |= set(MODULE.findall(word)) | set(_imported_in(word))
    files = (set(self._module(name)) for name in modules)
    return tuple(sorted(names.union(*files)))

  def _code(self, path: str) -> str:
    text = (self.root / path).read_text()
    if not path.endswith('.ipynb'):
      return text
    cells = [
      ''.join(cell['source'])
      for cell in json.loads(text)['cells']
      if cell['cell_type'] == 'code'
    ]
    # A cell of another language is a string here, and a line of it nothing.
    cells = [repr(cell) if cell.startswith('%%') else cell for cell in cells]
    return re.sub(r'^(\s*)[%!].*$', r'\1pass', '\n'.join(cells), flags=re.M)

  def _module(self, name: str) -> Iterator[str]:
    """The files of a dotted name, of its packages too, if they are here."""
    parts = name.split('.')
    for n in range(1, len(parts) + 1):
      stem = '/'.join(parts[:n])
      for path in (f'{stem}.py', f'{stem}/__init__.py'):
        if (self.root / path).is_file():
          yield path

  def _called(self, words: set[str], lists: set[str]) -> Iterator[str]:
    words = words | {ALIAS[word] for word in words & ALIAS.keys()}
    text = '\n'.join(words)
    for folder, members in self.named.items():
      for stem, path in members.items():
        name = path.relative_to(self.root).as_posix()
        dotted = name.removesuffix('.py').replace('/', '.')
        short = name.removesuffix('.py').removeprefix('configs/')
        every = pathlib.Path(folder).name in lists
        if {stem, f'{stem}.py', short} & words or every:
          yield name
        elif name in text or dotted in words:
          yield name


def _imported(nodes: list[ast.AST]) -> Iterator[str]:
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _imported_in(text: str) -> Iterator[str]:
  """What a string imports if it is a program, which another process runs."""
  if 'import ' in text:
    try:
      yield from _imported(list(ast.walk(ast.parse(textwrap.dedent(text)))))
    except SyntaxError:
      return


def _strings(nodes: list[ast.AST]) -> Iterator[str]:
  for node in nodes:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def _listed(nodes: list[ast.AST]) -> Iterator[str]:
  """The x of each `x.names()`, which reads all of a folder."""
  for node in nodes:
    match node:
      case ast.Call(func=ast.Attribute(attr='names', value=ast.Name(id=name))):
        yield name


def git(root: pathlib.Path, *arguments: str) -> str | None:
  """What git prints, None where it fails."""
  command = ['git', '-C', str(root), *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  return done.stdout.strip() if done.returncode == 0 else None


def why_all(changed: list[str], root: pathlib.Path) -> str:
  """Why these changes need all parts, '' if they do not."""
  for path in changed:
    if path == PASSED or path.endswith(READ_BY_NO_PART):
      continue
    if path.startswith(SHARED):
      return f'{path} changed'
    if not (root / path).exists():
      return f'{path} is gone'
    golden = path.startswith('tests/golden/')
    if not (path.endswith(('.py', '.ipynb')) or golden):
      return f'{path} changed, and what reads it is not known'
  return ''


def select(
  root: pathlib.Path, versions: dict[str, dict[str, str]], every: bool
) -> Iterator[tuple[Part, str, bool]]:
  """(part, why, whether it runs) for all parts."""
  everything = parts(root)
  passed = root / PASSED
  before = json.loads(passed.read_text()) if passed.exists() else {}
  commit = before.get('commit', '')
  back = git(root, 'rev-list', '--count', f'{commit}..HEAD') if commit else None
  if every:
    reason = '--all'
  elif not before:
    reason = f'there is no {PASSED}'
  elif back is None:
    reason = f'this clone has no commit {commit[:9]}'
  elif int(back) > FARTHEST:
    reason = f'{commit[:9]} is {back} commits back'
  else:
    changed = git(root, 'diff', '--name-only', '--no-renames', commit)
    changed = changed.splitlines()
    reason = why_all(changed, root)
  if reason:
    yield from ((part, reason, True) for part in everything)
    return
  tree = Tree(root)
  for part in everything:
    environment = ENVIRONMENT[part.stage]
    now, then = versions.get(environment, {}), before['packages']
    then = then.get(environment, {})
    moved = sorted(n for n in now | then if now.get(n) != then.get(n))
    files = tree.closure(part.roots)
    touched = sorted(files.intersection(changed))
    if moved:
      yield part, f'{", ".join(moved)}: other versions', True
    elif touched:
      yield part, f'{", ".join(touched)} changed', True
    else:
      none = f'none of its {len(files)} files changed since {commit[:9]}'
      yield part, none, False


def versions(
  root: pathlib.Path, folder: pathlib.Path, environments: list[str]
) -> dict[str, dict[str, str]]:
  """{environment: {package: version}} of what setup.cfg asks for."""
  text = (root / 'setup.cfg').read_text()
  asked = set(re.findall(r'^ {4}([\w.-]+)', text, re.MULTILINE)) | {*UNDER}
  found = {}
  for name in environments:
    report = json.loads((folder / f'{name}.json').read_text())
    packages = (entry['metadata'] for entry in report['install'])
    found[name] = {
      package['name'].lower(): package['version']
      for package in packages
      if package['name'].lower() in asked
    }
  return found


def main(arguments: list[str]) -> int:
  root = pathlib.Path(__file__).resolve().parents[1]
  options = [a for a in arguments if a.startswith('--')]
  folder, *environments = [a for a in arguments if a not in options]
  found = versions(root, pathlib.Path(folder), environments)
  if '--passed' in options:
    if git(root, 'status', '--porcelain', '--untracked-files=no'):
      print('stages.py: uncommitted changes: nothing written', file=sys.stderr)
      return 1
    passed = {'commit': git(root, 'rev-parse', 'HEAD'), 'packages': found}
    (root / PASSED).write_text(json.dumps(passed, indent=1) + '\n')
    return 0
  for part, why, runs in select(root, found, '--all' in options):
    print(f'{"runs" if runs else "left out"}: {part}: {why}', file=sys.stderr)
    if runs:
      print(f'{part.stage}\t{part.argument}')
    elif part.stage == 'newer':
      print(f'tenth\t{part.argument}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
