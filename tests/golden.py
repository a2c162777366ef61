"""What the golden checks share: files, weights, and how near is near enough."""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import config, models, parallel
from moe_jax import routers as routing

DIRECTORY = pathlib.Path(
  os.environ.get('MOE_GOLDEN_DIR') or pathlib.Path(__file__).parent / 'golden'
)

# jax.jit for what runs a few times: to compile takes nearly all of the time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


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


def dense(expert_TxK: Any, weight_TxK: Any, E: int) -> np.ndarray:
  """[T, E]: gates, zero for the experts that were not chosen."""
  expert_TxK, weight_TxK = np.asarray(expert_TxK), np.asarray(weight_TxK)
  out_TxE = np.zeros((len(expert_TxK), E), weight_TxK.dtype)
  np.put_along_axis(out_TxE, expert_TxK, weight_TxK, axis=1)
  return out_TxE


def build(name: str, fields: dict[str, Any], dtype: str, **sizes) -> nnx.Module:
  """The model of that name with these fields, in `dtype`, on the CPU kernel."""
  c = config.model(name, dtype=dtype, gmm='cpu', **fields).to_dict()
  module = models.get(c.pop('name'))
  return module.build(
    module.Config(**c, **sizes), parallel.local, rngs=nnx.Rngs(0)
  )


def context(B: int, L: int, *, train: bool = False, **changes) -> routing.Ctx:
  """The Ctx of a model that reads B rows of L tokens."""
  zeros_BxL = jnp.zeros((B, L), jnp.int32)
  row_B = jnp.arange(B, dtype=jnp.int32)
  batch = {'ids_BxL': zeros_BxL, 'pos_BxL': zeros_BxL, 'row_B': row_B}
  ctx = routing.context(batch, jax.random.key(0), 0, train=train)
  return ctx.replace(**changes)
