"""The strategy `fused` against `local` and the dense oracle; what it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benches.fused import layers, saved, seconds
from moe_jax import ops, parallel, plans
from moe_jax.experts.mlp import ACTIVATIONS, Experts
from pallas_kernels import cpu
from pallas_kernels.shapes import CASES
from tests.helpers import oracle
from tests.kernels import gmm_test
from tests.layers import parallel_test

T, D, F, E, K = 24, 8, 6, 5, 3
GROUP, C = 8, 2  # where experts choose
EMPTY = 2  # nobody chooses this expert


def _poisoned(impl):
  """Products with NaN in all rows that they leave undefined."""
  found = ops.products(impl)

  def past(group_sizes_E, *arrays):
    row_M = jnp.arange(len(arrays[0]), dtype=jnp.int32)
    own_M = row_M < jnp.sum(group_sizes_E, dtype=jnp.int32)
    own = lambda a: own_M.reshape(-1, *[1] * (a.ndim - 1))
    return tuple(jnp.where(own(a), a, jnp.nan) for a in arrays)

  def fwd(x, ws, group_sizes_E, token_M=None):
    return past(group_sizes_E, *found.fwd(x, ws, group_sizes_E, token_M))

  def dlhs(dys, ws, group_sizes_E, token_M=None):
    return past(group_sizes_E, found.dlhs(dys, ws, group_sizes_E, token_M))[0]

  def up_and_activate(
    activation, x, ws, group_sizes_E, biases=(), token_M=None
  ):
    hidden, pre = found.up_and_activate(
      activation, x, ws, group_sizes_E, biases, token_M
    )
    hidden, *pre = past(group_sizes_E, hidden, *pre)
    return hidden, tuple(pre)

  def down_vjp(activation, dy, w, pre, gate_M, group_sizes_E, token_M=None):
    args = dy, w, pre, gate_M, group_sizes_E, token_M
    d_pre, hidden, d_gate_M = found.down_vjp(activation, *args)
    *d_pre, hidden, d_gate_M = past(group_sizes_E, *d_pre, hidden, d_gate_M)
    return tuple(d_pre), hidden, d_gate_M

  return ops.Products(fwd, dlhs, found.drhs, up_and_activate, down_vjp)


PRODUCTS = {
  'cpu': lambda: _poisoned('cpu'),
  'gmm': lambda: ops.by_gradients(parallel_test._worst_gmm),
  'xla': lambda: ops.products('xla'),
  'interpret': lambda: _poisoned('interpret'),
}


@functools.cache
def _made(activation, bias, products):
  make = lambda: Experts(
    *(E, D, F),
    activation=activation,
    bias=bias,
    gmm=parallel_test._worst_gmm,
    products=PRODUCTS[products](),
    rngs=nnx.Rngs(0),
  )
  return nnx.split(nnx.eval_shape(make))


def _arguments(activation='swiglu', bias=True):
  """What gradients are taken of, in float64; experts of different scale."""
  draw = np.random.default_rng(0)
  state = nnx.to_pure_dict(_made(activation, bias, 'cpu')[1])
  scale_E = 10.0 ** np.arange(-2, E - 2)
  weigh = lambda a: scale_E.reshape(E, *[1] * (a.ndim - 1))
  weights = {
    k: draw.normal(0, 0.5, a.shape) * (weigh(a) if k.startswith('down') else 1)
    for k, a in state.items()
  }
  return {
    'weights': weights,
    'x_TxD': draw.normal(size=(T, D)),
    'gate_TxK': draw.random((T, K)),
    'gate_NxExC': draw.random((T // GROUP, E, C)),
  }


def _choices():
  """Ids, of which some are E, and places; no token chooses EMPTY."""
  draw = np.random.default_rng(1)
  others = np.delete(np.arange(E), EMPTY)
  expert_TxK = np.array([draw.permutation(others)[:K] for _ in range(T)])
  expert_TxK[draw.random((T, K)) < 0.3] = E
  expert_TxK[:2] = E  # tokens without an expert
  places = [draw.permutation(GROUP)[:C] for _ in range(T // GROUP * E)]
  place_NxExC = np.reshape(places, (T // GROUP, E, C))
  return expert_TxK.astype(np.int32), place_NxExC.astype(np.int32)


def _answer(strategy, made, args, chosen, n):
  """[y_TxD of a plan by token, and of one by expert], n of them"""
  graph, state = made
  nnx.replace_by_pure_dict(state, args['weights'])
  module, (expert_TxK, place_NxExC) = nnx.merge(graph, state), chosen
  layout = parallel.Layout(strategy=strategy)
  made_plans = (
    plans.by_token(expert_TxK, args['gate_TxK'], E),
    plans.ExpertChoice(place_NxExC, args['gate_NxExC'], GROUP),
  )
  return [layout(args['x_TxD'], plan, module)[0] for plan in made_plans[:n]]


@functools.cache
def _program(strategy, activation, bias, products, n=2):
  """(args, chosen, [dy_TxD, ...]) -> answers, gradients"""
  made = _made(activation, bias, products)

  def run(args, chosen, dys):
    of = lambda args: _answer(strategy, made, args, chosen, n)
    ys, pull = jax.vjp(of, args)
    return ys, pull(dys)[0]

  return jax.jit(run)


def _dys(dtype=np.float64):
  r_TxD = np.random.default_rng(2).normal(size=(T, D)).astype(dtype)
  return [r_TxD, r_TxD[::-1]]


@functools.cache
def _expected(activation, bias, n=2):
  """(answers, gradients) of `local`, of n plans."""
  with jax.enable_x64(True):
    run = _program('local', activation, bias, 'gmm')
    dys = [dy * (i < n) for i, dy in enumerate(_dys())]
    ys, slopes = run(_arguments(activation, bias), _choices(), dys)
    return jax.device_get((ys[:n], slopes))


def _same(found, expected, tolerance):
  """By array, and of a weight by expert, relative to the largest there."""

  def one(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = np.float64(a), np.float64(b)
    axes = tuple(range(1, a.ndim)) if len(a) == E else None
    error, size = np.max(abs(a - b), axes), np.max(abs(b), axes)
    assert np.all(error <= tolerance * size), error / size

  jax.tree.map(one, found, expected)


# Whose products, and biases; of the others 'gmm' and with biases.
FORMS = {
  'swiglu': ('cpu', True),
  'gelu': ('xla', True),
  'relu': ('gmm', False),
}


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_is_local_in_values_and_gradients(activation):
  """And answers as the loops; who has no rows has exactly no gradient."""
  products, bias = FORMS.get(activation, ('gmm', True))
  with jax.enable_x64(True):
    args = _arguments(activation, bias)
    run = _program('fused', activation, bias, products)
    found = jax.device_get(run(args, _choices(), _dys()))
    _same(found, _expected(activation, bias), 1e-12)
    np.testing.assert_allclose(found[0], _loops(args, activation), 1e-12, 1e-12)
    assert not found[0][0][:2].any()
    # Of the plan by token alone, as where experts choose all have rows.
    dys = [np.ones((T, D)), np.zeros((T, D))]
    _, slope = jax.device_get(run(args, _choices(), dys))
  for name, d in slope['weights'].items():
    assert not d[EMPTY].any(), name
    assert np.all([d[e].any() for e in range(E) if e != EMPTY]), name
  # Nor has the weight of a choice that was dropped.
  own_TxK = _choices()[0] < E
  assert not slope['gate_TxK'][~own_TxK].any()
  # All hidden values of a row may be zero after relu, and of nothing else.
  assert slope['gate_TxK'][own_TxK].all() or activation == 'relu'
  assert not slope['x_TxD'][:2].any()


def _loops(args, activation):
  """The answers of `_answer`, by the plain loops."""
  expert_TxK, place_NxExC = _choices()
  start_N = np.arange(T // GROUP)[:, None, None] * GROUP
  by_expert = lambda a_NxExC: a_NxExC.swapaxes(0, 1).reshape(E, -1)
  weights, x_TxD = args['weights'], args['x_TxD']
  return [
    oracle.moe(x_TxD, expert_TxK, args['gate_TxK'], weights, activation),
    oracle.moe_by_expert(
      x_TxD,
      by_expert(place_NxExC + start_N),
      by_expert(args['gate_NxExC']),
      weights,
      activation,
    ),
  ]


@pytest.mark.parametrize(
  'activation, bias, products, n, dtype, tolerance',
  [
    ('swiglu', True, 'cpu', 2, 'bfloat16', 0.03),
    # To products all plans are one: where experts choose, all rows exist.
    ('swiglu', True, 'interpret', 1, 'bfloat16', 0.03),
    ('relu', False, 'interpret', 1, 'float32', 1e-5),
  ],
)
def test_is_local_in_less_precision(
  activation, bias, products, n, dtype, tolerance
):
  """Rows in that dtype, parameters and gates in float32."""
  args = jax.tree.map(np.float32, _arguments(activation, bias))
  args['x_TxD'] = args['x_TxD'].astype(jnp.dtype(dtype))
  run = _program('fused', activation, bias, products, n)
  dys = _dys(args['x_TxD'].dtype)[:n]
  found = jax.device_get(run(args, _choices(), dys))
  assert all(y.dtype == dtype for y in found[0])
  narrow = lambda a, b: np.asarray(a, b.dtype)
  expected = jax.tree.map(narrow, _expected(activation, bias, n), found)
  assert found[1]['x_TxD'].dtype == dtype
  assert found[1]['weights']['up_ExDxF'].dtype == np.float32
  _same(found, expected, tolerance)


# --- what is saved ------------------------------------------------------------


def test_saves_tokens_preactivations_and_integers():
  size = layers.Layer(T, D, E, K, F)
  kept = saved.saved(
    layers.layer(size, 'fused'), *layers.arguments(size, 'bfloat16')
  )
  M = T * K
  assert kept.pop(f'bfloat16[{M},{F}]') == 2 * 2 * M * F  # gate and up
  assert kept.pop(f'bfloat16[{T},{D}]') == 2 * T * D
  assert not [shape for shape in kept if shape.startswith('bfloat16')]
  assert sum(kept.values()) <= 4 * (6 * M + E)  # weights and the plan


@pytest.mark.parametrize('name', layers.MODELS)
def test_saves_half_of_what_the_plain_layer_does(name):
  size = layers.MODELS[name]
  args = layers.arguments(size, 'bfloat16')
  fused, local, plain = (
    sum(saved.saved(layers.layer(size, strategy), *args).values())
    for strategy in ('fused', 'local', 'plain')
  )
  assert fused <= 0.55 * plain
  assert fused < local < plain


def test_saves_no_parameters_in_another_dtype():
  """With parameters in float32 and rows in bfloat16."""
  size = layers.Layer(T, D, E, K, F)
  weights, *_ = layers.arguments(size, 'float32')
  _, *rest = layers.arguments(size, 'bfloat16')
  kept = {
    strategy: saved.saved(layers.layer(size, strategy), weights, *rest)
    for strategy in ('local', 'fused')
  }
  cast = f'bfloat16[{E},{D},{F}]'
  assert cast in kept['local'] and cast not in kept['fused']


def test_the_plain_layer_is_the_layer(monkeypatch):
  """By the grouped matmul that compiles fastest, and so are those timed."""
  monkeypatch.setattr(ops, 'choose_gmm', lambda *_: 'xla')
  size = layers.Layer(T, D, E, K, F)
  found = seconds.timed(size, rounds=1)
  assert found['fused']['ratio'] > 0
  *args, _ = seconds.draws(size)
  y_TxD = jax.jit(layers.plain)(*args)
  expected = jax.jit(layers.layer(size, 'local'))(*args)
  np.testing.assert_allclose(y_TxD, expected, 1e-4, 1e-5)


# --- products whose rows are gathered in their loads --------------------------


@pytest.mark.parametrize('name', ['skewed', 'narrow'])
def test_gathered_rows_are_copied_ones(name):
  """Of two matrices an expert, at once; ids past the groups are any."""
  M, A, B, group = CASES[name]
  rng = np.random.default_rng(len(name))
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tokens = M // 2 + 1
  x_TxA, y_TxA = draw(tokens, A), draw(tokens, A)
  ws = draw(len(group), A, B), draw(len(group), A, B + 1)
  dys = draw(M, B), draw(M, B + 1)

  @jax.jit
  def run(token_M, x_TxA, y_TxA, ws, dys, group_sizes_E):
    turned = [w_ExAxB.swapaxes(1, 2) for w_ExAxB in ws]
    return (
      cpu.fwd(x_TxA, ws, group_sizes_E, token_M),
      cpu.dlhs(dys, ws, group_sizes_E),
      cpu.dlhs((x_TxA, y_TxA), [turned[0]] * 2, group_sizes_E, token_M),
      cpu.drhs(x_TxA, dys, group_sizes_E, x_token_M=token_M),
      cpu.drhs(dys[0], (x_TxA, y_TxA), group_sizes_E, dy_token_M=token_M),
    )

  for group_sizes_E in gmm_test.groups(name)[:12]:
    token_M = rng.integers(0, tokens, M).astype(np.int32)
    token_M[sum(group_sizes_E) :] = tokens
    found = run(token_M, x_TxA, y_TxA, ws, dys, group_sizes_E)
    ys, dx, both, dws, turned = jax.device_get(found)
    rows = np.clip(token_M, 0, tokens - 1)
    x_MxA, y_MxA = x_TxA[rows], y_TxA[rows]
    want = [
      gmm_test.oracle(x_MxA, w, dy, group_sizes_E)
      for w, dy in zip(ws, dys, strict=True)
    ]
    by_expert = functools.partial(
      gmm_test.by_expert, group_sizes_E=group_sizes_E
    )
    sums = lambda *lists: [np.add(*pair) for pair in zip(*lists, strict=True)]
    for i, (y, _, dw) in enumerate(want):
      gmm_test.check(by_expert(ys[i]), y, 1e-5)
      gmm_test.check(dws[i], dw, 1e-5)
    gmm_test.check(by_expert(dx), sums(want[0][1], want[1][1]), 1e-5)
    first = want[0][0], gmm_test.oracle(y_MxA, ws[0], dys[0], group_sizes_E)[0]
    gmm_test.check(by_expert(both), sums(*first), 1e-5)
    for part, rows_MxA in zip(turned, (x_MxA, y_MxA), strict=True):
      dw = gmm_test.oracle(rows_MxA, ws[0], dys[0], group_sizes_E)[2]
      gmm_test.check(part, [d.T for d in dw], 1e-5)
