"""Wall times of the grouped matmul, as multiples of one dense product.

  python -m pallas_kernels.tools.bench --shape=A,B,C --groups=even,zipf

With x[M,A] sorted by expert, w[E,A,B] and group[E] it times apart: `fwd`,
`dlhs` (the gradient of x alone) and `drhs` (the gradient of w alone). Beside it
stand one dense product of the same FLOPs, [M,A]@[A,B], [M,B]@[B,A] or
[A,M]@[M,B], every operand stored in just that shape, and the rivals:

  ragged_dot      jax.lax.ragged_dot; on CPU XLA gives it E-fold work
  IMPL/one_group  the same compiled kernel, all rows in the first group: what
                  is left when no group ends within the rows
  batched         one batched product of equal groups, whatever `group` says:
                  what static, equal groups would cost
  mgpu            on Hopper: jax's own example kernels, not chosen by default
  torch           on NVIDIA: PyTorch's grouped_mm on the same arrays, likewise

Each round times every candidate once, in rotating order, so that a slow moment
of the machine hits neighbours alike; a ratio is to the dense product of its own
round. A sample is as many calls as take 20 ms: on CPU each is waited for,
elsewhere the last. Who needs over half a second, and four times the dense
product, is timed in one call only. mgpu and torch must agree with IMPL.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import pallas_kernels
from pallas_kernels import shapes
from pallas_kernels.tools import command, hopper

_SHAPE = flags.DEFINE_list('shape', 'A,B,C', 'Names in shapes, or MxAxBxE.')
_GROUPS = flags.DEFINE_list('groups', 'even,zipf', 'Names in shapes.GROUPS.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of x, w and the results.'
)
_IMPL = flags.DEFINE_list(
  'impl', None, 'Modules with a gmm; by default the one for this platform.'
)
_RIVALS = flags.DEFINE_list(
  'rivals', 'ragged_dot,one_group,batched', 'Who else is timed, or none.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Samples of each.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'A file that gets a line a result.')

RIVALS = ('ragged_dot', 'one_group', 'batched', 'mgpu', 'torch')
SAMPLE = 0.02  # seconds that a sample takes at least
PATIENCE = 0.5  # seconds of a call that may be repeated in every round
NOTES = {
  '*': 'timed in one call: it is slow',
  '-': 'not timed: E does not divide M',
}


def fwd(gmm, x_MxA, w_ExAxB, group_sizes_E, dy_MxB):
  """y_MxB"""
  del dy_MxB
  return gmm(x_MxA, w_ExAxB, group_sizes_E)


def dlhs(gmm, x_MxA, w_ExAxB, group_sizes_E, dy_MxB):
  """dx_MxA; nothing asks for the gradient of w, so XLA leaves it out."""
  _, pull = jax.vjp(lambda x: gmm(x, w_ExAxB, group_sizes_E), x_MxA)
  return pull(dy_MxB)[0]


def drhs(gmm, x_MxA, w_ExAxB, group_sizes_E, dy_MxB):
  """dw_ExAxB; nothing asks for the gradient of x, so XLA leaves it out."""
  _, pull = jax.vjp(lambda w: gmm(x_MxA, w, group_sizes_E), w_ExAxB)
  return pull(dy_MxB)[0]


PASSES = (fwd, dlhs, drhs)


def batched(x_MxA, w_ExAxB, group_sizes_E):
  """y_MxB of E equal groups, as one batched product."""
  del group_sizes_E
  (M, A), (E, _, B) = x_MxA.shape, w_ExAxB.shape
  x_ExRxA = x_MxA.reshape(E, M // E, A)
  return jnp.einsum('era,eab->erb', x_ExRxA, w_ExAxB).reshape(M, B)


def mgpu(kind, shape, arrays, group_sizes_E):
  """A call of jax's example kernels of one pass on Hopper."""
  left, right = _operands(kind, *arrays)
  f = jax.jit(hopper.build('mgpu', kind, shape).f)
  return functools.partial(f, left, right, jnp.asarray(group_sizes_E))


def torch(kind, shape, arrays, group_sizes_E):
  """A call of PyTorch's grouped_mm on the same arrays."""
  del shape
  library = importlib.import_module('torch')
  left, right = map(library.from_dlpack, _operands(kind, *arrays))
  right = right.mT if kind == 'dlhs' else right
  left = left.mT if kind == 'drhs' else left
  ends_E = library.asarray(
    np.cumsum(group_sizes_E, dtype=np.int32), device='cuda'
  )
  return lambda: _OfTorch(library._grouped_mm(left, right, offs=ends_E))


class _OfTorch:
  """What jax.block_until_ready can wait for."""

  def __init__(self, tensor):
    self.tensor = tensor

  def block_until_ready(self):
    importlib.import_module('torch').cuda.synchronize()
    return self

  def __jax_array__(self):
    return jnp.from_dlpack(self.tensor)


def _operands(kind, x_MxA, w_ExAxB, dy_MxB):
  """The two that a pass reads."""
  return {
    'fwd': (x_MxA, w_ExAxB),
    'dlhs': (dy_MxB, w_ExAxB),
    'drhs': (x_MxA, dy_MxB),
  }[kind]


def bench(shape, group_sizes_E, dtype, gmms, rivals, rounds):
  """Yields (pass name, {candidate: seconds of a call, one a round})."""
  M, A, B, E = shape
  keys = iter(jax.random.split(jax.random.key(0), 6))

  def draw(*sizes):
    return jax.random.normal(next(keys), sizes, dtype)

  x_MxA, w_ExAxB, dy_MxB = draw(M, A), draw(E, A, B), draw(M, B)
  one_group_E = np.zeros_like(group_sizes_E)
  one_group_E[0] = M
  operands = {
    'fwd': (x_MxA, draw(A, B)),
    'dlhs': (dy_MxB, draw(B, A)),
    'drhs': (jnp.array(x_MxA.T), dy_MxB),
  }

  for run in PASSES:

    def call(gmm, group_sizes_E, run=run):
      # Group sizes are arguments: as constants XLA would compile for them.
      f = jax.jit(functools.partial(run, gmm))
      return functools.partial(
        f, x_MxA, w_ExAxB, jnp.asarray(group_sizes_E), dy_MxB
      )

    left, right = operands[run.__name__]
    calls = {'dense': functools.partial(jax.jit(jnp.matmul), left, right)}
    for name, gmm in gmms.items():
      calls[name] = call(gmm, group_sizes_E)
      if 'one_group' in rivals:
        calls[f'{name}/one_group'] = call(gmm, one_group_E)
    if 'ragged_dot' in rivals:
      calls['ragged_dot'] = call(jax.lax.ragged_dot, group_sizes_E)
    if 'batched' in rivals and M % E == 0:
      calls['batched'] = call(batched, group_sizes_E)
    for rival in mgpu, torch:
      if rival.__name__ in rivals:
        arrays = x_MxA, w_ExAxB, dy_MxB
        calls[rival.__name__] = rival(
          run.__name__, shape, arrays, group_sizes_E
        )
        _agree(calls, [*gmms, rival.__name__])
    yield run.__name__, measure(calls, rounds)


def _agree(calls, names):
  """ValueError if the answers of these calls differ."""
  first, *others = (jnp.asarray(calls[n](), jnp.float32) for n in names)
  for name, other in zip(names[1:], others, strict=True):
    error = jnp.linalg.norm(other - first) / jnp.linalg.norm(first)
    if not error < 0.01:
      raise ValueError(f'{name} differs from {names[0]} by {error:.2g}')


def measure(calls, rounds):
  """{name: seconds of a call, one a round}; one in all for who is slow."""
  first = {name: _first_seconds(call) for name, call in calls.items()}
  limit = max(PATIENCE, 4 * first['dense'])
  slow = {name: [s] for name, s in first.items() if s > limit}
  quick = [name for name in calls if name not in slow]
  found = {name: [] for name in quick}
  for i in range(rounds):
    start = i % len(quick)
    for name in quick[start:] + quick[:start]:
      repeats = math.ceil(SAMPLE / first[name])
      found[name].append(_seconds(calls[name], repeats))
  return {**found, **slow}


def _first_seconds(call):
  jax.block_until_ready(call())  # compiles
  return _seconds(call, 1)


def _seconds(call, repeats):
  # A CPU may run several at a time; a GPU has a queue, and calls cost a wait.
  each = jax.default_backend() == 'cpu'
  began = time.perf_counter()
  for _ in range(repeats):
    answer = call()
    if each:
      jax.block_until_ready(answer)
  jax.block_until_ready(answer)
  return (time.perf_counter() - began) / repeats


def summary(seconds, dense):
  """What is told of a candidate; `ratio` is to the dense of the same round."""
  if len(seconds) == len(dense):
    ratios = np.divide(seconds, dense)
  else:  # timed once
    ratios = np.divide(seconds, np.median(dense))
  q1, median, q3 = np.percentile(ratios, [25, 50, 75])
  return {
    'ratio': median,
    'ratio_q1': q1,
    'ratio_q3': q3,
    'ratio_of_minima': min(seconds) / min(dense),
    'seconds': float(np.median(seconds)),
    'seconds_min': min(seconds),
    'rounds': len(seconds),
  }


def here():
  """The platform, for a line of results."""
  device = jax.devices()[0]
  return {
    'jax': jax.__version__,
    'platform': device.platform,
    'device': device.device_kind,
    'cores': os.cpu_count(),
  }


def run(problems, groups, dtype, gmms, rivals, rounds, file):
  """Prints a row for each shape, grouping and pass as it is measured."""
  columns = list(gmms)
  columns += [f'{n}/one_group' for n in gmms if 'one_group' in rivals]
  columns += [n for n in RIVALS if n in rivals and n != 'one_group']
  about = {**here(), 'dtype': dtype}
  print(', '.join(f'{k} {v}' for k, v in about.items()))
  print(f'times as multiples of dense: median (quartiles) of {rounds} rounds')
  width = max(map(len, ['shape', *problems]))
  print(_row(width, 'shape', 'groups', 'pass', 'dense', columns))
  marks = set()
  for name, shape in problems.items():
    for grouping, group_sizes_E in shapes.groups(name, groups).items():
      passes = bench(shape, group_sizes_E, dtype, gmms, rivals, rounds)
      for pass_, times in passes:
        found = {c: summary(s, times['dense']) for c, s in times.items()}
        cells = [_cell(found.get(c), rounds) for c in columns]
        dense = f'{found["dense"]["seconds"] * 1e3:.2f} ms'
        print(_row(width, name, grouping, pass_, dense, cells), flush=True)
        marks.update(cell[-1] for cell in cells)
        for candidate, values in found.items():
          line = {'shape': name, **shape._asdict(), 'groups': grouping}
          line |= {'pass': pass_, 'candidate': candidate, **values, **about}
          print(json.dumps(line), file=file, flush=True)
  for mark, note in NOTES.items():
    if mark in marks:
      print(f'{mark} {note}')


def _row(width, shape, groups, pass_, dense, cells):
  cells = ''.join(f'  {cell:<20}' for cell in cells).rstrip()
  return f'{shape:{width}}  {groups:6}  {pass_:4}  {dense:>10}{cells}'


def _cell(found, rounds):
  """'1.31 (1.27-1.35)', or one of the marks in NOTES."""
  if found is None:
    return '-'
  if found['rounds'] < rounds:
    return f'{found["ratio"]:.2f} *'
  return '{ratio:.2f} ({ratio_q1:.2f}-{ratio_q3:.2f})'.format(**found)


def load_gmms(names):
  """{name: gmm}; ValueError for a module that has none."""
  found = {m.name for m in pkgutil.iter_modules(pallas_kernels.__path__)}
  if names is None:
    platform = jax.default_backend()
    names = [platform if platform in found else 'cpu']  # cpu is plain JAX
  gmms = {}
  for name in names:
    module = name in found and importlib.import_module(f'pallas_kernels.{name}')
    if not hasattr(module, 'gmm'):
      raise ValueError(f'--impl={name}: pallas_kernels has no {name}.gmm')
    gmms[name] = module.gmm
  return gmms


def check(gmms, problems, dtype):
  """Raises ValueError if a gmm does not take a problem on this platform."""
  for name, gmm in gmms.items():
    for label, (M, A, B, E) in problems.items():
      x = jax.ShapeDtypeStruct((M, A), dtype)
      w = jax.ShapeDtypeStruct((E, A, B), dtype)
      group = jax.ShapeDtypeStruct((E,), jnp.int32)
      try:
        jax.jit(gmm).lower(x, w, group)
      except Exception as error:
        raise ValueError(f'--impl={name} --shape={label}: {error}') from error


def check_rivals(rivals, dtype):
  """Raises ValueError if one is not for this platform, or not installed."""
  device = jax.devices()[0]
  hopper_here = str(getattr(device, 'compute_capability', '')).startswith('9.')
  for rival in {'mgpu', 'torch'}.intersection(rivals):
    if not hopper_here or dtype != 'bfloat16':
      raise ValueError(
        f'--rivals={rival} is timed in bfloat16 on Hopper GPUs, not in {dtype}'
        f' on {device.device_kind}'
      )
  if 'torch' in rivals and importlib.util.find_spec('torch') is None:
    raise ValueError("--rivals=torch: pip install -e '.[torch]'")


def _among(flag, known):
  """The flag's values; ValueError for one that is not known, or for none."""
  for value in flag.value:
    if value not in known:
      raise ValueError(f'--{flag.name}={value}; there are {", ".join(known)}')
  if not flag.value:
    raise ValueError(f'--{flag.name}= is empty; there are {", ".join(known)}')
  return flag.value


def main(argv: list[str]) -> None:
  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # jax tells of absent platforms
  try:
    groups = _among(_GROUPS, list(shapes.GROUPS))
    rivals = _among(_RIVALS, [*RIVALS, 'none'])
    check_rivals(rivals, _DTYPE.value)
    problems = {text: shapes.find(text) for text in _SHAPE.value or ['']}
    gmms = load_gmms(_IMPL.value)
    check(gmms, problems, _DTYPE.value)
    file = open(_JSON.value or os.devnull, 'a')
  except (ValueError, OSError) as error:
    command.stop(error)
  with contextlib.closing(file):
    try:
      run(problems, groups, _DTYPE.value, gmms, rivals, _ROUNDS.value, file)
    except ValueError as error:
      command.stop(error)


if __name__ == '__main__':
  command.run(main)
