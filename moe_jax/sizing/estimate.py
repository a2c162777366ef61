"""What a training step needs of each device, from its config alone.

What lies there between steps is counted exactly, from the shapes of the train
state and the sharding rules of moe_jax/parallel.py. What a step needs besides
is arithmetic over the arrays that the TPU's compiler was seen to keep alive at
once; experiments/checks/scale holds it to that compiler's own numbers. Bytes
are those of one device, unless a name says otherwise.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import attention, exact, models, parallel
from moe_jax.experts.mlp import ACTIVATIONS
from moe_jax.optim import optimizer

GIB = 2**30
GAPS = 16  # of what a step needs, such a part is lost between its arrays


class Chip(NamedTuple):
  """One device, as jax counts them: of a tpu7x a chip has two."""

  platform: str
  memory: int  # bytes that a program can have
  devices: int = 1  # on a chip
  ragged: float = math.inf  # chips of which a network has ragged_all_to_all


# What is left of a TPU's memory is what its compiler says when it is too small.
CHIPS = {
  'v5e': Chip('tpu', int(15.75 * GIB), ragged=16),
  'v5p': Chip('tpu', int(95.73 * GIB)),
  'v6e': Chip('tpu', int(31.24 * GIB)),
  'tpu7x': Chip('tpu', int(94.74 * GIB), devices=2),
  'h100': Chip('gpu', 79 * GIB),
}


class Topology(NamedTuple):
  """Devices that stand together, `slices` times."""

  chip: Chip
  shape: str  # as libtpu names it
  slices: int
  devices: int  # of all slices


def topology(text: str) -> Topology:
  """'v5p:8x8x8'; '2xv5p:4x4x4' for two slices; 'h100:8' for eight GPUs.

  Raises:
    ValueError: it is none, or of a chip that is not in CHIPS.
  """
  match = re.fullmatch(r'(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)', text)
  if not match:
    raise ValueError(
      f'topology {text!r} is not like v5p:8x8x8, 2xv5p:4x4x4 or h100:8'
    )
  slices, name, shape = int(match[1] or 1), match[2], match[3]
  if name not in CHIPS:
    raise ValueError(f'no chip {name!r}; there are {", ".join(CHIPS)}')
  chips = math.prod(int(n) for n in shape.split('x'))
  chip = CHIPS[name]
  devices = slices * chips * chip.devices
  return Topology(chip, f'{name}:{shape}', slices, devices)


def mesh(c: dict[str, Any], there: Topology) -> jax.sharding.AbstractMesh:
  """The config's mesh, without devices.

  Raises:
    ValueError: it is of more devices than the topology has, or of fewer; `data`
      does not go over all slices; it does not divide what is laid on it.
  """
  sizes, m = c['mesh'], c['model']
  text = ' x '.join(f'mesh.{axis}={n}' for axis, n in sizes.items())
  devices = math.prod(sizes.values())
  if devices != there.devices:
    raise ValueError(
      f'{text} = {devices} devices, the topology has {there.devices}'
    )
  if sizes['data'] % there.slices:
    raise ValueError(f'{text}: data is not a multiple of {there.slices} slices')
  parallel.check(
    sizes,
    batch_size=c['batch_size'],
    accumulate=c['optimizer']['accumulate'],
    E=m['E'],
    F=m['expert_F'],
  )
  return jax.sharding.AbstractMesh(
    tuple(sizes[axis] for axis in parallel.AXES), parallel.AXES
  )


# --- what is built and read, without arrays -----------------------------------


def model(
  c: dict[str, Any], layout: parallel.Layout, platform: str
) -> Callable[[jax.Array], nnx.Module]:
  """What makes the model of a seed; its vocabulary is as large as it may be.

  Raises:
    ValueError: it is no decoder of text; or one that cannot be made.
  """
  if c['model']['name'] != 'decoder' or 'vocab_size' not in c['data']:
    raise ValueError(
      f'a plan is of a decoder of text, not of model.name='
      f'{c["model"]["name"]!r} and data.source={c["data"]["source"]!r}'
    )
  values = {**c['model'], 'V': _ids(c)}
  if values['gmm'] == 'auto':  # on GPUs ragged_dot copies rows for each expert
    values['gmm'] = 'tpu' if platform == 'tpu' else 'cpu'
  return models.initializer(values, layout)


def _ids(c):
  return c['data']['padded_size'] or c['data']['vocab_size']


def make_optimizer(c: dict[str, Any]) -> Any:
  return optimizer.make(optimizer.Config(**c['optimizer']), c['steps'])


def batch(c: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch of text, as moe_jax/data/packing.py states them."""
  B, L = c['batch_size'], c['seq_len']
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  names = ('ids_BxL', 'segment_BxL', 'pos_BxL', 'target_BxL')
  return {
    **{name: ints(B, L) for name in names},
    'mask_BxL': jax.ShapeDtypeStruct((B, L), jnp.float32),
    'row_B': ints(B),
  }


# --- what lies on a device between steps --------------------------------------


class Held(NamedTuple):
  """Parameters on one device: how many, by what becomes of them in a step."""

  pools: int  # of experts
  layers: int  # all others that layers have
  table: int  # embedding and head
  gathered: int  # those of `layers` that are cut, as many as they are whole
  moments: int  # bytes


def held(c: dict[str, Any], where: jax.sharding.AbstractMesh) -> Held:
  """Exact, from the shapes of the train state and `parallel.spec`."""
  init = model(c, parallel.Layout(), 'tpu')
  params, _ = models.split(models.abstract(init))
  moments = jax.eval_shape(make_optimizer(c).init, params)
  here = lambda tree: [
    (path, a, math.prod(cut.shard_shape(a.shape)))
    for (path, a), cut in zip(
      jax.tree_util.tree_leaves_with_path(tree),
      jax.tree.leaves(parallel.shardings(tree, where)),
      strict=True,
    )
  ]
  count = collections.Counter(
    moments=sum(n * a.dtype.itemsize for _, a, n in here(moments))
  )
  for path, a, n in here(params):
    keys = {key.key for key in path}
    if 'pools' in keys:
      count['pools'] += n
    elif 'trunk' in keys:
      count['layers'] += n
      count['gathered'] += a.size if n < a.size else 0
    else:
      count['table'] += n
  return Held(*(count[name] for name in Held._fields))


# --- what a step needs besides ------------------------------------------------


class Plan(NamedTuple):
  """Bytes of one device, and what they are held against."""

  there: Topology
  strategy: str
  state: dict[str, int]
  step: dict[str, int]  # alive at the step's peak
  traffic: dict[str, dict[str, int]]  # kind of collective: of what: bytes

  @property
  def peak(self) -> int:
    return sum(self.state.values()) + sum(self.step.values())


class _Sizes(NamedTuple):
  """The letters of moe_jax/__init__.py on one device, and a few more."""

  T: int  # tokens of a microbatch
  L: int
  D: int
  V: int
  N: int
  I: int
  M: int  # rows that leave; by `all_gather` the tokens and answers of all
  R: int  # places for rows that come
  F: int
  a: int  # bytes of a number in the computation
  moe: int  # MoE layers
  pool: int  # numbers of the experts of one layer, gathered over fsdp


def plan(c: dict[str, Any], topology_: str) -> Plan:
  """The plan of a resolved config on a topology, in seconds.

  Raises:
    ValueError: one line; there is no such plan.
  """
  there = topology(topology_)
  c = {**c, 'mesh': parallel.filled(c['mesh'], there.devices)}
  where = mesh(c, there)
  kept, strategy = held(c, where), strategy_of(c, there)
  s = _sizes(c, where, strategy)
  params = kept.pools + kept.layers + kept.table
  return Plan(
    there,
    strategy,
    {'parameters': 4 * params, 'moments': kept.moments},
    _peak(c, kept, s, there.chip.platform),
    _traffic(c, kept, s, where, strategy),
  )


def strategy_of(c: dict[str, Any], there: Topology) -> str:
  """What `parallel.layout` will choose there."""
  name = parallel.choose(
    c['parallel']['strategy'],
    c['mesh']['expert'],
    c['model']['router'].get('k', 1),
    there.chip.platform,
  )
  chips = there.devices // there.slices // there.chip.devices
  refused = name == 'ragged' and chips > there.chip.ragged
  return 'all_to_all' if refused else name


def _sizes(c, where, strategy):
  m, axis = c['model'], where.shape
  T = c['batch_size'] * c['seq_len'] // where.size
  T //= c['optimizer']['accumulate']
  n, E = axis['expert'], m['E'] * m['layers_per_pool']
  factor, K = c['parallel']['buffer_factor'], m['router'].get('k', 1)
  come = T * axis['tensor']  # all meet each part of an expert
  M = R = round(come * K)
  most = n * come * min(K, E // n)
  if strategy == 'all_gather':
    R = most if factor is None else min(most, exact.ceil(factor, n * M))
    M = 2 * n * come
  elif strategy == 'ragged':
    R = most if factor is None else min(most, exact.ceil(factor, M))
  elif strategy == 'all_to_all':
    C = come if factor is None else min(come, exact.ceil(factor, M, E))
    M = R = E * C
  F = m['expert_F'] // axis['tensor']
  return _Sizes(
    T=T,
    L=c['seq_len'],
    D=m['D'],
    V=_ids(c),
    N=m['N'],
    I=m['iterations'],
    M=M,
    R=R,
    F=F,
    a=jnp.dtype(m['dtype']).itemsize,
    moe=models.config({**m, 'V': _ids(c)}).depth,
    pool=_matrices(m) * E // n * m['D'] * F,
  )


def _matrices(m):
  """Of an expert."""
  return 2 + ACTIVATIONS[m['activation']][1]


def _peak(c, kept, s, platform):
  """The largest of the moments at which a step was seen to be largest.

  A TPU's program makes copies of the layers' parameters in the dtype of the
  computation before the scans over layers, and keeps them as long as these run.
  So lives the gradient of the logits: that of the head is computed last.
  """
  layers = kept.pools + kept.layers
  copied = layers if platform == 'tpu' and s.a < 4 else 0
  table = s.a * s.V * s.D  # whole, or a gradient of it
  fed = _attention(c['model'], s)
  routed = {
    'receive buffers': 3 * s.a * s.R * s.D * s.I,
    'rows that leave': s.a * s.M * s.D * s.I,
    'hidden rows': 3 * s.a * s.R * s.F * s.I,
  }
  saved = s.a * s.T * s.D * s.N
  if not c['model']['remat']:
    saved += s.N * fed.kept + s.moe * sum(routed.values())
  gradients = 4 * (layers + kept.table)
  before = gradients if c['optimizer']['accumulate'] > 1 else 0
  through = {
    "weights in the computation's dtype": s.a * copied,
    'saved for the backward pass': saved,
    'gradients of the microbatches before': before,
  }
  backward = {
    **through,
    'gradients': 4 * layers,
    "the logits' gradient": s.a * s.T * s.V,
    'queries, keys and values': fed.kept,
    'gathered weights': s.a * kept.gathered // s.N,
  }
  moments = (
    {**through, 'logits': (4 + s.a) * s.T * s.V, 'the head': table},
    {**backward, **routed},
    {**backward, 'scores and gradients of keys': fed.scores},
    {
      'gradients': gradients + before,
      "the logits' gradient": s.a * s.T * s.V,
      "the tables' gradients": 2 * table,
    },
  )
  found = max(moments, key=lambda parts: sum(parts.values()))
  found = {what: n for what, n in found.items() if n}
  return {**found, 'gaps between them': sum(found.values()) // GAPS}


class _Attention(NamedTuple):
  """Bytes that a layer's gradient needs."""

  kept: int  # queries, keys, values and answers
  scores: int  # of a block, and each block's gradients of keys and values


def _attention(m, s):
  options, H = m['attention'], m['H']
  S = options.get('size') or s.D // H
  q, k, v, y = H * S, H * S, H * S, H * S
  if options['name'] == 'gqa':
    k = v = (options['num_kv_heads'] or H) * S
  elif options['name'] == 'mla':
    q = k = H * (options['nope'] + options['rope'])
    v = y = H * options['value']
  size = min(attention.block(s.L), s.L)
  blocks = -(-s.L // size)
  scores = (4 + s.a) * -(-s.T // s.L) * H * size * s.L
  pieces = s.a * s.T * (k + v) * (blocks + 1) // 2
  return _Attention(s.a * s.T * (q + k + v + y), scores + pieces)


def _traffic(c, kept, s, where, strategy):
  """By kind of collective, as compiled.collectives counts: of what, bytes.

  An expert is gathered for each pass over its layer; another matrix once more,
  for the gradient of what it was multiplied with. Gradients are summed in the
  dtype of the computation.
  """
  m, axis = c['model'], where.shape
  passes, parts = 1 + m['remat'], c['optimizer']['accumulate']
  gather, scatter, reduce, rows = {}, {}, {}, {}
  pools = s.a * s.pool * s.moe
  if axis['fsdp'] > 1:
    gather['experts'], scatter['experts'] = passes * pools, pools
  if kept.gathered:
    layers, tables = s.a * kept.gathered, s.a * s.V * s.D * 2
    gather['other layers'] = (passes + 1) * layers
    gather['embedding and head'] = tables
    scatter['other layers'], scatter['embedding and head'] = layers, tables
  if axis['data'] > 1:
    reduce['experts'] = pools // axis['fsdp']
    reduce['all others'] = s.a * (kept.layers + kept.table)
  # Rows, or tokens, of one way of all layers; each pass has two ways.
  way = s.moe * s.I * s.a * s.D
  if strategy == 'all_gather':
    gather['tokens'] = (passes + 1) * way * s.M // 2
    scatter['answers'] = way * s.M  # not computed again
  elif strategy == 'all_to_all':
    rows['all-to-all'] = {'rows': 2 * (passes + 1) * way * s.R}
  elif strategy == 'ragged':
    rows['ragged-all-to-all'] = {'rows': 2 * (passes + 1) * way * min(s.M, s.R)}
  found = {
    'all-gather': gather,
    'reduce-scatter': scatter,
    'all-reduce': reduce,
    **rows,
  }
  return {
    kind: {of: n * parts for of, n in what.items()}
    for kind, what in found.items()
    if what
  }


# --- how it is said -----------------------------------------------------------


def amount(n: float) -> str:
  """Bytes in the largest unit of which there is one."""
  if not n:
    return 'none'
  units = {'GiB': GIB, 'MiB': 2**20, 'KiB': 2**10}
  unit = next((u for u, size in units.items() if n >= size), 'KiB')
  return f'{n / units[unit]:.2f} {unit}'


def text(found: Plan) -> str:
  """The plan as aligned lines."""
  there, memory = found.there, found.there.chip.memory
  line = lambda what, n, deep=2: (
    f'{" " * deep}{what:{38 - deep}}{amount(n):>12}'
  )
  lines = [f'one of {there.devices} devices, strategy {found.strategy}']
  for parts in (found.state, found.step):
    lines += [line(what, n) for what, n in parts.items()]
  over = found.peak - memory
  fits = 'fits' if over <= 0 else f'does not fit by {amount(over)}'
  lines.append(f'peak {amount(found.peak)} of {amount(memory)}: {fits}')
  lines.append('it gives to collectives in a step')
  for kind, what in found.traffic.items():
    lines.append(line(kind, sum(what.values())))
    lines += [line(of, n, 4) for of, n in what.items()]
  return '\n'.join(lines)
