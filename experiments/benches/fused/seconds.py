"""CPU seconds of whole routed layers, forward and backward pass."""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches.fused import layers
from moe_jax.training import malloc

TIMED = (
  layers.Layer(4096, 512, 8, 2, 1024),
  layers.Layer(4096, 512, 64, 8, 256),
)


def passes(f):
  """Forward and backward pass: (y, gradients) of arguments and dy."""

  def run(weights, x_TxD, gate_TxK, expert_TxK, dy_TxD):
    of = functools.partial(f, expert_TxK=expert_TxK)
    y_TxD, pull = jax.vjp(of, weights, x_TxD, gate_TxK)
    return y_TxD, pull(dy_TxD)

  return jax.jit(run)


def draws(size: layers.Layer) -> tuple:
  """Arrays for `passes`."""
  T, D, E, K, F = size
  rng = np.random.default_rng(0)
  draw = lambda a, scale: scale * rng.standard_normal(a.shape, np.float32)
  weights, x, gate, _ = layers.arguments(size, 'float32')
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


def timed(size: layers.Layer, rounds: int) -> dict[str, dict]:
  """{row: what is told of it}; ValueError if the strategies' answers differ."""
  args, calls, found = draws(size), {}, {}
  expected = None
  for name in layers.STRATEGIES:
    compiled = passes(layers.layer(size, name)).lower(*args).compile()
    answer = jax.device_get(compiled(*args))
    expected = expected or answer
    error = max(jax.tree.leaves(jax.tree.map(_distance, answer, expected)))
    if error > 1e-5:
      raise ValueError(
        f'{name} differs from {layers.STRATEGIES[0]}: {error:.2g}'
      )
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
  base = np.array(found[layers.STRATEGIES[0]]['seconds'])
  for about in found.values():
    ratios = np.array(about['seconds']) / base
    q1, median, q3 = (float(q) for q in np.percentile(ratios, [25, 50, 75]))
    seconds = float(np.median(about['seconds']))
    about.update(seconds=seconds, ratio=median, ratio_q1=q1, ratio_q3=q3)
  return found


def _distance(found, expected):
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def report(write, rounds):
  malloc.retain_freed_memory()
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
