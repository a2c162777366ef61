"""Experts against a loop over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import ops
from moe_jax.experts.mlp import ACTIVATIONS, Experts, Mlp
from tests.helpers import oracle

E, D, F, M = 4, 8, 6, 12
GROUP_E = np.array([3, 0, 5, 2], np.int32)  # an empty expert; two rows of none
EXPERT_M = np.repeat(np.arange(E), GROUP_E)
ROWS = len(EXPERT_M)


def _module(activation, bias, gmm=ops.gmm):
  make = lambda: Experts(
    E, D, F, activation=activation, bias=bias, gmm=gmm, rngs=nnx.Rngs(0)
  )
  return nnx.eval_shape(make)


def _weights(module, wide=np.float32):
  draw = np.random.default_rng(0)
  state = nnx.to_pure_dict(nnx.state(module))
  return jax.tree.map(lambda a: wide(0.5 * draw.normal(size=a.shape)), state)


def _rows(wide=np.float32):
  return wide(np.random.default_rng(1).normal(size=(M, D)))


def _call(module, weights, rows_MxD, group_sizes_E=GROUP_E):
  graph, state = nnx.split(module)
  nnx.replace_by_pure_dict(state, weights)
  return nnx.merge(graph, state)(rows_MxD, group_sizes_E)


def _expected(weights, rows_MxD, activation):
  y = [
    oracle.expert(np.float64(x_D), e, weights, activation)
    for x_D, e in zip(rows_MxD, EXPERT_M, strict=False)
  ]
  return np.stack(y)


@functools.cache
def _program(activation, bias):
  return jax.jit(functools.partial(_call, _module(activation, bias)))


# With and without biases in turn: gated ones, and ones that are not.
CASES = [(a, i % 2 == 0) for i, a in enumerate(ACTIVATIONS)]


@pytest.mark.parametrize('activation, bias', CASES)
def test_experts_agree_with_the_oracle(activation, bias):
  weights = _weights(_module(activation, bias))
  assert ('bias_up_ExF' in weights) == bias
  assert ('gate_ExDxF' in weights) == activation.endswith('glu')
  y_MxD = _program(activation, bias)(weights, _rows())
  expected = _expected(weights, _rows(), activation)
  np.testing.assert_allclose(y_MxD[:ROWS], expected, 1e-4, 1e-5)


@pytest.mark.parametrize(
  'activation, bias', [('swiglu', True), ('relu', False)]
)
def test_gradients_are_slopes_for_each_expert(activation, bias):
  module = _module(activation, bias)
  with jax.enable_x64(True):
    at = {**_weights(module, np.float64), 'rows': _rows(np.float64)}
    r = np.random.default_rng(2).normal(size=(ROWS, D))

    def f(at):
      weights = {k: v for k, v in at.items() if k != 'rows'}
      return jnp.sum(r * _call(module, weights, at['rows'])[:ROWS])

    def dumb(at):
      return np.sum(r * _expected(at, at['rows'], activation))

    grads = jax.device_get(jax.jit(jax.grad(f))(at))
    draw = np.random.default_rng(3)
    for name in at:
      for e in range(E):
        toward = jax.tree.map(np.zeros_like, at)
        part = np.flatnonzero(EXPERT_M == e) if name == 'rows' else e
        toward[name][part] = draw.normal(size=toward[name][part].shape)
        slope = oracle.slope(dumb, at, toward)
        found = np.sum(grads[name] * toward[name])
        np.testing.assert_allclose(found, slope, 1e-6, 1e-8)
        if GROUP_E[e] == 0:  # exactly, not almost
          assert not np.any(grads[name][part])


def test_a_gate_multiplies_and_is_what_is_activated():
  weights = _weights(_module('geglu', bias=False))
  weights['gate_ExDxF'] *= 0  # gelu(0) = 0, whereas up alone is not zero
  assert not np.any(_program('geglu', False)(weights, _rows())[:ROWS])


def test_a_dense_layer_is_one_expert_for_all_rows():
  dense = nnx.eval_shape(
    lambda: Mlp(D, F, activation='swiglu', bias=True, rngs=nnx.Rngs(0))
  )
  weights = _weights(dense)
  graph, state = nnx.split(dense)
  nnx.replace_by_pure_dict(state, weights)
  y_TxD = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, _rows())
  expected = [
    oracle.expert(np.float64(x_D), 0, weights['one']) for x_D in _rows()
  ]
  np.testing.assert_allclose(y_TxD, expected, 1e-4, 1e-5)


def test_biases_start_at_zero_and_out_scale_shrinks_the_answer():
  def init(scale):
    module = Experts(
      2,
      D,
      F,
      activation='relu',
      bias=True,
      gmm=ops.gmm,
      out_scale=scale,
      rngs=nnx.Rngs(0),
    )
    return nnx.to_pure_dict(nnx.state(module))

  one, tenth = (jax.jit(init)(scale) for scale in (1.0, 0.1))
  assert not one['bias_up_ExF'].any() and not one['bias_down_ExD'].any()
  np.testing.assert_allclose(tenth['down_ExFxD'], 0.1 * one['down_ExFxD'], 1e-6)
  np.testing.assert_array_equal(tenth['up_ExDxF'], one['up_ExDxF'])
  assert not np.array_equal(one['up_ExDxF'][0], one['up_ExDxF'][1])


def test_bfloat16_rows_meet_bfloat16_weights():
  seen = []

  def gmm(x_MxA, w_ExAxB, group_sizes_E):
    seen.append((x_MxA.dtype, w_ExAxB.dtype))
    return ops.gmm(x_MxA, w_ExAxB, group_sizes_E)

  module = _module('swiglu', bias=True, gmm=gmm)
  y = jax.eval_shape(
    functools.partial(_call, module), _weights(module), jnp.bfloat16(_rows())
  )
  assert y.dtype == jnp.bfloat16
  assert len(seen) == 3
  assert all(x == w == jnp.bfloat16 for x, w in seen)


def test_an_unknown_grouped_matmul_is_named():
  with pytest.raises(ValueError, match="'triton'; there are cpu, tpu"):
    ops.gmm(_rows(), np.zeros((E, D, F), np.float32), GROUP_E, impl='triton')
