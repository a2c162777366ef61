"""Whatever comes in: it works, or one line says what is wrong with it.

A suite is (name, cases, how many); cases(strategy's draw, folder) raises only
what a caller is promised.
"""

import pathlib
import shutil
import string
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, parallel, plans
from moe_jax.data import corpus, dataset
from moe_jax.training import checkpoint

Case = Callable[[np.random.Generator, pathlib.Path], None]


def run(case: Case, count: int, folder: pathlib.Path) -> str:
  """'' or the first failure, with the seed that makes it."""
  for seed in range(count):
    try:
      case(np.random.default_rng(seed), folder)
    except Exception as error:  # pylint: disable=broad-exception-caught
      return f'seed {seed}: {type(error).__name__}: {error}'[:300]
  return ''


def any_plan(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """Any plan: rows that are sorted are those that were planned, each once.

  Ids beyond the experts, weights that are no numbers, groups that are empty,
  places too few.
  """
  del folder
  T, K, E = (int(draw.choice(s)) for s in ((1, 8, 12), (1, 2, 3), (1, 4, 5)))
  expert_TxK = draw.integers(0, E + 1, (T, K)).astype(np.int32)
  if draw.random() < 0.2:
    expert_TxK[:] = draw.integers(E + 1)
  gate_TxK = draw.choice([0.0, 1.0, -2.0, np.nan, np.inf], (T, K))
  limit = int(draw.choice([1, T * K // 2 + 1, T * K]))  # each is compiled
  rows, y_TxD = _route(expert_TxK, gate_TxK.astype(np.float32), E, limit)
  chosen = int((expert_TxK < E).sum())
  placed = int((np.asarray(rows.token_M) < T).sum())
  _require(placed == min(chosen, limit), f'{placed} of {chosen} in {limit}')
  _require(int(rows.group_sizes_E.sum()) == placed, 'groups are not the rows')
  counts_E = np.bincount(expert_TxK.ravel(), minlength=E + 1)[:E]
  _require(bool((np.asarray(rows.group_sizes_E) <= counts_E).all()), 'too many')
  none_T = (expert_TxK == E).all(axis=1)
  _require(bool((np.asarray(y_TxD)[none_T] == 0).all()), 'rows of no token')


def _route(expert_TxK, gate_TxK, E, limit):
  made = plans.TokenChoice(jnp.asarray(expert_TxK), jnp.asarray(gate_TxK), E)
  return _routed(made, limit)


def _one_route(made, limit):
  T = made.expert_TxK.shape[0]
  rows = plans.sort(made, limit)
  x_MxD = plans.dispatch(jnp.ones((T, 2)), rows)
  return rows, plans.combine(x_MxD, rows, T)


_routed = jax.jit(_one_route, static_argnums=1)


def configs(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """A few values of a config are anything at all."""
  del folder
  c = config.default()
  keys = list(config.flat(c.to_dict()))
  for key in draw.choice(keys, int(draw.integers(1, 4)), replace=False):
    value = _VALUES[draw.integers(len(_VALUES))]
    with c.ignore_type():
      c.update_from_flattened_dict({str(key): value})
  try:
    config.resolve(c)
  except (ValueError, TypeError) as error:
    _one_line(error)


_VALUES = (
  *(0, 1, 2, 3, -1, 10**9, 0.0, 0.5, 1.5, -0.5, float('nan'), float('inf')),
  *('', 'topk', 'adamw', 'nonsense', '../../etc', 'é\n', None, True),
)


def texts(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """Any bytes as a file of text."""
  path = folder / 'fuzz.txt'
  path.write_bytes(_bytes(draw))
  fraction = float(draw.choice([0.1, 0.3, 0.5, 1.0], p=[0.3, 0.3, 0.3, 0.1]))
  options = dict(path=str(path), tokenizer='bytes', eval_fraction=fraction)
  _read('text', options, folder, int(draw.choice([2, 4, 16])))


def pairs(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """Any bytes as a file of pairs of sentences."""
  path = folder / 'fuzz.tsv'
  words = 'one two four five six nine ten hundred thousand'.split()
  sides = (' '.join(draw.choice(words, 3)) for _ in range(80))
  lines = (f'{side}\t{side[::-1]}\n' for side in sides)
  path.write_text(''.join(lines))
  if draw.random() < 0.7:
    _harm(draw, path)
  _read('pairs', dict(path=str(path), vocab_size=270), folder, 8)


def images(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """An .npz file of any arrays, or one with flipped bytes."""
  path = folder / 'fuzz.npz'
  n = int(draw.choice([0, 1, 40]))
  inner = draw.choice(
    [0, 1, 4, 8], int(draw.integers(0, 4)), p=[0.1, 0.1, 0.4, 0.4]
  )
  dtype = draw.choice(['uint8', 'float32', 'int64', 'bool', 'complex64'])
  x = (draw.random((n, *inner)) * 255).astype(dtype)
  y = draw.integers(-1 if draw.random() < 0.2 else 0, 4, n)
  if draw.random() < 0.2:
    y = y.astype(draw.choice(['float64', 'bool', 'U3']))
  np.savez(path, x_train=x, y_train=y)
  if draw.random() < 0.3:
    _harm(draw, path)
  _read('images', dict(path=str(path), eval_fraction=0.3), folder, 4)


def _read(source, options, folder, length):
  if source != 'images':
    options['cache_dir'] = str(folder / 'cache')
  kind = dataset.source(source)
  try:
    c = config.source(source, **options).to_dict()
    found = kind.load(kind.Config(**c), length)
    batches = found.train_batches(2, 0, None)
    batch = next(batches)
    next(iter(found.eval_batches(2, 1.0, None)))
  except (corpus.DataError, ValueError, OSError) as error:
    _one_line(error)
    return
  _require(len(batch['row_B']) == 2, 'another batch size')


def checkpoints(draw: np.random.Generator, folder: pathlib.Path) -> None:
  """A checkpoint of which some file was changed: whole values, or refused."""
  whole = folder / 'whole'
  if not whole.exists():
    saved = checkpoint.Checkpoints(whole, 1)
    saved.save(1, _state(1.0), {'place': 7})
    saved.close()
  run = folder / 'harmed'
  shutil.rmtree(run, ignore_errors=True)
  shutil.copytree(whole, run)
  files = sorted(p for p in (run / 'checkpoints').rglob('*') if p.is_file())
  for path in draw.choice(files, int(draw.integers(1, 3)), replace=False):
    _harm(draw, path)
  found = checkpoint.Checkpoints(run, 1)
  try:
    got = found.restore(_state(0.0))
  except OSError as error:
    _one_line(error)
  else:
    if got is not None:
      _require(got.data == {'place': 7}, f'other data {got.data}')
      _require(bool((got.state['a_E'] == 1).all()), 'other values')
  finally:
    found.close()


def _state(value):
  mesh = parallel.mesh(dict.fromkeys(parallel.AXES, 1))
  tree = {'a_E': jnp.full((64,), value), 'step': jnp.int32(1)}
  return jax.device_put(tree, parallel.shardings(tree, mesh))


def _harm(draw, path):
  """Cuts a file, empties it, flips bytes in it, or writes something else."""
  content = bytearray(path.read_bytes())
  kind = draw.integers(4)
  if kind == 0:
    content = content[: draw.integers(len(content) + 1)]
  elif kind == 1 and content:
    for _ in range(draw.integers(1, 4)):
      content[draw.integers(len(content))] ^= int(draw.integers(1, 256))
  elif kind == 2:
    content += _bytes(draw)
  else:
    content = _bytes(draw)
  path.write_bytes(content)


def _bytes(draw):
  """Letters mostly; sometimes any bytes, one line, or none."""
  size = int(draw.choice([0, 1, 10, 200, 2000]))
  if draw.random() < 0.3:
    return draw.bytes(size)
  letters = np.frombuffer((string.ascii_lowercase + '  \n').encode(), np.uint8)
  return draw.choice(letters, size).tobytes()


def _one_line(error):
  text = str(error).strip()
  _require(text and '\n' not in text, f'{type(error).__name__}: {text!r}')


def _require(holds, what):
  if not holds:
    raise AssertionError(what)


SUITES = (
  ('plans', any_plan, 4000),
  ('configs', configs, 3000),
  ('files of text', texts, 1500),
  ('files of pairs', pairs, 500),
  ('files of images', images, 1500),
  ('checkpoints', checkpoints, 500),
)
