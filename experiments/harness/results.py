"""results.jsonl of a study: a line a run, and what may stand beside what.

A line has the arm, the seed, what the run measured, and what it was made with:
digests of `code`, `config` and `data`, `versions` and `device`. Lines of one
file have the same, or nothing is added to it. cost.jsonl has a line an arm.
"""

import hashlib
import importlib
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_collections

from experiments import studies
from experiments.harness import sources
from moe_jax import config
from moe_jax.data import cache
from moe_jax.report import metrics
from moe_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
FILE, COSTS, MEASURE = 'results.jsonl', 'cost.jsonl', 'measure.py'
# Folders of moe_jax in which a config names the file that it uses.
BY_NAME = (
  *('routers', 'attention', 'models', 'blocks', 'experts', 'residuals'),
  *('objectives', 'schedules'),
)
# Files of pallas_kernels that ops can come to; the others are commands.
KERNELS = ('cpu', 'gpu', 'operands', 'shapes', 'tiling', 'tpu')


def names() -> list[str]:
  """Of the studies that there are."""
  places = map(pathlib.Path, studies.__path__)
  found = (p for place in places for p in place.glob('*/study.py'))
  return sorted({p.parent.name for p in found})


def study(name: str) -> ModuleType:
  """experiments/studies/<name>/study.py; ValueError lists those there are.

  It has DATA (names of sources.py), `arms(data)` from the data's folder to a
  config an arm, CLAIMS (claims.py) and COLUMNS (of its table: {metric: title}).
  """
  if name not in names():
    raise ValueError(f'no study {name!r}; there are {", ".join(names())}')
  return importlib.import_module(f'experiments.studies.{name}.study')


def folder(study: ModuleType) -> pathlib.Path:
  return pathlib.Path(study.__file__).parent


def measure(study: ModuleType) -> Callable[..., dict[str, float]] | None:
  """(job, state) -> more metrics of a trained run, from the study's measure.py.

  None where there is no such file.
  """
  if not (folder(study) / MEASURE).exists():
    return None
  name = f'experiments.studies.{folder(study).name}.measure'
  return importlib.import_module(name).measure


def made_with(
  study: ModuleType,
  arms: dict[str, ml_collections.ConfigDict],
  data: pathlib.Path,
  device: str,
) -> dict[str, dict[str, Any]]:
  """{arm: what a line of it has to have been made with}"""
  read, versions = sources.digests(data, study.DATA), loop.versions()
  found = {}
  for arm, c in arms.items():
    values = config.resolve(c)
    text = json.dumps({**values, 'seed': None}, sort_keys=True)
    for place in data, cache.directory():
      text = text.replace(str(place), '')  # wherever it lies
    found[arm] = {
      'code': _code(study, values),
      'config': hashlib.sha256(text.encode()).hexdigest()[:16],
      'data': read,
      'versions': versions,
      'device': device,
    }
  return found


def read(study: ModuleType) -> list[dict]:
  """The lines, none where there is no file yet."""
  return _lines(folder(study) / FILE)


def costs(study: ModuleType) -> dict[str, dict]:
  """{arm: its line of cost.jsonl}, empty where there is no such file."""
  return {line['arm']: line for line in _lines(folder(study) / COSTS)}


def put_costs(study: ModuleType, lines: list[dict]) -> None:
  """Replaces cost.jsonl."""
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  metrics.replace(folder(study) / COSTS, text)


def with_costs(study: ModuleType, rows: list[dict]) -> list[dict]:
  """The lines, with `step_seconds` and `step_bytes` of their arms if known."""
  found = costs(study)
  keys, none = ('step_seconds', 'step_bytes'), {'config': None}
  joined = []
  for row in rows:
    cost = found.get(row['arm'], none)
    same = cost['config'] == row['config']  # not of an older study.py
    joined.append(row | {key: cost[key] for key in keys if same})
  return joined


def _lines(path):
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def add(study: ModuleType, row: dict) -> None:
  """One line more, whole or not at all but for a power cut."""
  with (folder(study) / FILE).open('a') as file:
    file.write(json.dumps(row) + '\n')


def check(rows: list[dict], now: dict[str, dict], where: Any) -> None:
  """ValueError if a line was made with anything else than an arm is now.

  Args:
    rows: the lines of the file `where`.
    now: {arm: what made_with says of it}.
  """
  for row in rows:
    said = f'{where}: {row["arm"]} of seed {row["seed"]}'
    if row['arm'] not in now:
      raise ValueError(f'{said} is of an arm that study.py lacks')
    for key, value in now[row['arm']].items():
      if row[key] != value:
        was, is_ = _apart(row[key], value)
        raise ValueError(
          f'{said} was made with {key} {was}, and this would be {is_}:'
          ' move the file away to begin anew'
        )


def _apart(old, new):
  """Two values; of two dicts what differs in them."""
  if not isinstance(old, dict):
    return old, new
  keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
  return {k: old.get(k) for k in keys}, {k: new.get(k) for k in keys}


def _code(study, values):
  """A digest of the sources that a run of these values can come to."""
  named = {v for v in config.flat(values).values() if isinstance(v, str)}
  named.add('__init__')
  whole = hashlib.sha256()
  for path in sorted(ROOT.glob('moe_jax/**/*.py')):
    if path.parent.name == 'commands':
      continue
    if path.parent.name in BY_NAME and path.stem not in named:
      continue
    whole.update(path.read_bytes())
  others = (
    *(ROOT / f'pallas_kernels/{name}.py' for name in KERNELS),
    *(
      ROOT / f'experiments/harness/{name}.py' for name in ('trial', 'measures')
    ),
    folder(study) / MEASURE,
  )
  for path in others:
    whole.update(path.read_bytes() if path.exists() else b'')
  return whole.hexdigest()[:16]
