"""Do the tests notice when the library is broken? Random mutations of it.

  python -m pytest -p tests.helpers.reach --reach=reach.jsonl  # Python 3.12
  python -m experiments.checks.mutations --reach=reach.jsonl --count=20

Breaks one place of moe_jax or pallas_kernels at a time in a copy of this tree,
runs the tests that call the broken function until one fails, and prints which
did. Tests that call it directly run first, then all of their files, as what a
fixture or a cache has made is used by others. The same seed breaks the same
places as long as the library is the same.
"""

import ast
import copy
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from absl import app, flags

_REACH = flags.DEFINE_string('reach', None, 'By `pytest -p reach`.')
_COUNT = flags.DEFINE_integer('count', 20, 'How many places to break.')
_FIRST = flags.DEFINE_integer('first', 0, 'How many of them to leave out.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draw of places.')
_OUT = flags.DEFINE_string('out', None, 'File to add a line of JSON each to.')
_TREE = flags.DEFINE_string('tree', None, 'Another checkout than this one.')
flags.mark_flag_as_required('reach')

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ('moe_jax', 'pallas_kernels')
DIRECTLY = 60  # tests at most in the first round

SWAPS = {
  **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
  **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot},
  **{ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
  **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div},
  **{ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv},
  **{ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd},
  **{ast.BitAnd: ast.BitOr},
}


class Mutant(NamedTuple):
  """A place, as in 'moe_jax/plans.py', and what stands there instead."""

  path: str
  function: str
  line: int
  before: str
  after: str
  text: str  # of the whole file


def changed(node: ast.AST) -> ast.AST | None:
  """The node with one plausible mistake in it, if it can have one."""
  new = copy.deepcopy(node)
  match new:
    case ast.Compare() if type(new.ops[0]) in SWAPS:
      new.ops[0] = SWAPS[type(new.ops[0])]()
    case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(new.op) in SWAPS:
      new.op = SWAPS[type(new.op)]()
    case ast.UnaryOp(op=ast.Not() | ast.USub()):
      return new.operand
    case ast.Constant(value=bool()):
      new.value = not new.value
    case ast.Constant(value=int() | float()):
      new.value += 1
    case ast.IfExp():
      new.body, new.orelse = new.orelse, new.body
    case ast.Call() if new.keywords and new.keywords[-1].arg:
      new.keywords.pop()
    case ast.Call() if len(new.args) == 2:
      new.args.reverse()
    case ast.Expr(value=ast.Call()) | ast.Raise():
      return ast.Pass()
    case _:
      return None
  return new


def mutants(path: pathlib.Path, root: pathlib.Path) -> Iterator[Mutant]:
  """All of a file, of what stands in functions."""
  source = path.read_text()
  lines = source.splitlines(keepends=True)
  starts = [0]
  for line in lines:
    starts.append(starts[-1] + len(line.encode()))
  raw = source.encode()

  def visit(node, names):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names = [*names, node.name]
    inside = any(name in functions for name in names)
    for child in ast.iter_child_nodes(node):
      if inside and hasattr(child, 'lineno'):
        new = changed(child)
        if new is not None:
          yield child, new, '.'.join(names)
      yield from visit(child, names)

  tree = ast.parse(source)
  functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
  for old, new, function in visit(tree, []):
    begin = starts[old.lineno - 1] + old.col_offset
    end = starts[old.end_lineno - 1] + old.end_col_offset
    after = ast.unparse(new)
    if isinstance(new, ast.expr):
      after = f'({after})'
    text = (raw[:begin] + after.encode() + raw[end:]).decode()
    try:
      ast.parse(text)
    except SyntaxError:  # inside an f-string
      continue
    name = path.relative_to(root).as_posix()
    before = raw[begin:end].decode()
    yield Mutant(name, function, old.lineno, before, after, text)


def draw(root: pathlib.Path, count: int, seed: int) -> list[Mutant]:
  """Places at random, each as likely as another."""
  files = [p for name in PACKAGES for p in sorted((root / name).rglob('*.py'))]
  every = [mutant for path in files for mutant in mutants(path, root)]
  return random.Random(seed).sample(every, count)


def reached(mutant: Mutant, lines: list[dict]) -> tuple[list[str], list[str]]:
  """Tests that call the function, and the files whose tests might."""
  name = f'{mutant.path}:{mutant.function}'
  tests = [line['test'] for line in lines if name in line['calls']]
  files = {test.split('::')[0] for test in tests}
  files |= {line['test'].split('::')[0] for line in lines if line['starts']}
  return tests, sorted(files)


def caught(mutant: Mutant, lines: list[dict], run: Callable) -> str:
  """The test that failed, or ''."""
  tests, files = reached(mutant, lines)
  spread = tests[:: max(1, len(tests) // DIRECTLY)]
  for chosen in (spread, files):
    found = run(chosen) if chosen else ''
    if found:
      return found
  return ''


def pytest(tree: pathlib.Path, chosen: list[str]) -> str:
  """The first of these tests that fails in that tree, or ''."""
  python = [sys.executable, '-m', 'pytest', '-x', '-q', '--tb=no', '-rfE']
  told = subprocess.run(
    [*python, '--no-header', *chosen],
    cwd=tree,
    env={**os.environ, 'PYTHONPATH': str(tree)},
    capture_output=True,
    text=True,
  )
  for line in told.stdout.splitlines():
    if line.startswith(('FAILED', 'ERROR')):
      return line.split()[1]
  return '' if told.returncode == 0 else f'exit {told.returncode}'


def main(argv: list[str]) -> None:
  del argv
  root = pathlib.Path(_TREE.value or ROOT).resolve()
  with open(_REACH.value) as file:
    lines = [json.loads(line) for line in file]
  missed, chosen = 0, draw(root, _COUNT.value, _SEED.value)[_FIRST.value :]
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder) / 'tree'
    leave = shutil.ignore_patterns('.git', 'runs', '__pycache__', '*.egg-info')
    shutil.copytree(root, tree, ignore=leave)
    for mutant in chosen:
      began, path = time.monotonic(), tree / mutant.path
      whole = path.read_text()
      path.write_text(mutant.text)
      found = caught(mutant, lines, lambda names: pytest(tree, names))
      path.write_text(whole)
      missed += not found
      line = {**mutant._asdict(), 'caught': found}
      line['seconds'] = round(time.monotonic() - began)
      del line['text']
      print(
        f'{mutant.path}:{mutant.line} {mutant.before!r} -> {mutant.after!r}:'
        f' {found or "MISSED"} ({line["seconds"]} s)',
        flush=True,
      )
      if _OUT.value:
        with open(_OUT.value, 'a') as file:
          file.write(json.dumps(line) + '\n')
  print(f'{len(chosen) - missed} of {len(chosen)} caught')


if __name__ == '__main__':
  app.run(main)
