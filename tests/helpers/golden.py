"""What the golden checks share: files, weights, and how near is near enough."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention, blocks, config, models, parallel, routers, trunk
from moe_jax.plans import TokenChoice

DIRECTORY = pathlib.Path(
  os.environ.get('MOE_GOLDEN_DIR')
  or pathlib.Path(__file__).parents[1] / 'golden'
)

# jax.jit for what runs a few times: to compile takes nearly all of the time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

Params = dict[str, Any]
Table = Callable[[Params], dict[str, Any]]

# Of float64, of gradients with an auxiliary loss in them, of such losses, which
# the authors round to float32, and of float32.
TOL, TOL_AUX, TOL_LOSS, TOL_F32 = 1e-9, 1e-8, 1e-6, 2e-5


class Golden:
  """The arrays of one file, and a list of what was compared with them."""

  def __init__(self, path: pathlib.Path):
    with np.load(path, allow_pickle=False) as f:
      self.arrays = {name: f[name] for name in f.files}
    self.meta = json.loads(str(self.arrays.get('meta', '{}')))
    self.name = path.stem

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def prefixed(self, prefix: str) -> dict[str, np.ndarray]:
    """{'rest of the name': array} of the names that begin with the prefix."""
    cut = len(prefix)
    return {k[cut:]: v for k, v in self.arrays.items() if k.startswith(prefix)}


def near(
  found: Any, expected: np.ndarray, tol: float, *, scale: float | None = None
) -> None:
  """|found - expected| <= tol (|expected| + 1e-3 scale), in norms.

  Args:
    scale: for gradients the largest norm among the file's gradients; for other
      arrays their own norm.
  """
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape, (found.shape, expected.shape)
  norm = np.linalg.norm(expected.ravel())
  scale = norm if scale is None else scale
  error = np.linalg.norm((found - expected).ravel())
  assert error <= tol * (norm + 1e-3 * scale), (error, norm, scale)


def gradients_near(
  found: dict[str, Any], expected: dict[str, np.ndarray], tol: float
) -> None:
  """Every expected gradient, under its name, is near the one that was found."""
  assert found.keys() == expected.keys()
  scale = max(np.linalg.norm(g.ravel()) for g in expected.values())
  for name, gradient in expected.items():
    try:
      near(found[name], gradient, tol, scale=scale)
    except AssertionError as error:
      raise AssertionError(f'gradient {name}: {error}') from error


def dense(expert_TxK: Any, gate_TxK: Any, E: int) -> np.ndarray:
  """[T, E]: gates, zero for the experts that were not chosen."""
  expert_TxK, gate_TxK = np.asarray(expert_TxK), np.asarray(gate_TxK)
  out_TxE = np.zeros((len(expert_TxK), E), gate_TxK.dtype)
  np.put_along_axis(out_TxE, expert_TxK, gate_TxK, axis=1)
  return out_TxE


def log_softmax(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def build(
  name: str, fields: dict[str, Any], dtype: str, *, gmm: str = 'cpu', **sizes
) -> nnx.Module:
  """The model of that name with these fields, in `dtype`."""
  c = config.model(name, dtype=dtype, gmm=gmm, **fields).to_dict()
  return models.initializer({**c, **sizes}, parallel.Layout())(0)


def shapes(name: str, fields: dict[str, Any], **sizes) -> nnx.Module:
  """The model in float64 with parameters that are only shapes; see `start`."""
  return nnx.eval_shape(lambda: build(name, fields, 'float64', **sizes))


def layers(fields: dict[str, Any]) -> trunk.Trunk:
  """The layers of a decoder, in shapes as of `shapes`.

  They have XLA's own grouped matmul, which compiles in a third of the time of
  the CPU's kernel; some of the whole models have that one.
  """
  return shapes('decoder', fields, gmm='xla', V=1).trunk


def start(model: nnx.Module) -> Params:
  """Its params, all 0: drawing them takes longer than the rest of a check."""
  params, _ = models.split(model)
  return jax.tree.map(lambda a: np.zeros(a.shape), params)


class Nothing(nnx.Module):
  """Attention that answers 0; it has no parameters."""

  def __call__(self, x_BxLxD, view):
    del view
    return jnp.zeros_like(x_BxLxD)


class Identity(nnx.Module):
  """In place of a norm that the files do not have."""

  def __call__(self, x_BxLxD):
    return x_BxLxD


def without_attention(layers: trunk.Trunk) -> trunk.Trunk:
  """The layers with attention that answers 0: the files have none."""
  for segment in layers.segments().values():
    segment.moe.attention = Nothing()
    segment.moe.norm_attention = Identity()
  return layers


def context(B: int, L: int, *, train: bool = False, **changes) -> routers.Ctx:
  """The Ctx of a model that reads B rows of L tokens."""
  zeros_BxL = jnp.zeros((B, L), jnp.int32)
  row_B = jnp.arange(B, dtype=jnp.int32)
  batch = {'ids_BxL': zeros_BxL, 'pos_BxL': zeros_BxL, 'row_B': row_B}
  ctx = routers.context(batch, jax.random.key(0), 0, train=train)
  return ctx.replace(**changes)


def with_weights(
  params: Params, table: Table, arrays: dict[str, np.ndarray]
) -> tuple[Params, int]:
  """Params with the file's arrays in the places that the table reads.

  Also returns how many numbers of the params the table does not read.
  """
  leaves, tree = jax.tree.flatten(params)
  ends = np.cumsum([a.size for a in leaves])
  cut = lambda flat: jax.tree.unflatten(
    tree,
    [
      flat[end - a.size : end].reshape(a.shape)
      for a, end in zip(leaves, ends, strict=True)
    ],
  )
  # Where the table finds the numbers 0, 1, 2, ... is where it reads.
  places = table(cut(np.arange(ends[-1])))
  assert places.keys() == arrays.keys()
  flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in leaves])
  read = np.zeros(flat.shape, int)
  for name, place in places.items():
    assert place.shape == arrays[name].shape, name
    flat[place] = arrays[name]
    np.add.at(read, place, 1)
  assert read.max() == 1, 'the table reads a number twice'
  return cut(flat), int(np.sum(read == 0))


@dataclasses.dataclass
class Step:
  """What one (router, experts) step saw, said and answered."""

  h_TxD: np.ndarray
  gate_TxE: np.ndarray
  y_TxD: np.ndarray


@contextlib.contextmanager
def watched():
  """While it lasts, aux has `steps`: what each step saw, planned, answered."""
  routed = blocks.MoELayer.__call__

  def call(self, h0_TxD, memory, experts, spec, ctx):
    found = []

    def layout(h_TxD, plan, experts):
      y_TxD, overflow = spec.layout(h_TxD, plan, experts)
      found.append((h_TxD, plan, y_TxD))
      return y_TxD, overflow

    watching = dataclasses.replace(spec, layout=layout)
    h_TxD, memory, aux = routed(self, h0_TxD, memory, experts, watching, ctx)
    aux['steps'] = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return h_TxD, memory, aux

  with mock.patch.object(blocks.MoELayer, '__call__', call):
    yield


def unstacked(aux: list[dict[str, Any]]) -> list[Step]:
  """The steps of a model's aux in the order in which they were made."""
  found = []
  for segment in aux:
    steps = segment['steps']
    for i in np.ndindex(steps[0].shape[:3]):  # [G, R, I]
      h_TxD, plan, y_TxD = jax.tree.map(lambda a, i=i: np.asarray(a[i]), steps)
      found.append(Step(h_TxD, gates(plan), y_TxD))
  return found


def gates(plan: TokenChoice) -> np.ndarray:
  """gate_TxE, zero where an expert has not the token."""
  T, K = plan.expert_TxK.shape
  gate_TxE = np.zeros((T, plan.E + 1), plan.gate_TxK.dtype)
  token_TxK = np.broadcast_to(np.arange(T)[:, None], (T, K))
  np.add.at(gate_TxE, (token_TxK, plan.expert_TxK), plan.gate_TxK)
  return gate_TxE[:, : plan.E]


def view(B: int, L: int) -> attention.View:
  """Each row is one document."""
  segment_BxL = jnp.zeros((B, L), jnp.int32)
  return attention.View(segment_BxL, segment_BxL, causal=True)
