"""The contract of a router, for every file in moe_jax/routers/ unasked."""

import collections
import dataclasses
import functools
import json
import math
import shutil
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config, parallel, plans, routers, trunk
from moe_jax.experts.mlp import Experts
from moe_jax.training import jobs, loop
from tests.helpers import oracle, tiny
from tests.helpers.small import lines_of, small_config, without_clocks

B, L, D, E, F = 2, 12, 16, 4, 8
T = B * L

# Options to hold to the contract besides the defaults; a new router needs no
# entry.
VARIANTS = {
  'topk': [
    {'score': 'sigmoid', 'bias_rate': 0.1, 'scale': 2.5},
    {'renormalise': False, 'k': 3, 'bias': True},
    {'capacity': 0.5},
    {'capacity': 1.0, 'k': 1, 'group': 6},
    {'expert_groups': 2, 'score': 'sigmoid', 'bias_rate': 0.1, 'group_best': 2},
  ],
  'switch': [{'capacity': None}, {'jitter': 0.3, 'capacity': 0.5}],
  'expert_choice': [{'k': 1.5, 'group': 6}],
  'random': [{'k': 2, 'per': 'sequence'}, {'per': 'ensemble'}],
  'rexmoe': [{'first': 2, 'mask': 'neginf', 'renormalise': True}],
  'vmoe': [{'noise': 0.0, 'capacity': 0.5, 'group': 2 * L}],
}
# The draws that `random` is declared to make in evaluation too.
DRAWN = ('token', 'sequence', 'batch', 'position')
CASES = [
  (name, options)
  for name in routers.names()
  for options in [{}, *VARIANTS.get(name, [])]
]


def _id(case):
  name, options = case
  return '-'.join([name, *(f'{k}={v}' for k, v in options.items())])


@pytest.fixture(scope='module', params=CASES, ids=_id)
def case(request):
  """Each router in turn; of module scope, so that it is compiled once."""
  return request.param


class Decided(NamedTuple):
  """What a router says of tokens."""

  train: tuple  # plan, aux
  still: tuple  # the same out of training
  again: tuple  # the same as train, with its routing replayed
  grads: Any  # as those of Layer.grads, each gate weighted by its place


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """A router, as functions that are compiled once for all tests of a case.

  Attributes:
    router: abstract.
    params: numpy, its parameters.
    route: (params, x_TxD, ctx) -> plan, aux.
    decide: (params, x_TxD, ctx) -> Decided.
    grads: (params, x_TxD, ctx, r) -> plan, aux, and the gradients of
      <r, gates> + the router's losses for params and x_TxD.
    traces: how often `decide` was traced.
  """

  router: routers.Router
  params: dict
  route: collections.abc.Callable
  decide: collections.abc.Callable
  grads: collections.abc.Callable
  traces: list

  def run(self, x_TxD, ctx):
    """y_TxD, rows and aux, with the experts that all routers have."""
    plan, aux = self.decide(self.params, x_TxD, ctx).train
    return *_experts(_weights(), x_TxD, plan), jax.device_get(aux)


@jax.custom_vjp
def _worst_gmm(x_MxA, w_ExAxB, group_sizes_E):
  """A grouped matmul that leaves NaN in all that its contract leaves open."""
  x_MxA = jnp.where(_defined(group_sizes_E, x_MxA), x_MxA, 0)
  y_ExMxB = jnp.einsum('ma,eab->emb', x_MxA, w_ExAxB)
  return jnp.where(
    _defined(group_sizes_E, x_MxA), _own_rows(y_ExMxB, group_sizes_E), jnp.nan
  )


def _worst_gmm_bwd(saved, dy_MxB):
  x_MxA, w_ExAxB, group_sizes_E = saved
  x_MxA, dy_MxB = (
    jnp.where(_defined(group_sizes_E, x_MxA), a, 0) for a in (x_MxA, dy_MxB)
  )
  dx_ExMxA = jnp.einsum('mb,eab->ema', dy_MxB, w_ExAxB)
  dx_MxA = jnp.where(
    _defined(group_sizes_E, x_MxA), _own_rows(dx_ExMxA, group_sizes_E), jnp.nan
  )
  mine_ExM = _mine(group_sizes_E, len(x_MxA)).astype(x_MxA.dtype)
  return dx_MxA, jnp.einsum('em,ma,mb->eab', mine_ExM, x_MxA, dy_MxB), None


_worst_gmm.defvjp(lambda *args: (_worst_gmm(*args), args), _worst_gmm_bwd)


def _mine(group_sizes_E, M):
  """bool [E, M]: whether a row is of an expert."""
  end_Ex1 = jnp.cumsum(group_sizes_E, dtype=jnp.int32)[:, None]
  row_1xM = jnp.arange(M, dtype=jnp.int32)[None]
  return (row_1xM >= end_Ex1 - group_sizes_E[:, None]) & (row_1xM < end_Ex1)


def _own_rows(y_ExMxB, group_sizes_E):
  mine_ExM = _mine(group_sizes_E, y_ExMxB.shape[1])
  return jnp.sum(jnp.where(mine_ExM[..., None], y_ExMxB, 0), axis=0)


def _defined(group_sizes_E, x_MxA):
  return _mine(group_sizes_E, len(x_MxA)).any(axis=0)[:, None]


@functools.cache
def _layer(name, options):
  make = lambda: routers.get(name)(D, E, rngs=nnx.Rngs(0), **dict(options))
  router = nnx.eval_shape(make)
  graph, w, state = nnx.split(router, nnx.Param, ...)
  if state:
    state = jax.jit(lambda: nnx.state(make(), nnx.Not(nnx.Param)))()
  traces = []

  def route(params, x_TxD, ctx):
    nnx.replace_by_pure_dict(w, params)
    router = nnx.merge(graph, w, state)
    plan, aux, _ = router(x_TxD, ctx, router.memory(x_TxD))
    return plan, aux

  def grads(params, x_TxD, ctx, r=None):
    def objective(params, x_TxD):
      plan, aux = route(params, x_TxD, ctx)
      gate = _gate(plan)
      r_gate = _places(gate) if r is None else r
      return sum(aux['losses'].values(), jnp.vdot(r_gate, gate)), (plan, aux)

    slopes, decided = jax.grad(objective, (0, 1), has_aux=True)(params, x_TxD)
    return *decided, slopes

  def decide(params, x_TxD, ctx):
    traces.append(1)
    plan, aux, slopes = grads(params, x_TxD, ctx)
    still = route(params, x_TxD, ctx.replace(train=False))
    again = route(params, x_TxD, ctx.replace(replay=aux['route']))
    return Decided((plan, aux), still, again, slopes)

  params = _filled(nnx.to_pure_dict(w))
  return Layer(router, params, *map(jax.jit, (route, decide, grads)), traces)


def _of(case):
  name, options = case
  return _layer(name, tuple(options.items()))


def _filled(tree):
  draw = np.random.default_rng(1)
  fill = lambda a: draw.normal(0, 0.3, a.shape).astype(np.float32)
  return jax.tree.map(fill, tree)


def _places(a):
  return np.arange(a.size, dtype=a.dtype).reshape(a.shape)


def _gate(plan):
  return getattr(plan, _gate_name(plan))


def _gate_name(plan):
  return 'gate_TxK' if isinstance(plan, plans.TokenChoice) else 'gate_NxExC'


# The experts are the same for all routers, and are compiled once for all plans
# of the same sizes.


@functools.cache
def _abstract_experts():
  make = lambda: Experts(
    E, D, F, activation='swiglu', gmm=_worst_gmm, bias=True, rngs=nnx.Rngs(0)
  )
  return nnx.split(nnx.eval_shape(make))


@functools.cache
def _weights():
  return _filled(nnx.to_pure_dict(_abstract_experts()[1]))


@jax.jit
def _experts(weights, x_TxD, plan):
  """y_TxD, rows"""
  graph, w = _abstract_experts()
  nnx.replace_by_pure_dict(w, weights)
  y_TxD, _ = parallel.Layout()(x_TxD, plan, nnx.merge(graph, w))
  return y_TxD, plans.sort(plan)


@jax.jit
def _expert_grads(weights, x_TxD, plan, r_TxD):
  """y_TxD, and the gradients of <r, y> for weights, x_TxD and the gates."""

  def objective(weights, x_TxD, gate):
    changed = plan.replace(**{_gate_name(plan): gate})
    y_TxD, _ = _experts(weights, x_TxD, changed)
    return jnp.vdot(r_TxD, y_TxD), y_TxD

  slopes, y_TxD = jax.grad(objective, (0, 1, 2), has_aux=True)(
    weights, x_TxD, _gate(plan)
  )
  return y_TxD, slopes


_sort = jax.jit(plans.sort)


def _rows(plan):
  return jax.device_get(_sort(plan))


@functools.partial(jax.jit, static_argnums=3)
def _context(seed, microbatch, step, train):
  places_BxL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
  batch = {
    'ids_BxL': np.random.default_rng(2).integers(0, 9, (B, L), np.int32),
    'pos_BxL': places_BxL,
    'row_B': np.arange(B, dtype=np.int32),
  }
  ctx = routers.context(
    batch, jax.random.key(seed), step, train=train, microbatch=microbatch
  )
  return ctx.at(moe_layer=jnp.int32(1))


@functools.cache
def _ctx(seed=0, train=True, microbatch=0, step=0):
  return _context(*np.int32([seed, microbatch, step]), train)


def _x(seed=0):
  return np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)


def _experts_of_rows(rows):
  return np.repeat(np.arange(E), rows.group_sizes_E)


def _gates(rows):
  """gate_TxE in float64."""
  gate_TxE = np.zeros((T, E))
  for row, e in enumerate(_experts_of_rows(rows)):
    gate_TxE[rows.token_M[row], e] += float(rows.gate_M[row])
  return gate_TxE


def _experts_of_tokens(rows):
  """The sorted experts of each token."""
  experts = [[] for _ in range(T)]
  for row, e in enumerate(_experts_of_rows(rows)):
    experts[rows.token_M[row]].append(int(e))
  return [sorted(e) for e in experts]


def _draws(layer):
  """Whether its routing depends on the key."""
  a, b = (layer.run(_x(), _ctx(seed))[0] for seed in (0, 1))
  return not np.array_equal(a, b)


def test_aux_has_what_the_contract_says(case):
  layer = _of(case)
  _, rows, aux = layer.run(_x(), _ctx())
  assert {'load_E', 'dropped', 'route', 'entropy', 'losses'} <= set(aux)
  assert aux['load_E'].shape == (E,) and aux['load_E'].dtype == np.int32
  assert aux['route'].dtype == np.int32
  assert aux['dropped'].shape == aux['entropy'].shape == ()
  assert 0 <= aux['dropped'] <= 1 and 0 <= aux['entropy'] <= 1
  for name, loss in aux['losses'].items():
    assert loss.shape == () and loss >= 0, name
  assert 0 < layer.router.k <= E
  assert rows.gate_M.shape == rows.token_M.shape


def test_rows_are_grouped_and_none_is_lost(case):
  layer = _of(case)
  _, rows, aux = jax.device_get(layer.run(_x(), _ctx()))
  route = aux['route']
  if rows.row_TxK is None:  # of expert choice, places in groups of tokens
    first_Nx1x1 = np.arange(len(route))[:, None, None] * (T // len(route))
    route = (first_Nx1x1 + route).swapaxes(0, 1).reshape(E, -1)
  number = rows.group_sizes_E.sum()
  assert number <= len(rows.token_M)
  assert (rows.gate_M >= 0).all()
  token_choice = rows.row_TxK is not None
  wanted = collections.Counter()
  for i, j in np.ndindex(*route.shape):
    wanted[(i, route[i, j]) if token_choice else (route[i, j], i)] += 1
  found = collections.Counter(
    zip(rows.token_M.tolist(), _experts_of_rows(rows).tolist(), strict=False)
  )
  assert not found - wanted  # no row that was not chosen
  assert max(found.values()) == 1
  load_E = [sum(n for (_, e), n in wanted.items() if e == i) for i in range(E)]
  np.testing.assert_array_equal(aux['load_E'], load_E)  # before dropping
  if token_choice:
    fraction = 1 - number / wanted.total()
  else:
    fraction = 1 - len(set(rows.token_M.tolist())) / T
  np.testing.assert_allclose(aux['dropped'], fraction, atol=1e-6)


def test_layer_agrees_with_the_oracle(case):
  y_TxD, rows, _ = jax.device_get(_of(case).run(_x(), _ctx()))
  expected = oracle.moe_dense(_x(), _gates(rows), _weights())
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(y_TxD, expected, 1e-4, 1e-5)


def test_gradients_agree_with_the_oracle(case):
  """Slopes of the oracle; each expert's weights are a direction of their own.

  The routing is replayed, because a choice has no slope; gates, and what the
  router's own losses add, are recomputed in float64.
  """
  layer = _of(case)
  at = {'x': _x(), 'router': layer.params, 'experts': _weights()}
  at = jax.tree.map(np.float64, at)
  r_TxD = np.random.default_rng(3).normal(size=(T, D))

  def oracle_of(at):
    rows, aux, *_ = _replay(layer, at)
    y_TxD = oracle.moe_dense(at['x'], _gates(rows), at['experts'])
    return y_TxD, sum(aux['losses'].values())

  def value(at, toward, s):
    y_TxD, losses = oracle_of(jax.tree.map(lambda a, v: a + s * v, at, toward))
    return np.sum(r_TxD * y_TxD) + losses

  rows, aux, plan, _ = _replay(layer, at)
  with jax.enable_x64(True):
    found = _expert_grads(at['experts'], at['x'], plan, r_TxD)
  y_TxD, (d_experts, d_x_TxD, d_gate) = jax.device_get(found)
  *_, (d_router, d_x_through_gates_TxD) = _replay(layer, at, d_gate)
  # Nothing was narrowed on the way.
  for a in jax.tree.leaves(
    (y_TxD, d_x_TxD, d_x_through_gates_TxD, d_router, rows.gate_M)
  ):
    assert a.dtype == np.float64
  for number in (*aux['losses'].values(), aux['entropy']):
    assert number.dtype == np.float64
  np.testing.assert_allclose(y_TxD, oracle_of(at)[0], 1e-12, 1e-13)

  grads = {
    'x': d_x_TxD + d_x_through_gates_TxD,
    'router': d_router,
    'experts': d_experts,
  }
  for name, toward in _directions(at):
    expected = (value(at, toward, 1e-5) - value(at, toward, -1e-5)) / 2e-5
    products = jax.tree.map(lambda g, v: np.sum(g * v), grads, toward)
    found = sum(jax.tree.leaves(products))
    np.testing.assert_allclose(found, expected, 1e-5, 1e-7, err_msg=name)


@functools.cache
def _recorded(layer):
  """plan, aux"""
  return jax.device_get(layer.decide(layer.params, _x(), _ctx()).train)


def _replay(layer, at, r=None):
  """rows, aux, plan and gradients in float64, of the routing recorded."""
  plan, aux = _recorded(layer)
  ctx = _ctx().replace(replay=aux['route'])
  r = np.zeros(_gate(plan).shape) if r is None else r
  params, x_TxD = jax.tree.map(np.float64, (at['router'], at['x']))
  with jax.enable_x64(True):
    plan, aux, slopes = layer.grads(params, x_TxD, ctx, r)
    return jax.device_get((_sort(plan), aux, plan, slopes))


def _directions(at):
  """Names and random directions: x, router, and every expert's weights."""
  draw = np.random.default_rng(4)
  zero = jax.tree.map(np.zeros_like, at)
  some = lambda a: draw.normal(size=a.shape)
  yield 'x', {**zero, 'x': some(at['x'])}
  if at['router']:
    yield 'router', {**zero, 'router': jax.tree.map(some, at['router'])}
  for e in range(E):
    one = jax.tree.map(np.zeros_like, at['experts'])
    for a in jax.tree.leaves(one):
      a[e] = some(a[e])
    yield f'expert {e}', {**zero, 'experts': one}


@pytest.mark.parametrize('scale', [0.0, 1e3])
def test_gradients_are_finite_where_scores_are_extreme(case, scale):
  layer = _of(case)
  params = jax.tree.map(lambda a: scale * a, layer.params)
  grads = layer.decide(params, _x(), _ctx()).grads
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()


def test_permuted_tokens_are_routed_alike_where_declared(case):
  layer = _of(case)
  ctx = _ctx()
  order_BxL = np.stack(
    [np.random.default_rng(b).permutation(L) for b in (5, 6)]
  )
  order_T = (order_BxL + L * np.arange(B)[:, None]).reshape(-1)
  y_TxD = np.array(layer.run(_x(), ctx)[0])
  ids_T = np.array(ctx.ids_T)[order_T]
  moved_TxD = np.array(layer.run(_x()[order_T], ctx.replace(ids_T=ids_T))[0])
  differs = np.abs(moved_TxD - y_TxD[order_T]).max()
  if layer.router.equivariant:
    assert differs < 1e-5
  elif not _draws(layer):
    assert differs > 1e-2


# Padding is no token.


def _padding(pads):
  """bool [B, L + pads]: what is no padding, which may stand anywhere."""
  real_BxP = np.ones((B, L + pads), bool)
  real_BxP[0, np.random.default_rng(pads).permutation(L + pads)[:pads]] = False
  real_BxP[1, L:] = False
  return real_BxP


def _padded(a_TxX, real_BxP, fill):
  out = np.full((real_BxP.size, *a_TxX.shape[1:]), fill, a_TxX.dtype)
  out[real_BxP.reshape(-1)] = a_TxX
  return out


@functools.partial(jax.jit, static_argnames='train')
def _padded_ctx(real_BxP, ids_BxP, train=True):
  batch = {
    'ids_BxL': ids_BxP,
    'pos_BxL': jnp.cumsum(real_BxP, axis=1, dtype=jnp.int32) - 1,
    'segment_BxL': jnp.where(real_BxP, 0, -1),
    'row_B': np.arange(B, dtype=np.int32),
  }
  ctx = routers.context(batch, jax.random.key(0), jnp.int32(0), train=train)
  return ctx.at(moe_layer=jnp.int32(1))


def _with_padding(case, pads):
  """The same router, the tokens and the Ctx with so much padding a row.

  A group of several rows has as many of them.
  """
  name, options = case
  options = dict(options)
  if options.get('group') and options['group'] > L:
    options['group'] = options['group'] // L * (L + pads)
  real_BxP = _padding(pads)
  ids_BxP = _padded(np.array(_ctx().ids_T), real_BxP, 7).reshape(B, -1)
  x_PxD = _padded(_x(), real_BxP, 3.0)
  ctx = _padded_ctx(real_BxP, ids_BxP)
  return _of((name, options)), real_BxP.reshape(-1), x_PxD, ctx


def _gates_of(plan, tokens):
  """gate_TxE of a plan, and how many rows."""
  rows, gate_TxE = _rows(plan), np.zeros((tokens, E))
  expert_M = np.repeat(np.arange(E), rows.group_sizes_E)
  np.add.at(
    gate_TxE,
    (rows.token_M[: len(expert_M)], expert_M),
    rows.gate_M[: len(expert_M)],
  )
  return gate_TxE, rows.group_sizes_E


@pytest.mark.parametrize('pads', [6, 18])
def test_padding_is_no_token(case, pads):
  """It changes nothing for others, and has no rows."""
  plan, aux = _recorded(_of(case))
  layer, real_P, x_PxD, ctx = _with_padding(case, pads)
  padded, other = jax.device_get(layer.route(layer.params, x_PxD, ctx))
  gate_TxE, rows_E = _gates_of(plan, T)
  gate_PxE, padded_rows_E = _gates_of(padded, len(real_P))
  np.testing.assert_allclose(gate_PxE[real_P], gate_TxE, 1e-5, 1e-7)
  assert not gate_PxE[~real_P].any()
  np.testing.assert_array_equal(padded_rows_E, rows_E)
  if isinstance(plan, plans.TokenChoice):
    np.testing.assert_array_equal(other['route'][real_P], aux['route'])
    assert (other['route'][~real_P] == E).all()
  np.testing.assert_array_equal(other['load_E'], aux['load_E'])
  for name in ('dropped', 'entropy'):
    np.testing.assert_allclose(other[name], aux[name], 1e-5, 1e-7)
  assert other['losses'].keys() == aux['losses'].keys()
  for name, loss in aux['losses'].items():
    np.testing.assert_allclose(other['losses'][name], loss, 1e-5, err_msg=name)


def test_padding_has_no_slope(case):
  """And changes no other: of gates, each weighted by its token and expert."""
  layer = _of(case)
  weight_TxE = np.random.default_rng(8).normal(size=(T, E))
  at = {'x': _x(), 'router': layer.params}
  plan, aux = _recorded(layer)
  r = _by_gate(plan, aux['route'], weight_TxE)
  *_, (d_params, d_x_TxD) = _replay(layer, at, r)

  padded, real_P, x_PxD, ctx = _with_padding(case, 18)
  plan, aux = jax.device_get(padded.route(padded.params, x_PxD, ctx))
  weight_PxE = _padded(weight_TxE, real_P.reshape(B, -1), 0)
  r = _by_gate(plan, aux['route'], weight_PxE)
  ctx = ctx.replace(replay=aux['route'])
  params, x_PxD = jax.tree.map(np.float64, (layer.params, x_PxD))
  with jax.enable_x64(True):
    *_, found = padded.grads(params, x_PxD, ctx, r)
    other_params, d_x_PxD = jax.device_get(found)
  close = lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12)
  jax.tree.map(close, other_params, d_params)
  close(d_x_PxD[real_P], d_x_TxD)
  assert not d_x_PxD[~real_P].any()


def _by_gate(plan, route, weight_TxE):
  """The weight of each gate, by its token and its expert; 0 of none."""
  weight_TxE = np.pad(weight_TxE, ((0, 0), (0, 1)))
  if isinstance(plan, plans.TokenChoice):
    return np.take_along_axis(weight_TxE, route, axis=1)
  N, E_, _ = route.shape
  weight_NxPxE = np.pad(
    weight_TxE[:, :E_].reshape(N, plan.span, E_), ((0, 0), (0, 1), (0, 0))
  )
  return np.take_along_axis(weight_NxPxE.swapaxes(1, 2), route, axis=2)


def test_padding_alone_is_finite(case):
  """A batch without a token: nothing is chosen, and nothing is NaN."""
  layer, real_P, x_PxD, ctx = _with_padding(case, 18)
  ctx = ctx.replace(real_T=np.zeros_like(real_P))
  plan, aux = jax.device_get(layer.route(layer.params, x_PxD, ctx))
  assert not _rows(plan).group_sizes_E.any() and not aux['load_E'].any()
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(aux))


def test_later_tokens_matter_only_where_declared(case):
  layer = _of(case)
  y_TxD = np.array(layer.run(_x(), _ctx())[0])
  moved = 0.0
  for seed in (1, 2, 3):
    for cut in (3, 8):
      x_BxLxD = _x().reshape(B, L, D).copy()
      x_BxLxD[:, cut:] = _x(seed).reshape(B, L, D)[:, cut:]
      other_TxD = np.array(layer.run(x_BxLxD.reshape(T, D), _ctx())[0])
      before = np.s_[:, :cut]
      difference = (y_TxD - other_TxD).reshape(B, L, D)
      moved = max(moved, np.abs(difference[before]).max())
  if layer.router.causal:
    assert moved < 1e-6
  else:
    assert moved > 1e-2


def test_tokens_are_coupled_only_where_declared(case):
  """Out of training: whether one token moves the routing of another.

  A capacity of as many rows as there are tokens cannot.
  """
  layer, moved = _of(case), False
  ample = (getattr(layer.router, 'eval_capacity', 0) or 0) >= E
  scale = 5.0  # so that capacities drop something
  gates = lambda x_TxD: _gates_of(
    layer.decide(layer.params, x_TxD, _ctx()).still[0], T
  )[0]
  x_TxD = scale * np.abs(_x())
  expected_TxE = gates(x_TxD)
  for t in (0, 5, L + 1):
    other_TxD = x_TxD.copy()
    other_TxD[t] = -other_TxD[t]
    differs_T = np.abs(gates(other_TxD) - expected_TxE).max(axis=1) > 1e-6
    moved |= np.delete(differs_T, t).any()
  assert moved == (layer.router.coupled and not ample)


def test_same_key_same_plan(case):
  layer = _of(case)
  a, b = (layer.run(_x(), _ctx(seed=7)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_without_training_only_declared_randomness_is_left(case):
  """A router that draws in evaluation is `random`; no other does."""
  layer = _of(case)
  a, b = (
    _experts(
      _weights(), _x(), layer.decide(layer.params, _x(), _ctx(seed)).still[0]
    )[0]
    for seed in (0, 1)
  )
  draws = case[0] == 'random' and case[1].get('per', 'token') in DRAWN
  assert np.array_equal(a, b) != draws


def test_compiles_once(case):
  layer = _of(case)
  layer.run(_x(), _ctx())
  traced = len(layer.traces)
  for seed in (1, 2, 3):
    params = jax.tree.map(lambda a, s=seed: s * a, layer.params)
    layer.decide(params, _x(seed), _ctx(seed, step=seed))
  assert len(layer.traces) == traced


def test_a_recorded_routing_is_replayed_and_its_gates_recomputed(case):
  layer = _of(case)
  decided = layer.decide(layer.params, _x(), _ctx())
  # XLA may fuse the two differently, which moves a sum's last bit.
  near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(near, decided.train, decided.again)
  (here, aux, *_), (elsewhere, other, *_) = (
    _replay(layer, {'router': layer.params, 'x': x}) for x in (_x(), _x(9))
  )
  recorded = decided.train[1]['route']
  np.testing.assert_array_equal(aux['route'], recorded)
  np.testing.assert_array_equal(other['route'], recorded)
  assert _experts_of_tokens(here) == _experts_of_tokens(elsewhere)
  gates_move = not np.array_equal(here.gate_M, elsewhere.gate_M)
  one_gate = layer.router.k == 1 and getattr(layer.router, 'renormalise', False)
  assert gates_move == (case[0] != 'random' and not one_gate)


def test_recomputing_never_chooses_again(case):
  """Not under the rematerialisation of moe_jax/trunk.py."""
  layer = _of(case)

  def goal(params, x_TxD):
    plan, aux = layer.route(params, x_TxD, _ctx())
    gate = _gate(plan)
    return sum(aux['losses'].values(), jnp.vdot(_places(gate), gate))

  recomputing = trunk.remat(types.SimpleNamespace(remat=True), goal)
  keep, recompute = (
    tiny.primitives(jax.grad(f, (0, 1)), layer.params, _x())
    for f in (goal, recomputing)
  )
  assert recompute['top_k'] <= keep['top_k']


def test_bfloat16_tokens_are_routed_in_float32(case):
  layer = _of(case)
  plan, aux = layer.decide(layer.params, _x(), _ctx()).train
  x_TxD = _x().astype(jnp.bfloat16)
  low = jax.eval_shape(layer.route, layer.params, x_TxD, _ctx())
  dtypes = lambda tree: jax.tree.map(lambda a: a.dtype, tree)
  assert dtypes(low) == dtypes((plan, aux))
  y_TxD, _ = jax.eval_shape(_experts, _weights(), x_TxD, low[0])
  assert y_TxD.dtype == jnp.bfloat16


# What each router in particular decides.


def _route(case, x_TxD, train=True):
  """Rows and aux, of the router alone."""
  layer = _of(case)
  decided = layer.decide(layer.params, x_TxD, _ctx())
  plan, aux = decided.train if train else decided.still
  return jax.device_get((_sort(plan), aux))


def _logits(case, x_TxD):
  params = jax.tree.map(np.float64, _of(case).params)
  return np.float64(x_TxD) @ params['w_DxE'] + params.get('bias_logit_E', 0)


@pytest.mark.parametrize(
  'case', [c for c in CASES if c[0] in ('topk', 'switch')], ids=_id
)
def test_token_choice_follows_its_papers(case):
  name, options = case
  rows, aux = _route(case, _x(), train=not options.get('jitter'))
  k = options.get('k', 1 if name == 'switch' else 2)
  logits_TxE = _logits(case, _x())
  if options.get('score') == 'sigmoid':
    score_TxE = _sigmoid(logits_TxE)
    probs_TxE = score_TxE / score_TxE.sum(1, keepdims=True)
  else:
    score_TxE = probs_TxE = oracle.softmax(logits_TxE)
  choice_TxE = _of_best_groups(score_TxE, options)
  expert_TxK = np.array([oracle.best(score_E, k) for score_E in choice_TxE])
  np.testing.assert_array_equal(aux['route'], expert_TxK)
  gate_TxK = np.take_along_axis(score_TxE, expert_TxK, axis=1)
  if name == 'topk' and options.get('renormalise', True):
    gate_TxK /= gate_TxK.sum(1, keepdims=True)
  gate_TxK *= options.get('scale', 1.0)
  factor = options.get('capacity', 1.25 if name == 'switch' else None)
  kept_TxK = expert_TxK
  if factor is not None:
    group = options.get('group', L)
    capacity = math.ceil(factor * group * k / E)
    kept_TxK = oracle.keep(expert_TxK, E, capacity, group)
    dropped = (kept_TxK == E).sum()
    assert dropped > 0
    assert round(float(aux['dropped']) * T * k) == dropped
  gate_TxE = np.zeros((T, E + 1))
  np.put_along_axis(gate_TxE, kept_TxK, gate_TxK, axis=1)
  np.testing.assert_allclose(_gates(rows), gate_TxE[:, :E], 1e-5, 1e-6)
  share_E = np.bincount(expert_TxK.reshape(-1), minlength=E) / (T * k)
  np.testing.assert_allclose(
    aux['losses']['balance'], E * share_E @ probs_TxE.mean(0), 1e-5
  )
  z = np.mean(np.log(np.exp(logits_TxE).sum(1)) ** 2)
  np.testing.assert_allclose(aux['losses']['z'], z, 1e-5)


def _of_best_groups(score_TxE, options):
  """-inf where a token may not choose."""
  N, best = options.get('expert_groups', 1), options.get('group_best', 1)
  kept_TxE = np.full(score_TxE.shape, -np.inf)
  for score_E, kept_E in zip(score_TxE, kept_TxE, strict=True):
    groups = np.split(np.arange(E), N)
    value = np.array([np.sort(score_E[g])[-best:].sum() for g in groups])
    for n in oracle.best(value, options.get('groups_kept', 1)):
      kept_E[groups[n]] = score_E[groups[n]]
  return kept_TxE


@pytest.mark.parametrize('best', [1, 2])
def test_the_bias_has_a_say_in_which_groups_are_kept(best):
  """Of groups (0, 1) and (2, 3); gates are those of scores without it."""
  options = dict(expert_groups=2, group_best=best, score='sigmoid')
  route = _biased(renormalise=False, **options)
  score_TxE = _sigmoid(_x() @ _w_DxE())
  for bias_E in np.float32([[0, 0, 0, 0], [0.9, -0.5, 0, 0.3]]):
    plan, *_ = route(bias_E, _x())
    choice_TxE = _of_best_groups(score_TxE + bias_E, options)
    expert_T = np.argmax(choice_TxE, axis=1)
    np.testing.assert_array_equal(plan.expert_TxK[:, 0], expert_T)
    gate_T = score_TxE[np.arange(T), expert_T]
    np.testing.assert_allclose(plan.gate_TxK[:, 0], gate_T, 1e-5)
  one, two = (
    np.argmax(_of_best_groups(score_TxE, {**options, 'group_best': n}), axis=1)
    for n in (1, 2)
  )
  assert (one != two).any()


@pytest.mark.parametrize(
  'case', [c for c in CASES if c[0] == 'expert_choice'], ids=_id
)
def test_expert_choice_takes_the_best_tokens_of_each_group(case):
  group, k = case[1].get('group', L), case[1].get('k', 2)
  rows, aux = _route(case, _x())
  probs_TxE = oracle.softmax(_logits(case, _x()))
  capacity = math.ceil(group * k / E)
  gate_TxE = np.zeros((T, E))
  for start in range(0, T, group):
    for e in range(E):
      here = probs_TxE[start : start + group, e]
      for t in oracle.best(here, capacity):
        gate_TxE[start + t, e] = here[t]
  np.testing.assert_allclose(_gates(rows), gate_TxE, 1e-5, 1e-6)
  np.testing.assert_array_equal(aux['load_E'], [T // group * capacity] * E)
  assert aux['dropped'] == np.float32((gate_TxE.sum(1) == 0).mean())


def test_capacity_under_skew_drops_exactly_the_overflow():
  case = ('switch', {'capacity': None})
  x_TxD = np.broadcast_to(_x()[:1], (T, D))  # all want the same expert
  assert _route(case, x_TxD)[1]['dropped'] == 0
  rows, aux = _route(('switch', {}), x_TxD)
  capacity = math.ceil(1.25 * L / E)
  assert rows.group_sizes_E.sum() == B * capacity
  assert float(aux['dropped']) == pytest.approx(1 - capacity / L)
  assert aux['load_E'].max() == T
  assert float(aux['losses']['balance']) > 1.5


def test_sigmoid_gates_are_those_of_the_best_and_sum_to_the_scale():
  rows, _ = _route(('topk', VARIANTS['topk'][0]), _x())
  np.testing.assert_allclose(_gates(rows).sum(1), 2.5, 1e-5)


def test_bias_moves_choices_and_never_gates():
  route = _biased(score='sigmoid', renormalise=False)
  plain, *_ = route(np.zeros(E, np.float32), _x())
  assert (plain.expert_TxK != 2).any()
  plan, *_ = route(np.float32([0, 0, 5, 0]), _x())
  assert (plan.expert_TxK == 2).all()
  gate_T = _sigmoid(_x() @ _w_DxE())[:, 2]
  np.testing.assert_allclose(plan.gate_TxK[:, 0], gate_T, 1e-5)


def test_bias_update_moves_the_load_towards_balance():
  x_TxD = _x() + 2 * _w_DxE()[:, 0]  # expert 0 is loved
  route = _biased(score='sigmoid', renormalise=False)
  bias_E = np.zeros(E, np.float32)
  loads = []
  for _ in range(61):
    bias_before_E = bias_E
    _, aux, bias_E = route(bias_E, x_TxD)
    loads.append(np.array(aux['load_E']))
  assert bias_before_E[0] == bias_before_E.min() < 0
  assert loads[0].max() > 0.7 * T
  assert loads[-1].max() < 0.5 * T


def _biased(**options):
  """(bias_E, x_TxD) -> plan, aux and the next bias, of a top-1 router."""
  return _biased_of(tuple(options.items()))


@functools.cache
def _biased_of(options):
  make = lambda: routers.get('topk')(
    D, E, k=1, bias_rate=0.02, rngs=nnx.Rngs(0), **dict(options)
  )
  graph, params, state = nnx.split(
    nnx.eval_shape(make), nnx.Param, routers.RouterState
  )

  @jax.jit
  def route(bias_E, x_TxD):
    nnx.replace_by_pure_dict(params, {'w_DxE': _w_DxE()})
    nnx.replace_by_pure_dict(state, {'bias_E': bias_E})
    router = nnx.merge(graph, params, state)
    plan, aux, _ = router(x_TxD, _ctx(), ())
    return plan, aux, router.update({'bias_E': bias_E}, aux['load_E'])['bias_E']

  return route


def _w_DxE():
  return _filled({'w_DxE': np.zeros((D, E))})['w_DxE']


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_without_a_rate_there_is_no_state():
  router = _of(('topk', {})).router
  assert not jax.tree.leaves(nnx.state(router, routers.RouterState))
  assert router.update({}, np.ones(E)) == {}


def test_torch_init_is_uniform_up_to_the_root_of_the_width():
  def made(init):
    router = routers.get('topk')(
      256, 64, bias=True, init=init, rngs=nnx.Rngs(0)
    )
    return router.w_DxE[...], router.bias_logit_E[...]

  torch, normal = jax.device_get(
    jax.jit(lambda: (made('torch'), made('normal')))()
  )
  for param in torch:
    assert 0.9 / 16 < np.abs(param).max() <= 1 / 16
  assert np.std(torch[0]) == pytest.approx(3**-0.5 / 16, 0.02)
  assert np.std(normal[0]) == pytest.approx(0.02, 0.02)
  assert not normal[1].any()


@pytest.mark.parametrize('jitter', [0.01, 0.1])
def test_jitter_of_bfloat16_keeps_its_bounds_and_mean(jitter, monkeypatch):
  seen, logits = [], routers.logits
  monkeypatch.setattr(
    routers, 'logits', lambda x, w: seen.append(x) or logits(x, w)
  )
  router = routers.get('switch')(512, E, jitter=jitter, rngs=nnx.Rngs(0))
  router(jnp.ones((T, 512), jnp.bfloat16), _ctx(), ())
  drawn = np.float64(seen[0])
  assert np.abs(drawn - 1).max() <= jitter * (1 + 1e-5)
  assert abs(drawn.mean() - 1) < 4 * jitter / math.sqrt(3 * drawn.size)


def test_jitter_is_drawn_in_training_alone():
  case = ('switch', VARIANTS['switch'][1])
  still, _ = _route(case, _x(), train=False)
  moved, _ = _route(case, _x())
  assert not np.array_equal(still.gate_M, moved.gate_M)


# What shares a draw of the random router.


def _drawn(ctx, **options):
  """[B, L, k]: the experts that `random` draws."""
  _, aux = _of(('random', options)).route({}, _x(), ctx)
  return np.array(aux['route']).reshape(B, L, -1)


def test_random_draws_distinct_experts():
  drawn = _drawn(_ctx(), k=3)
  assert all(len(set(chosen)) == 3 for chosen in drawn.reshape(T, 3).tolist())


def test_random_is_uniform():
  drawn = np.stack([_drawn(_ctx(seed), k=1) for seed in range(12)])
  share_E = np.bincount(drawn.reshape(-1), minlength=E) / drawn.size
  assert np.abs(share_E - 1 / E).max() < 5 * math.sqrt(1 / E / drawn.size)


def test_random_per_token_differs_between_tokens_and_rows():
  drawn = _drawn(_ctx(), k=3)
  assert len({tuple(c) for c in drawn[0].tolist()}) > 2
  assert not np.array_equal(drawn[0], drawn[1])


def test_random_per_sequence_is_one_draw_for_each_row():
  rows = [_drawn(_ctx(seed), k=2, per='sequence') for seed in range(4)]
  for drawn in rows:
    assert (drawn == drawn[:, :1]).all()
  assert any((drawn[0] != drawn[1]).any() for drawn in rows)


def test_random_per_batch_is_one_draw_for_each_microbatch():
  drawn = [
    _drawn(_ctx(seed, microbatch=m), k=2, per='batch')
    for seed, m in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))
  ]
  assert all((d == d[:1, :1]).all() for d in drawn)
  firsts = [tuple(d[0, 0]) for d in drawn]
  assert len(set(firsts[:3])) > 1 and len(set(firsts[2:])) > 1


def test_random_per_position_is_one_draw_for_each_place():
  drawn = [_drawn(_ctx(seed), k=2, per='position') for seed in range(2)]
  assert (drawn[0] == drawn[0][:1]).all()
  assert len({tuple(c) for c in drawn[0][0].tolist()}) > 2
  assert (drawn[0] != drawn[1]).any()
  other = _drawn(_ctx(microbatch=1), k=2, per='position')
  np.testing.assert_array_equal(other, drawn[0])


def test_fixed_and_ensemble_draw_nothing():
  assert (_drawn(_ctx(), per='fixed', fixed=2) == 2).all()
  rows, aux = _route(('random', {'per': 'ensemble'}), _x())
  assert (np.sort(aux['route']) == np.arange(E)).all()
  np.testing.assert_array_equal(rows.group_sizes_E, [T] * E)
  np.testing.assert_array_equal(rows.gate_M, np.float32(1 / E))
  assert _of(('random', {'per': 'ensemble'})).router.k == E


def test_evaluation_may_draw_otherwise():
  options = {'per': 'batch', 'eval_per': 'ensemble'}
  assert _drawn(_ctx(), **options).shape == (B, L, 1)
  assert _drawn(_ctx(train=False), **options).shape == (B, L, E)
  options = {'per': 'batch', 'eval_per': 'token'}
  as_token = _drawn(_ctx(train=False), per='token')
  np.testing.assert_array_equal(_drawn(_ctx(train=False), **options), as_token)


@pytest.mark.parametrize(
  'options', [{'k': 3}, {'k': 2, 'per': 'sequence'}], ids=['token', 'sequence']
)
def test_a_row_draws_the_same_wherever_it_lies_in_the_batch(options):
  ctx = _ctx()
  swapped = ctx.replace(row_T=np.array(ctx.row_T)[::-1])
  drawn = _drawn(ctx, **options)
  np.testing.assert_array_equal(_drawn(swapped, **options), drawn[::-1])


def test_layers_steps_and_passes_draw_anew():
  base = _ctx()
  first = _drawn(base, k=3)
  for other in (base.at(moe_layer=jnp.int32(2)), _ctx(step=1), _ctx(seed=1)):
    assert not np.array_equal(first, _drawn(other, k=3))


def test_keys_of_a_step_are_those_of_its_parts():
  """step_key is the same for all microbatches and passes, key is not."""
  batch = {
    'ids_BxL': np.zeros((1, 2), np.int32),
    'pos_BxL': np.zeros((1, 2), np.int32),
    'row_B': np.zeros(1, np.int32),
  }
  make = functools.partial(
    routers.context, batch, jax.random.key(0), 3, train=True
  )
  data = lambda key: tuple(np.asarray(jax.random.key_data(key)).tolist())
  made = [make(), make(pass_=1), make(microbatch=1)]
  assert len({data(c.step_key) for c in made}) == 1
  assert len({data(c.batch_key) for c in made}) == 3
  assert data(made[0].key) == data(made[2].key) != data(made[1].key)


# Names and options.


def test_every_router_is_found_by_its_file():
  known = {'topk', 'switch', 'expert_choice', 'random', 'rexmoe', 'vmoe'}
  assert known <= set(routers.names())
  for name in routers.names():
    assert issubclass(routers.get(name), routers.Router)


def test_an_unknown_router_is_named():
  with pytest.raises(ValueError, match=r"no router 'topkk'.*switch.*topk"):
    routers.get('topkk')


# A router of a user's own: a class that a name with a dot imports.

OWN = """
from moe_jax import routers
from moe_jax.routers import topk

class First(topk.Router):
  def __init__(self, D, E, *, k: int = 1, temperature: float = 2.0, rngs):
    super().__init__(D, E, k=k, rngs=rngs)
    self.temperature = temperature

  def __call__(self, x_TxD, ctx, memory):
    if self.temperature != 1:
      x_TxD = x_TxD / self.temperature
    return super().__call__(x_TxD, ctx, memory)

def Function(D, E): pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A folder on Python's path with routers in a module and in a package."""
  files = {
    'own_first.py': OWN,
    'own_package/__init__.py': '',
    'own_package/deep.py': OWN,
    'own_lacks.py': 'import own_that_is_not_there',
    'own_broken.py': '1 / 0',
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in [n for n in sys.modules if n.startswith('own_')]:
    del sys.modules[name]


@pytest.mark.parametrize('module', ['own_first', 'own_package.deep'])
def test_a_name_with_a_dot_is_a_class_of_a_module(own, module):
  found = routers.get(f'{module}.First')
  assert (found.__module__, found.__name__) == (module, 'First')
  c = config.default()
  c.model.router = config.router(f'{module}.First', temperature=3.0)
  assert config.resolve(c)['model']['router'] == {
    'name': f'{module}.First',
    'k': 1,
    'temperature': 3.0,
  }
  with pytest.raises(ValueError, match=rf'{module}.First has no option'):
    config.router(f'{module}.First', heat=1.0)


def test_a_router_of_ones_own_trains_and_goes_on(own, corpus):
  c = small_config(corpus, checkpoint_every=3)
  c.model.router = config.router('own_first.First', k=2, temperature=1.0)
  workdir = own / 'run'
  prepared = jobs.prepare(c, str(workdir))
  (router,) = {
    type(module): module
    for _, module in nnx.iter_modules(prepared.model)
    if isinstance(module, routers.Router)
  }.values()
  assert type(router).__module__ == 'own_first' and router.temperature == 1.0
  first = loop.run(prepared)
  assert jobs.prepare(c, str(workdir)) is None  # it has finished
  lines = lines_of(workdir)
  assert first['eval_loss'] < first['initial_loss']
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['model']['router'] == c.model.router.to_dict()
  shutil.rmtree(workdir / 'checkpoints' / '6')
  (workdir / 'summary.json').unlink()
  more = loop.run(jobs.prepare(c, str(workdir)))
  steps = [line['step'] for line in lines_of(workdir) if 'loss' in line]
  assert steps == [1, 2, 3, 4, 5, 6]
  assert without_clocks(lines_of(workdir)) == without_clocks(lines)
  assert more['eval_loss'] == first['eval_loss']
  c.model.router = config.router('topk', k=2)
  with pytest.raises(ValueError, match=r"'own_first\.First' -> 'topk'"):
    jobs.prepare(c, str(workdir))


@pytest.mark.parametrize(
  'name, told',
  [
    ('own_frist.First', "no module 'own_frist' on"),
    ('own_package.depp.First', "no module 'own_package.depp' on"),
    ('own_first.deep.First', "no module 'own_first.deep' on"),
    ('own_first.Frist', "own_first has no class 'Frist'"),
    ('own_package.deep', "own_package has no class 'deep'"),
    ('own_first.Function', "own_first has no class 'Function'"),
    ('own_first.', 'that is not MODULE.CLASS'),
    ('.own_first.First', 'that is not MODULE.CLASS'),
    ('own first.py', 'that is not MODULE.CLASS'),
    ('own_first', 'one of your own is MODULE.CLASS'),
  ],
)
def test_a_name_with_a_dot_that_is_no_router_is_one_line(own, name, told):
  with pytest.raises(ValueError, match=told) as raised:
    routers.get(name)
  assert repr(name) in str(raised.value) and '\n' not in str(raised.value)


def test_what_a_router_itself_raises_is_not_hidden(own):
  with pytest.raises(ZeroDivisionError):
    routers.get('own_broken.Router')
  with pytest.raises(ModuleNotFoundError, match='own_that_is_not_there'):
    routers.get('own_lacks.Router')


def test_options_and_their_types():
  assert config.router('switch').to_dict() == {
    'name': 'switch',
    'capacity': 1.25,
    'group': None,
    'jitter': 0.0,
  }
  topk = config.router('topk')
  assert topk.capacity is None
  assert topk.get_type('capacity') is float
  assert topk.get_type('group') is int


@pytest.mark.parametrize(
  'name, options, told',
  [
    ('topk', {'k': 5}, 'k is 5, .* 4 experts'),
    ('topk', {'k': 0}, 'k=0 is not'),
    ('topk', {'capacity': 0.0}, 'capacity=0.0 is not'),
    ('topk', {'capacity': -1.5}, 'capacity=-1.5 is not'),
    ('topk', {'capacity': 1.0, 'group': 0}, 'group=0 is not'),
    ('topk', {'score': 'tanh'}, "'tanh'"),
    ('topk', {'expert_groups': 3}, 'expert_groups=3 does not divide 4'),
    ('topk', {'expert_groups': 2, 'k': 3}, 'groups_kept=1 of 2 .* k is 3'),
    ('topk', {'expert_groups': 2, 'groups_kept': 3}, 'groups_kept=3 of 2'),
    ('topk', {'expert_groups': 2, 'group_best': 3}, 'group_best=3'),
    ('switch', {'capacity': 0.0}, 'capacity=0.0 is not'),
    ('switch', {'jitter': 1.0}, r'jitter=1.0 is not a float in \[0, 1\)'),
    ('expert_choice', {'k': 4.5}, 'k is 4.5, .* 4 experts'),
    ('expert_choice', {'group': 0}, 'group=0 is not'),
    ('random', {'k': 5}, 'k is 5, .* 4 experts'),
    ('random', {'per': 'year'}, "'year'"),
    ('random', {'eval_per': 'year'}, "eval_per='year'; there are token"),
    ('random', {'k': 2, 'per': 'fixed'}, "k is 2, but per='fixed'"),
    ('random', {'k': 2, 'eval_per': 'ensemble'}, "eval_per='ensemble'"),
    ('random', {'per': 'fixed', 'fixed': 4}, 'fixed is 4, .* 4 experts'),
    ('topk', {'init': 'zero'}, "'zero'"),
  ],
)
def test_options_that_no_router_could_follow_are_refused(name, options, told):
  with pytest.raises(ValueError, match=told):
    routers.get(name)(D, E, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
  'factor, group, k, expected',
  [
    (1.0, 12, 2, 6),
    (1.25, 12, 1, 4),
    (0.01, 12, 1, 1),
    (None, 12, 2, None),
    (1.1, 40, 1, 11),  # the float is a little above 1.1
    (1.1, 20, 2, 11),
    (0.3, 40, 1, 3),
  ],
)
def test_capacity_is_a_factor_on_the_mean_load(factor, group, k, expected):
  assert routers.capacity_rows(factor, group, k, E) == expected
