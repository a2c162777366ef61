"""Where the first number is that is not finite: by name, line and layer.

A function is computed operation by operation, in the order in which it was
written, until one makes a bad number of good ones. Slow: for a run that ends.
"""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

_PACKAGE = str(pathlib.Path(__file__).parents[1])  # moe_jax


class _Found(Exception):
  """One line about the first bad number."""


def named(tree: Any) -> str | None:
  """The first array with a bad number, and where along its first axis.

  Returns None if all numbers of the tree are finite.
  """
  for path, a in jax.tree_util.tree_leaves_with_path(tree):
    if _bad(a):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      if a.ndim < 2:
        return name
      first = next(i for i in range(a.shape[0]) if _bad(a[i]))
      return f'{name}[{first}]'
  return None


def made(function: Callable, *args: Any) -> str | None:
  """The operation that first makes a bad number of good ones, or None.

  It is told by its place in this package, and by the steps of the loops around
  it, which are named by jax.named_scope. Infinite constants are good, as masks
  are made of them; a NaN that is written into an operation is not.
  """
  closed = jax.make_jaxpr(function)(*args)
  try:
    found = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args), ())
  except _Found as first:
    return str(first)
  return 'constants of the program' if any(map(_bad, found)) else None


def _run(jaxpr, consts, args, loops):
  """The values that a jaxpr makes; raises _Found."""
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)
  literal = jax.extend.core.Literal
  read = lambda v: v.val if isinstance(v, literal) else values[v]
  for eqn in jaxpr.eqns:
    found = _one(jaxpr, eqn, [read(v) for v in eqn.invars], loops)
    values |= zip(eqn.outvars, found, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _one(jaxpr, eqn, args, loops):
  if eqn.primitive.name == 'scan':
    return _scan(eqn, args, loops)
  inner = [p for p in map(_closed, eqn.params.values()) if p]
  if len(inner) == 1 and eqn.primitive.name in _CALLS:
    return _run(*inner[0], args, loops)
  found = _apply(jaxpr, eqn, args)
  literal = jax.extend.core.Literal
  made = [
    a
    for v, a in zip(eqn.invars, args, strict=True)
    if not isinstance(v, literal)
  ]
  new_nan = any(map(_nan, found)) and not any(map(_nan, made))
  new_infinity = any(map(_bad, found)) and not any(map(_bad, args))
  if new_nan or new_infinity:
    around = ''.join(f', {name} {i}' for name, i in loops)
    raise _Found(f'{eqn.primitive.name} in {_place(eqn)}{around}')
  return found


# Whose only jaxpr takes their arguments; others are one operation.
_CALLS = ('jit', 'closed_call', 'remat2', 'custom_jvp_call', 'custom_vjp_call')


def _apply(jaxpr, eqn, args):
  """What one operation makes, by a jaxpr that has no other."""
  core = jax.extend.core
  given = {
    v: a
    for v, a in zip(eqn.invars, args, strict=True)
    if not isinstance(v, core.Literal)
  }
  names = tuple('' for _ in given), tuple('' for _ in eqn.outvars)
  debug = jaxpr.debug_info._replace(arg_names=names[0], result_paths=names[1])
  alone = core.Jaxpr(
    (), list(given), eqn.outvars, [eqn], eqn.effects, debug_info=debug
  )
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def _closed(param):
  """(jaxpr, constants) of a parameter that is one, or else None."""
  if isinstance(param, jax.extend.core.ClosedJaxpr):
    return param.jaxpr, param.consts
  if isinstance(param, jax.extend.core.Jaxpr):
    return param, ()
  return None


def _scan(eqn, args, loops):
  """One iteration after another; scanned arrays have an axis more outside."""
  p, body = eqn.params, eqn.params['jaxpr'].jaxpr
  moves = lambda outer, inner: outer.aval.shape != inner.aval.shape
  carried = len(body.outvars) - sum(map(moves, eqn.outvars, body.outvars))
  fixed = len(args) - sum(map(moves, eqn.invars, body.invars)) - carried
  consts, carry = args[:fixed], args[fixed : fixed + carried]
  scanned, stacked = args[fixed + carried :], []
  scopes = re.findall(r'\w+', str(eqn.source_info.name_stack))
  name = scopes[-1] if scopes else 'step'
  order = list(range(p['length']))
  for i in reversed(order) if p['reverse'] else order:
    now = [*consts, *carry, *(a[i] for a in scanned)]
    found = _run(body, p['jaxpr'].consts, now, (*loops, (name, i)))
    carry = found[:carried]
    stacked.append(found[carried:])
  if p['reverse']:
    stacked.reverse()
  return [*carry, *(jnp.stack(column) for column in zip(*stacked, strict=True))]


def _place(eqn):
  """file:line of the operation in this package, and its innermost scope."""
  frames = eqn.source_info.traceback.frames
  here = [f for f in frames if f.file_name.startswith(_PACKAGE)]
  if not here:
    return 'jax'
  path = pathlib.Path(here[0].file_name).relative_to(_PACKAGE)
  return f'moe_jax/{path}:{here[0].line_num}'


def _nan(a):
  return _bad(a) and bool(jnp.isnan(a).any())


def _bad(a):
  if not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
    return False
  return not bool(jnp.isfinite(a).all())
