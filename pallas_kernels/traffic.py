"""Counts the bytes that a Pallas kernel moves, by walking its grid.

A block is fetched at the step at which its index changes, and written after
the last step before its index changes: what the compiler's pipeline does, and
what a kernel's own CostEstimate need not say.
"""

import itertools
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax._src.state import discharge


class Walk(NamedTuple):
  """One kernel's grid, step by step; S steps in the order they run."""

  grid_SxG: np.ndarray  # the position of each step
  bytes_S: np.ndarray  # moved to and from HBM
  scalars: list[np.ndarray]  # the prefetched operands


def walk(f, *args):
  """The `Walk` of the only Pallas kernel that f(*args) calls.

  Args:
    f: a traceable function of arrays.
    args: ShapeDtypeStructs for the operands; whatever the grid and the
      prefetched scalars depend on must be a numpy array.
  """
  calls = []
  known = [a if isinstance(a, np.ndarray) else None for a in args]
  jaxpr = jax.make_jaxpr(f)(*args)
  _run(jaxpr.jaxpr, jaxpr.consts, known, calls)
  (call,) = calls
  return _walk(*call)


def count(blocks):
  """bytes_S of blocks (index_SxD, bytes_S, written): one triple per operand."""
  total_S = 0
  for index_SxD, bytes_S, written in blocks:
    changes_S = np.any(index_SxD[1:] != index_SxD[:-1], axis=1)
    edge = np.ones(min(len(index_SxD), 1), bool)
    moves_S = (
      np.concatenate([changes_S, edge])
      if written
      else np.concatenate([edge, changes_S])
    )
    total_S = total_S + moves_S * bytes_S
  return total_S


def _walk(eqn, values):
  mapping = eqn.params['grid_mapping']
  if any(v is None for v in values[: -mapping.num_inputs]):
    raise ValueError('the grid or the scalars depend on abstract operands')
  bounds = iter(values[: mapping.num_dynamic_grid_bounds])
  grid = [
    int(d if isinstance(d, int) else next(bounds)) for d in mapping.grid
  ]  # fmt: skip
  scalars = values[mapping.num_dynamic_grid_bounds :]
  scalars = scalars[: mapping.num_index_operands]
  grid_SxG = np.array(
    list(itertools.product(*map(range, grid))), np.int32
  ).reshape(-1, len(grid))
  blocks = [
    _block(b, grid_SxG, scalars, written=i >= mapping.num_inputs)
    for i, b in enumerate(mapping.block_mappings)
  ]
  return Walk(grid_SxG, count(blocks), scalars)


def _block(mapping, grid_SxG, scalars, written):
  """(index_SxD, bytes_S, written) of one operand."""
  array = mapping.array_aval
  # An axis that the kernel does not see has blocks of one.
  shape = [
    d if isinstance(d, int) else getattr(d, 'block_size', 1)
    for d in mapping.block_shape
  ]
  # Reads of the prefetched scalars become plain indexing.
  pure = discharge.discharge_state(mapping.index_map_jaxpr)

  def index(step_G):
    args = [*step_G, *map(jnp.asarray, scalars)]
    return jnp.stack(jax.extend.core.jaxpr_as_fun(pure)(*args)[: len(shape)])

  index_SxD = np.asarray(jax.jit(jax.vmap(index))(grid_SxG))
  first_SxD = index_SxD * np.array(shape)
  # The last block of an axis may reach past the array's end.
  held_SxD = np.minimum(np.array(array.shape) - first_SxD, shape)
  return index_SxD, held_SxD.prod(axis=1) * array.dtype.itemsize, written


def _run(jaxpr, consts, args, calls):
  """Evaluates what depends on known values alone; None marks the others."""
  env = dict(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))

  def read(variables):
    literal = jax.extend.core.Literal
    return [v.val if isinstance(v, literal) else env[v] for v in variables]

  for eqn in jaxpr.eqns:
    values = read(eqn.invars)
    inner = next(
      (
        p
        for p in eqn.params.values()
        if isinstance(p, jax.extend.core.ClosedJaxpr)
      ),
      None,
    )
    if eqn.primitive.name == 'pallas_call':
      calls.append((eqn, values))
      outs = [None] * len(eqn.outvars)
    elif all(v is not None for v in values):
      outs = eqn.primitive.bind(*values, **eqn.params)
      outs = outs if eqn.primitive.multiple_results else [outs]
    elif inner is not None:
      outs = _run(inner.jaxpr, inner.consts, values, calls)
    else:
      outs = [None] * len(eqn.outvars)
    env.update(zip(eqn.outvars, outs, strict=True))
  return read(jaxpr.outvars)
