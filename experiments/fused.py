"""The strategy `fused` beside `local`: what is saved, time, and a TPU's both.

  python -m experiments.fused --what=saved,time,tpu --json=fused.jsonl

`saved` counts the bytes that one routed layer keeps between its forward and its
backward pass: those results of the forward pass, in the jaxpr of `jax.vjp`,
that the backward pass gets and that are no weights. Nothing runs. Layers of
published models at 8192 tokens, in bfloat16. `plain` is the layer as one writes
it down, with `jax.lax.ragged_dot` and jax's own gradients.

`time` runs forward and backward pass, to x, gates and all weights, in float32
on the platform at hand: each strategy has a turn in every round, in rotating
order, a call that does not count and one that does. Seconds are those of the
CPU, of all threads, which other work changes little. Ratios are to `local` in
the same round. Choices are even: k of E, drawn for each token. `dense` is nine
products of the same FLOPs and nothing else, all rows with one expert. `temp` is
what the compiled program takes besides arguments and results. On CPU freed
memory is kept, as in moe-train (malloc.keep).

`tpu` compiles the published layers for --chip, one process each, and tells what
memory the program takes and its modelled time, see fused_tpu. It needs the
extra `aot`.
"""

import functools
import importlib.util
import itertools
import json
import os
import time
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from moe_jax import malloc, ops, parallel
from moe_jax import plan as plans
from moe_jax.experts import Experts
from pallas_kernels import command, shapes, tiling

_WHAT = flags.DEFINE_list('what', ['saved', 'time'], 'What is looked at.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Turns of each.', lower_bound=1)
_CHIP = flags.DEFINE_list(
  'chip', ['v5p', 'v6e'], 'Chips that tpu compiles for.'
)
_LAYER = flags.DEFINE_list('layer', None, 'Layers that tpu compiles; all.')
_JSON = flags.DEFINE_string('json', None, 'A file that gets a line a result.')

STRATEGIES = ('local', 'fused')


class Layer(NamedTuple):
  """T tokens of width D; K of E experts of hidden width F for each."""

  T: int
  D: int
  E: int
  K: int
  F: int


TIMED = (Layer(4096, 512, 8, 2, 1024), Layer(4096, 512, 64, 8, 256))


def published(name: str) -> Layer:
  """The layer of a model in shapes.LAYERS at 8192 tokens."""
  M, D, F, E = shapes.LAYERS[f'{name}-up']
  return Layer(8192, D, E, M // 8192, F)


MODELS = {name: published(name) for name in ('mixtral', 'olmoe', 'qwen3')}


def arguments(size: Layer, dtype: str) -> tuple:
  """Shapes of (weights, x_TxD, gate_TxK, expert_TxK)."""
  T, D, E, K, F = size
  weights = {
    'gate_ExDxF': (E, D, F),
    'up_ExDxF': (E, D, F),
    'down_ExFxD': (E, F, D),
  }
  of = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
  return (
    {name: of(shape) for name, shape in weights.items()},
    of((T, D)),
    jax.ShapeDtypeStruct((T, K), jnp.float32),
    jax.ShapeDtypeStruct((T, K), jnp.int32),
  )


def layer(size: Layer, strategy: str, gmm: str | None = None):
  """f of `arguments`: the answer y_TxD of a strategy, or of `plain`."""
  if strategy == 'plain':
    return plain
  gmm = gmm or ops.choose_gmm(None)
  make = lambda: Experts(
    *(size.E, size.D, size.F),
    activation='swiglu',
    gmm=functools.partial(ops.gmm, impl=gmm),
    products=ops.products(gmm),
    rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(nnx.eval_shape(make))

  def answer(weights, x_TxD, gate_TxK, expert_TxK):
    nnx.replace_by_pure_dict(state, weights)
    plan = plans.by_token(expert_TxK, gate_TxK, size.E)
    layout = parallel.Layout(strategy=strategy)
    return layout(x_TxD, plan, nnx.merge(graph, state))[0]

  return answer


def plain(weights, x_TxD, gate_TxK, expert_TxK):
  """A SwiGLU layer with `jax.lax.ragged_dot`, as one writes it down."""
  T, K = expert_TxK.shape
  order_M = jnp.argsort(expert_TxK.reshape(T * K))
  token_M = order_M // K
  group_E = plans.count(expert_TxK, len(weights['up_ExDxF']))
  rows_MxD = x_TxD[token_M]
  up_MxF = jax.lax.ragged_dot(rows_MxD, weights['up_ExDxF'], group_E)
  gate_MxF = jax.lax.ragged_dot(rows_MxD, weights['gate_ExDxF'], group_E)
  hidden_MxF = jax.nn.silu(gate_MxF) * up_MxF
  y_MxD = jax.lax.ragged_dot(hidden_MxF, weights['down_ExFxD'], group_E)
  gate_M = gate_TxK.reshape(T * K)[order_M].astype(y_MxD.dtype)
  y_MxD = y_MxD * gate_M[:, None]
  return jnp.zeros_like(x_TxD).at[token_M].add(y_MxD)


def saved(f, weights, x_TxD, gate_TxK, expert_TxK) -> dict[str, int]:
  """{dtype[shape]: bytes} of what f's backward pass needs beside weights."""
  leaves = lambda *args: jax.tree.leaves(
    jax.vjp(functools.partial(f, expert_TxK=args[3]), *args[:3])[1]
  )
  args = weights, x_TxD, gate_TxK, expert_TxK
  jaxpr = jax.make_jaxpr(leaves)(*args).jaxpr
  is_var = lambda v: not isinstance(v, jax.extend.core.Literal)
  kept = set(filter(is_var, jaxpr.outvars))
  kept -= set(jaxpr.invars[: len(weights)])
  found = {}
  for aval in sorted((v.aval for v in kept), key=str):
    found.setdefault(str(aval), 0)
    found[str(aval)] += aval.size * aval.dtype.itemsize
  return found


def passes(f):
  """Forward and backward pass: (y, gradients) of arguments and dy."""

  def run(weights, x_TxD, gate_TxK, expert_TxK, dy_TxD):
    of = functools.partial(f, expert_TxK=expert_TxK)
    y_TxD, pull = jax.vjp(of, weights, x_TxD, gate_TxK)
    return y_TxD, pull(dy_TxD)

  return jax.jit(run)


def draws(size: Layer) -> tuple:
  """Arrays for `passes`."""
  T, D, E, K, F = size
  rng = np.random.default_rng(0)
  draw = lambda a, scale: scale * rng.standard_normal(a.shape, np.float32)
  weights, x, gate, _ = arguments(size, 'float32')
  scales = {'gate_ExDxF': D**-0.5, 'up_ExDxF': D**-0.5, 'down_ExFxD': F**-0.5}
  expert_TxK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
  return jax.device_put((
    {name: draw(a, scales[name]) for name, a in weights.items()},
    draw(x, 1.0),
    rng.random(gate.shape, np.float32),
    expert_TxK.astype(np.int32),
    draw(x, 1.0),
  ))  # fmt: skip


def dense(weights, x_TxD, gate_TxK, expert_TxK, dy_TxD):
  """As many products as `passes` has, of rows that one expert has."""
  K = expert_TxK.shape[1]
  up_DxF, down_FxD = (weights[k][0] for k in ('up_ExDxF', 'down_ExFxD'))
  x_MxD, dy_MxD = (jnp.tile(a, (K, 1)) for a in (x_TxD, dy_TxD))
  x_DxM, dy_DxM = (jax.lax.optimization_barrier(a.T) for a in (x_MxD, dy_MxD))
  first_MxF, second_MxF = x_MxD @ up_DxF, x_MxD @ weights['gate_ExDxF'][0]
  third_MxF = dy_MxD @ down_FxD.T
  rows = first_MxF @ down_FxD, first_MxF @ up_DxF.T, second_MxF @ up_DxF.T
  return rows, x_DxM @ first_MxF, x_DxM @ second_MxF, dy_DxM @ third_MxF


def timed(size: Layer, rounds: int) -> dict[str, dict]:
  """{row: what is told of it}; ValueError if the strategies' answers differ."""
  args, calls, found = draws(size), {}, {}
  expected = None
  for name in STRATEGIES:
    compiled = passes(layer(size, name)).lower(*args).compile()
    answer = jax.device_get(compiled(*args))
    expected = expected or answer
    error = max(jax.tree.leaves(jax.tree.map(_distance, answer, expected)))
    if error > 1e-5:
      raise ValueError(f'{name} differs from {STRATEGIES[0]}: {error:.2g}')
    temp = compiled.memory_analysis().temp_size_in_bytes
    calls[name] = functools.partial(compiled, *args)
    found[name] = {'relative_error': error, 'temp_bytes': temp, 'seconds': []}
  compiled = jax.jit(dense).lower(*args).compile()
  calls['dense'] = functools.partial(compiled, *args)
  found['dense'] = {'seconds': []}
  for i in range(rounds):
    start = i % len(calls)
    for name in [*list(calls)[start:], *list(calls)[:start]]:
      jax.block_until_ready(calls[name]())
      began = time.process_time()
      jax.block_until_ready(calls[name]())
      found[name]['seconds'].append(time.process_time() - began)
  base = np.array(found[STRATEGIES[0]]['seconds'])
  for about in found.values():
    ratios = np.array(about['seconds']) / base
    q1, median, q3 = (float(q) for q in np.percentile(ratios, [25, 50, 75]))
    seconds = float(np.median(about['seconds']))
    about.update(seconds=seconds, ratio=median, ratio_q1=q1, ratio_q3=q3)
  return found


def _distance(found, expected):
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def report_saved(write):
  print('MiB saved for the backward pass of a layer, 8192 tokens, bfloat16')
  print(f'{"":10}{"plain":>10}{"local":>10}{"fused":>10}{"of plain":>10}')
  for name, size in MODELS.items():
    kept = {
      strategy: saved(layer(size, strategy), *arguments(size, 'bfloat16'))
      for strategy in ('plain', *STRATEGIES)
    }
    total = {strategy: sum(parts.values()) for strategy, parts in kept.items()}
    mib = ''.join(f'{n / 2**20:10.1f}' for n in total.values())
    print(f'{name:10}{mib}{total["fused"] / total["plain"]:10.3f}', flush=True)
    for strategy, parts in kept.items():
      about = {'layer': name, **size._asdict(), 'row': strategy}
      write({'what': 'saved', **about, 'bytes': total[strategy], **parts})


def report_time(write, rounds):
  malloc.keep()
  device = jax.devices()[0]
  here = {'jax': jax.__version__, 'platform': device.platform}
  here |= {'device': device.device_kind, 'cores': os.cpu_count()}
  print(', '.join(f'{k} {v}' for k, v in here.items()))
  for size in TIMED:
    print(' '.join(f'{k}={v}' for k, v in size._asdict().items()))
    found = timed(size, rounds)
    for name, about in found.items():
      print(
        f'{name:10}{about["seconds"]:8.3f} s  {about["ratio"]:.2f}'
        f' ({about["ratio_q1"]:.2f}-{about["ratio_q3"]:.2f}) of local'
        + _temp(about),
        flush=True,
      )
      load = {'load': round(os.getloadavg()[0], 2), 'rounds': rounds}
      line = {'what': 'time', **size._asdict(), 'row': name, **about}
      write({**line, **load, **here})


def _temp(about):
  bytes_ = about.get('temp_bytes')
  return '' if bytes_ is None else f', temp {bytes_ / 2**20:.0f} MiB'


def report_tpu(write, chips, layers):
  from experiments import fused_tpu  # it needs this module, and libtpu

  print('of plain: peak memory, and without weights and gradients;')
  print('modelled ms of forward and backward pass, even groups and Zipf')
  for chip in chips:
    for name in layers:
      found = {
        strategy: fused_tpu.in_process(chip, name, strategy)
        for strategy in ('plain', *STRATEGIES)
      }
      for line in itertools.chain(*found.values()):
        write(line)
      plain = found['plain'][0]
      for strategy in STRATEGIES:
        line, zipf = found[strategy]
        peak = line['peak_bytes'] / plain['peak_bytes']
        over = fused_tpu.beyond(line) / fused_tpu.beyond(plain)
        ms = [
          f'{a["ms"]:9.3f} {a["ms"] / b["ms"]:.2f}'
          for a, b in zip((line, zipf), found['local'], strict=True)
        ]
        print(
          f'{chip:5} {name:10}{strategy:8}{peak:8.2f}{over:8.2f}{"".join(ms)}',
          flush=True,
        )


def main(argv: list[str]) -> None:
  del argv
  layers = list(MODELS) if _LAYER.value is None else _LAYER.value
  for name, values, known in (
    ('what', _WHAT.value, ('saved', 'time', 'tpu')),
    ('chip', _CHIP.value, tuple(tiling.CHIPS)),
    ('layer', layers, tuple(MODELS)),
  ):
    for value in values or ['']:
      if value not in known:
        command.stop(f'--{name}={value}; there are {", ".join(known)}')
  if 'tpu' in _WHAT.value and importlib.util.find_spec('libtpu') is None:
    command.stop("libtpu is missing: pip install -e '.[aot]'")
  try:
    file = open(_JSON.value or os.devnull, 'a')
  except OSError as error:
    command.stop(error)
  with file:
    write = lambda line: print(json.dumps(line), file=file, flush=True)
    if 'saved' in _WHAT.value:
      report_saved(write)
    if 'time' in _WHAT.value:
      report_time(write, _ROUNDS.value)
    if 'tpu' in _WHAT.value:
      report_tpu(write, _CHIP.value, layers)


if __name__ == '__main__':
  command.run(main)
