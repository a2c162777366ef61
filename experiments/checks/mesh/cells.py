"""A cell is a system trained on a mesh in one way; a reference, on one device.

Everything that a step of training logs, and the gradient of the first step, is
compared with that of the reference: the same batches on one device with the
strategy `local`, without rematerialisation, and without accumulation where the
mathematics allows it (`System.splits`).
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from moe_jax import config, parallel
from moe_jax.training import jobs, train_step

STEPS = 20  # that schedules see; a run may make fewer
B, L = 32, 8  # 8 devices times 4 microbatches; capacities have groups of L / 2
MESHES = {
  '1x1x1': (1, 1, 1, 1),
  '8x1x1': (8, 1, 1, 1),
  '1x8x1': (1, 8, 1, 1),
  '1x1x8': (1, 1, 8, 1),
  '2x2x2': (2, 2, 2, 1),
  '4x1x2': (4, 1, 2, 1),
  '1x2x2x2': (1, 2, 2, 2),
}  # (data, fsdp, expert, tensor)
# The largest relative difference: of the first step, which has the gradient,
# and of all steps.
BOUNDS = {'float64': (1e-9, 1e-9), 'float32': (1e-5, 1e-4)}
# A product of means over a batch is not the mean of its microbatches'.
BATCHWISE = ('balance', 'balance_kept')


class System(NamedTuple):
  """What trains.

  Attributes:
    change: makes it of the base config.
    splits: a batch in microbatches gives the same gradient.
    seed: of the text.
  """

  change: Callable[[ml_collections.ConfigDict], None]
  splits: bool = True
  seed: int = 0


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
  system: str
  dtype: str
  accumulate: int
  mesh: str
  strategy: str
  remat: bool

  def __str__(self):
    return '-'.join(str(v) for v in dataclasses.astuple(self))

  def possible(self) -> bool:
    """Some have all experts here; a reference is compared with no other."""
    here = MESHES[self.mesh][2] == 1
    possible = here or self.strategy not in parallel.LOCAL_STRATEGIES
    return possible and self != self.reference()

  def reference(self) -> 'Cell':
    return Cell(
      system=self.system,
      dtype=self.dtype,
      accumulate=1 if all(s.splits for s in systems(self)) else self.accumulate,
      mesh='1x1x1',
      strategy='local',
      remat=False,
    )


class Run(NamedTuple):
  """What each step logs, and the gradient of the first: {name: float64}."""

  steps: list[dict[str, np.ndarray]]
  gradient: dict[str, np.ndarray]


class Difference(NamedTuple):
  """The largest relative ones, over all arrays.

  That of an array is over the largest number in the reference's; in the
  gradient over a ten-thousandth of the gradient's largest at least, as those of
  the keys' biases are 0 but for rounding.

  Attributes:
    where: the name of the largest in `all`.
  """

  first: float
  all: float
  gradient: float
  where: str


def run(cell: Cell, steps: int) -> Run:
  """So many steps of a cell, from the same parameters and batches as others."""
  wide = cell.dtype == 'float64'
  with jax.enable_x64(True) if wide else contextlib.nullcontext():
    made = prepared(cell)
    state = _initial(cell.system, cell.dtype)
    state = jax.device_put(state, parallel.shardings(state, made.mesh))
    batches, step = made.train_batches(), train_step.make_step(made)
    logged, gradient = [], {}
    for _ in range(steps):
      state, found = step(state, made.put(next(batches)))
      logged.append(_named(found))
      gradient = gradient or _named(state.opt_state['gradient'])
  return Run(logged, gradient)


@functools.cache
def _initial(system, dtype):
  """The first state, on the host; what a mesh makes of it is tested apart."""
  cell = Cell(system, dtype, 1, '1x1x1', 'local', False)
  return jax.device_get(train_step.initial_state(prepared(cell)))


@functools.cache
def reference(cell: Cell, steps: int) -> Run:
  """The run of a cell that is a reference, made once in this process."""
  return run(cell, steps)


def compare(cell: Cell, steps: int) -> Difference:
  """A run of the cell beside its reference."""
  same = cell.accumulate == cell.reference().accumulate
  expected = reference(cell.reference(), steps)
  return difference(run(cell, steps), expected, () if same else BATCHWISE)


def difference(
  found: Run, expected: Run, left_out: tuple[str, ...] = ()
) -> Difference:
  """Of two runs, without the metrics of these names."""
  worst = [
    _worst(a, b, left_out)
    for a, b in zip(found.steps, expected.steps, strict=True)
  ]
  least = 1e-4 * max(np.abs(a).max() for a in expected.gradient.values())
  gradient, _ = _worst(found.gradient, expected.gradient, least=least)
  largest, where = max(worst)
  return Difference(worst[0][0], largest, gradient, where)


def within(cell: Cell, found: Difference) -> bool:
  """Whether it is as small as it has to be."""
  first, all_steps = BOUNDS[cell.dtype]
  return bool(
    found.first <= first and found.gradient <= first and found.all <= all_steps
  )


def measure(cell: Cell) -> dict:
  """A line of cells.jsonl; of a cell that fails, with the error."""
  began, line = time.monotonic(), dataclasses.asdict(cell)
  try:
    found = compare(cell, STEPS)
    line |= {**found._asdict(), 'within': within(cell, found)}
  except Exception as error:  # the others shall be measured
    line |= {'error': f'{type(error).__name__}: {error}', 'within': False}
  jax.clear_caches()
  seconds = round(time.monotonic() - began, 1)
  return {**line, 'seconds': seconds, 'jax': jax.__version__}


def _worst(found, expected, left_out=(), least=0.0):
  """The largest relative difference of two dicts of arrays, and its name."""
  if found.keys() != expected.keys():
    raise ValueError(f'{sorted(found)} is not {sorted(expected)}')
  worst = (0.0, '')
  for name, b in expected.items():
    if name.split('.')[-1] in left_out:
      continue
    apart = np.abs(found[name] - b).max()
    size = max(np.abs(b).max(), least)
    if apart == 0:
      continue
    far = float(apart / size) if size > 0 and apart < np.inf else np.inf
    worst = max(worst, (far, name))
  return worst


def _named(tree):
  """{path: float64 array}, on the host."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
  name = lambda path: '.'.join(str(getattr(k, 'key', k)) for k in path)
  return {name(path): np.asarray(a, np.float64) for path, a in leaves}


def _recording(rule):
  """The optimiser, whose state has the last gradient too."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {'gradient': zeros, 'rule': rule.init(params)}

  def update(grads, state, params, *, step):
    updates, state = rule.update(grads, state['rule'], params, step=step)
    return updates, {'gradient': grads, 'rule': state}

  return optax.GradientTransformationExtraArgs(init, update)


# --- systems ------------------------------------------------------------------


def base() -> ml_collections.ConfigDict:
  """A config so small that compiling it is most of the work."""
  c = config.default()
  c.steps, c.batch_size, c.seq_len = STEPS, B, L
  c.data.update(source='text', tokenizer='bytes')
  c.model.update(N=2, D=16, H=2, F=16, E=8, expert_F=8)
  c.model.attention.num_kv_heads = 1
  c.objective.losses.update(balance=0.0, sequence_balance=0.01)
  c.optimizer.warmup = 0.1
  return c


def _balance(c):
  c.objective.losses.balance = 0.01


def _bias(c):
  c.model.router.update(score='sigmoid', bias_rate=0.01)


def _capacity(c):
  c.model.router.update(capacity=0.75, group=L // 2)


def _expert_choice(c):
  c.model.router = config.router('expert_choice', k=2, group=L // 2)


def _coe(c):
  c.model.update(iterations=2, inner_residual='add', shared_F=8)
  c.model.residual = config.choice('residual', 'replace')


def _rexmoe(c):
  c.model.layers_per_pool = 2
  c.model.router = config.router('rexmoe', k=2, first=8, start=0.0, end=0.5)


def _momentum(c):
  c.model.residual = config.choice('residual', 'heavy_ball', mu=0.7)


def _draws(c):
  c.model.dropout = 0.1
  c.model.router = config.router('random', per='batch', eval_per='sequence')
  c.objective = config.choice('objective', 'consistency', losses={})


def _thor(c):
  sizes = {key: c.model[key] for key in ('D', 'H', 'F', 'E', 'expert_F')}
  c.data = config.source('pairs', vocab_size=290)
  c.model = config.model('translator', N=1, encoder_N=1, block='post', **sizes)
  _draws(c)


SYSTEMS = {
  'balance loss': System(_balance, splits=False),
  'loss-free bias': System(_bias),
  'grouped capacity': System(_capacity),
  'expert choice': System(_expert_choice),
  'CoE': System(_coe, seed=1),  # README.md has what it meets in that of 0
  'ReXMoE': System(_rexmoe),
  'MomentumSMoE': System(_momentum),
  'THOR': System(_thor, splits=False),
  # Its draws and its objective without a second sequence, which compiles in a
  # third of the time.
  'decoding THOR': System(_draws, splits=False),
}


def systems(cell: Cell) -> list[System]:
  """The systems that a cell's name joins with a plus."""
  return [SYSTEMS[name] for name in cell.system.split(' + ')]


def prepared(cell: Cell) -> jobs.Job:
  """The job, whose optimiser keeps the gradient."""
  c = base()
  for system in systems(cell):
    system.change(c)
  c.model.update(dtype=cell.dtype, remat=cell.remat)
  c.mesh = dict(zip(parallel.AXES, MESHES[cell.mesh], strict=True))
  c.parallel.strategy, c.optimizer.accumulate = cell.strategy, cell.accumulate
  with tempfile.TemporaryDirectory() as folder:
    seed = max(system.seed for system in systems(cell))
    c.data.path = str(_write(c.data.source, pathlib.Path(folder), seed))
    made = jobs.prepare(c, folder)
  return dataclasses.replace(made, optimizer=_recording(made.optimizer))


def _write(source, folder, seed):
  """Text, or pairs of some words and, as translation, the same backwards.

  No letter is doubled: a row that begins with one has two tokens that are the
  same to the first layer, and which of them an expert chooses is rounding.
  """
  draw = np.random.default_rng(seed)
  words = 'one two four five six nine ten hundred thousand'.split()
  chosen = [draw.permutation(words)[: draw.integers(2, 5)] for _ in range(300)]
  if source == 'text':
    lines = [' '.join(w) + '\n' for w in chosen]
  else:
    lines = [f'{" ".join(w)}\t{" ".join(w[::-1])}\n' for w in chosen]
  path = folder / source
  path.write_text(''.join(lines))
  return path
