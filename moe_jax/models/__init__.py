"""Models: (batch, ctx) -> outputs, aux. One per file, found by its name.

A file here defines `Config`, a frozen dataclass, `build(config, layout, *,
rngs)`, an nnx.Module that has `updated_state(aux)`, `cost(model, length)`, and
`smallest(fields)`, sizes to try a config with before the data is read.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from flax import nnx

from moe_jax.routers import RouterState


def get(name: str) -> ModuleType:
  """The module moe_jax/models/<name>.py; ValueError if there is none."""
  names = sorted(m.name for m in pkgutil.iter_modules(__path__))
  if name not in names:
    raise ValueError(f'no model {name!r}; there are {", ".join(names)}')
  return importlib.import_module(f'{__name__}.{name}')


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
