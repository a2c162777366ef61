"""Models: (batch, ctx) -> outputs, aux. One per file, found by its name.

A file here defines `Config`, a frozen dataclass, `build(config, layout, *,
rngs)`, an nnx.Module that has `updated_state(aux)`, `cost(model, length)`, and
`smallest(fields)`, sizes to try a config with before the data is read.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax import byname
from moe_jax.routers import RouterState


def get(name: str) -> ModuleType:
  """The module moe_jax/models/<name>.py; ValueError if there is none."""
  return byname.find(__name__, 'model', name)


def config(fields: dict[str, Any]) -> Any:
  """The Config of the model `name`, of its fields; raises as `initializer`."""
  values = dict(fields)
  return get(values.pop('name')).Config(**values)


def initializer(
  fields: dict[str, Any], layout: Any
) -> Callable[[jax.Array], nnx.Module]:
  """What makes a model of a uint32 seed.

  Args:
    fields: `name`, and the fields of that model's Config.
    layout: where its experts' rows and weights meet, a parallel.Layout.

  Raises:
    ValueError: there is no such model. What its parts refuse is raised when
      the answer is called.
    TypeError: the model has no such fields.
  """
  build, c = get(fields['name']).build, config(fields)

  def init(seed):
    return build(c, layout, rngs=nnx.Rngs(jax.random.key(seed)))

  return init


def abstract(init: Callable[[jax.Array], nnx.Module]) -> nnx.Module:
  """The shapes and types that it makes; no arrays. Raises what it raises.

  They are the same whatever JAX_ENABLE_X64 says.
  """
  with jax.enable_x64(False):
    return nnx.eval_shape(init, np.uint32(0))


def split(model: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
  """(params, router state) as nested dicts of arrays."""
  _, params, state = nnx.split(model, nnx.Param, RouterState)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def bind(
  like: nnx.Module, params: dict[str, Any], state: dict[str, Any]
) -> nnx.Module:
  """A model of the same structure with these parameters and router state."""
  graph, old_params, old_state = nnx.split(like, nnx.Param, RouterState)
  nnx.replace_by_pure_dict(old_params, params)
  nnx.replace_by_pure_dict(old_state, state)
  return nnx.merge(graph, old_params, old_state)
