"""Where rows meet weights: the mesh, and the strategies that use it.

A strategy is (x_TxD, plan, experts) -> y_TxD. Routers, residual rules and
models never see the mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.plan import combine, dispatch, Plan

AXES = ('data', 'fsdp', 'expert')


def local(x_TxD: jax.Array, plan: Plan, experts: Callable) -> jax.Array:
  """All experts are here."""
  return combine(experts(dispatch(x_TxD, plan), plan.group_E), plan, len(x_TxD))


STRATEGIES = {'local': local}


def get(name: str) -> tuple[str, Callable]:
  """The strategy and the name it runs under; 'auto' chooses."""
  name = 'local' if name == 'auto' else name
  if name not in STRATEGIES:
    raise ValueError(
      f'no strategy {name!r}; there are auto, {", ".join(STRATEGIES)}'
    )
  return name, STRATEGIES[name]


def mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh over the first devices; axes are laid out in the order of AXES.

  Raises:
    ValueError: the axes need more devices than there are.
  """
  shape = [sizes[axis] for axis in AXES]
  devices = jax.devices()
  need = int(np.prod(shape))
  if need > len(devices):
    text = ' x '.join(
      f'{axis}={n}' for axis, n in zip(AXES, shape, strict=True)
    )
    raise ValueError(
      f'mesh {text} needs {need} devices, there are {len(devices)}'
    )
  return jax.sharding.Mesh(
    np.asarray(devices[:need]).reshape(shape),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> Any:
  """The batch on the devices, its rows split over every axis."""
  rows = jax.sharding.PartitionSpec(AXES)
  return jax.device_put(batch, jax.sharding.NamedSharding(mesh, rows))


def put_replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The tree, whole, on every device."""
  everywhere = jax.sharding.PartitionSpec()
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, everywhere))
