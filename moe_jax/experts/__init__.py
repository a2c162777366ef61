"""Kinds of experts, one a file, found by its name.

A file defines a class `Experts`: the E experts of a pool, of which each routed
row meets one. `{'name': 'mlp'}` in a config makes `mlp.Experts(E, D, F, ...)`;
the arguments are those of `mlp.Experts`, and options of its own.

  experts(rows_MxD, group_sizes_E) -> y_MxD   rows sorted by expert
  experts.routed(x_TxD, rows) -> y_TxD  with dispatch and combine, or absent

Parameters have the axis E first, `up_ExDxF`, so that meshes can cut them.
"""

from flax import nnx

from moe_jax import byname


def names() -> list[str]:
  """The kinds that exist."""
  return byname.names(__name__)


def get(name: str) -> type[nnx.Module]:
  """The kind of that name; ValueError without."""
  return byname.find(__name__, 'kind of experts', name).Experts
