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
from jax.interpreters import partial_eval as pe


class Walk(NamedTuple):
  """One kernel's grid, step by step; S steps in the order they run."""

  name: str
  shapes: list[tuple[int, ...]]  # of the operands that are not prefetched
  outs: list[tuple[int, ...]]
  grid_SxG: np.ndarray  # the position of each step
  bytes_S: np.ndarray  # moved to and from HBM
  scalars: list[np.ndarray]  # the prefetched operands


def walk(f, *args):
  """The `Walk` of the only Pallas kernel that f(*args) calls, see `walks`."""
  (found,) = walks(f, *args)
  return found


def walks(f, *args):
  """A `Walk` of each Pallas kernel that f(*args) calls, in order.

  Args:
    f: a traceable function of arrays, or of trees of them.
    args: ShapeDtypeStructs for the operands; whatever the grids and the
      prefetched scalars depend on must be a numpy array.
  """
  calls = []
  known = [
    a if isinstance(a, np.ndarray) else None for a in jax.tree.leaves(args)
  ]
  jaxpr = jax.make_jaxpr(f)(*args)
  # What nobody uses, as the compiler will drop it.
  live, used = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  known = [value for value, use in zip(known, used, strict=True) if use]
  _run(live, jaxpr.consts, known, calls)
  return [_walk(*call) for call in calls]


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
  return Walk(
    name=eqn.params['name'],
    shapes=[b.array_aval.shape for b in mapping.block_mappings][
      : mapping.num_inputs
    ],
    outs=[v.aval.shape for v in eqn.outvars],
    grid_SxG=grid_SxG,
    bytes_S=count(blocks),
    scalars=scalars,
  )


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
  if array.shape[-1] == 1:  # in memory a row of one number has all lanes
    held_SxD[:, -1] = 128
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
    inner = next(filter(_is_jaxpr, eqn.params.values()), None)
    if eqn.primitive.name == 'pallas_call':
      calls.append((eqn, values))
      outs = [None] * len(eqn.outvars)
    elif all(v is not None for v in values):
      outs = eqn.primitive.bind(*values, **eqn.params)
      outs = outs if eqn.primitive.multiple_results else [outs]
    elif inner is not None:
      consts = getattr(inner, 'consts', [])
      outs = _run(getattr(inner, 'jaxpr', inner), consts, values, calls)
    else:
      outs = [None] * len(eqn.outvars)
    env.update(zip(eqn.outvars, outs, strict=True))
  return read(jaxpr.outvars)


def _is_jaxpr(p):
  return isinstance(p, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr))
