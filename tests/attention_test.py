"""Attention against a loop over heads and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from moe_jax import attention

B, L, D, H, J, S = 2, 7, 12, 4, 2, 6
THETA = 50.0
SEGMENT_BxL = np.array([[0, 0, 0, 1, 1, 1, 1], [5, 5, 2, 2, 2, 2, 9]], np.int32)


def _module(H=H, J=J):
  make = lambda: attention.Attention(D, H, J, S, theta=THETA, rngs=nnx.Rngs(0))
  return nnx.eval_shape(make)


def _weights(module):
  draw = np.random.default_rng(0)
  state = nnx.to_pure_dict(nnx.state(module))
  return jax.tree.map(
    lambda a: np.float32(0.5 * draw.normal(size=a.shape)), state
  )


def _x(seed=1):
  return np.float32(np.random.default_rng(seed).normal(size=(B, L, D)))


def _call(module, weights, x_BxLxD, segment_BxL):
  graph, state = nnx.split(module)
  nnx.replace_by_pure_dict(state, weights)
  return nnx.merge(graph, state)(x_BxLxD, segment_BxL)


@functools.cache
def _attend():
  """(weights, x_BxLxD, segment_BxL) -> y_BxLxD, jitted."""
  return jax.jit(functools.partial(_call, _module()))


def _turned(x_S, place):
  """Each pair (i, i + S/2) is a complex number, turned by place * frequency."""
  z = x_S[: S // 2] + 1j * x_S[S // 2 :]
  z *= np.exp(1j * place * THETA ** (-np.arange(S // 2) / (S // 2)))
  return np.concatenate([z.real, z.imag])


def _by_hand(w, x_BxLxD, segment_BxL):
  w = {k: np.float64(a) for k, a in w.items()}
  y_BxLxD = np.zeros(x_BxLxD.shape)
  for b, l, h in np.ndindex(B, L, H):
    j = h // (H // J)  # heads share key-value heads in consecutive groups
    q_S = _turned(x_BxLxD[b, l] @ w['query_DxHxS'][:, h], l)
    seen = [m for m in range(l + 1) if segment_BxL[b, m] == segment_BxL[b, l]]
    k = [_turned(x_BxLxD[b, m] @ w['key_DxJxS'][:, j], m) for m in seen]
    v = [x_BxLxD[b, m] @ w['value_DxJxS'][:, j] for m in seen]
    probs = oracle.softmax(np.stack(k) @ q_S / np.sqrt(S))
    y_BxLxD[b, l] += (probs @ np.stack(v)) @ w['out_HxSxD'][h]
  return y_BxLxD


def test_attention_agrees_with_the_loops():
  weights = _weights(_module())
  y_BxLxD = _attend()(weights, _x(), SEGMENT_BxL)
  expected = _by_hand(weights, _x(), SEGMENT_BxL)
  np.testing.assert_allclose(y_BxLxD, expected, 1e-4, 1e-4)


def test_a_token_sees_no_later_one():
  weights, x_BxLxD = _weights(_module()), _x()
  one = np.zeros_like(SEGMENT_BxL)
  y_BxLxD = _attend()(weights, x_BxLxD, one)
  for cut in range(1, L):
    moved = np.concatenate([x_BxLxD[:, :cut], _x(2)[:, cut:]], axis=1)
    other = _attend()(weights, moved, one)
    np.testing.assert_array_equal(other[:, :cut], y_BxLxD[:, :cut])
    assert (np.abs(other - y_BxLxD)[:, cut:].max(axis=2) > 1e-3).all()


@pytest.mark.parametrize('row, document', [(0, 0), (0, 1), (1, 5), (1, 2)])
def test_documents_are_kept_apart(row, document):
  """Another document's tokens, earlier or later, change nothing."""
  weights, x_BxLxD = _weights(_module()), _x()
  y_BxLxD = np.array(_attend()(weights, x_BxLxD, SEGMENT_BxL))
  own_L = SEGMENT_BxL[row] == document
  moved = x_BxLxD.copy()
  moved[row, ~own_L] = _x(2)[row, ~own_L]
  other = np.array(_attend()(weights, moved, SEGMENT_BxL))
  np.testing.assert_array_equal(other[row, own_L], y_BxLxD[row, own_L])
  assert not np.array_equal(other[row], y_BxLxD[row])


def test_grouped_queries_are_repeated_key_value_heads():
  weights = _weights(_module())
  repeated = dict(weights)
  for name in ('key_DxJxS', 'value_DxJxS'):
    repeated[name] = np.repeat(weights[name], H // J, axis=1)
  many = jax.jit(functools.partial(_call, _module(J=H)))
  np.testing.assert_allclose(
    many(repeated, _x(), SEGMENT_BxL),
    _attend()(weights, _x(), SEGMENT_BxL),
    1e-5,
    1e-5,
  )


def test_rotation_depends_on_distance_alone():
  """<rotated q at m, rotated k at n> is a function of m - n."""
  draw = np.random.default_rng(3)
  q_S, k_S = draw.normal(size=(2, S)).astype(np.float32)
  everywhere = lambda x_S: np.broadcast_to(x_S, (1, L, 1, S))
  q_LxS, k_LxS = (
    np.asarray(attention.rotate(everywhere(x), THETA))[0, :, 0]
    for x in (q_S, k_S)
  )
  score_LxL = q_LxS @ k_LxS.T
  for distance in range(-L + 1, L):
    along = np.diagonal(score_LxL, distance)
    np.testing.assert_allclose(along, along[0], 1e-4, 1e-4)
  assert np.ptp(score_LxL[0]) > 0.1
  np.testing.assert_array_equal(q_LxS[0], q_S)
  np.testing.assert_allclose(q_LxS[4], _turned(q_S, 4), 1e-5, 1e-6)


def test_norm_by_hand():
  norm = attention.Norm(D)
  scale_D = np.arange(1, D + 1, dtype=np.float32)
  norm.scale_D[...] = jnp.asarray(scale_D)
  x = 100 * _x()
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * scale_D
  np.testing.assert_allclose(norm(x), expected, 1e-5)
  assert np.isfinite(norm(np.zeros((1, D), np.float32))).all()


def test_norm_of_bfloat16_is_computed_in_float32():
  norm = attention.Norm(D)
  x = jnp.asarray(_x(), jnp.bfloat16)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  exact = norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.float32(y), np.float32(exact))
