"""The one dense truth: numpy, float64, loops over tokens and experts.

Nothing here sorts, groups or pads; it is slow and easy to believe. `weights`
is a dict of an Experts module's parameters, under their names.
"""

import math

import numpy as np


def moe(x_TxD, expert_TxK, gate_TxK, weights, activation='swiglu'):
  """y_TxD: each token's gated sum over its experts; the id E is no expert."""
  x_TxD = np.asarray(x_TxD, np.float64)
  E = len(weights['up_ExDxF'])
  y_TxD = np.zeros_like(x_TxD)
  for t, x_D in enumerate(x_TxD):
    for e, gate in zip(expert_TxK[t], gate_TxK[t], strict=True):
      if e < E:
        y_TxD[t] += float(gate) * expert(x_D, int(e), weights, activation)
  return y_TxD


def moe_by_expert(x_TxD, token_ExC, gate_ExC, weights, activation='swiglu'):
  """y_TxD where each expert chose its tokens."""
  x_TxD = np.asarray(x_TxD, np.float64)
  y_TxD = np.zeros_like(x_TxD)
  for e, (token_C, gate_C) in enumerate(zip(token_ExC, gate_ExC, strict=True)):
    for t, gate in zip(token_C, gate_C, strict=True):
      y_TxD[t] += float(gate) * expert(x_TxD[t], e, weights, activation)
  return y_TxD


def moe_dense(x_TxD, gate_TxE, weights, activation='swiglu'):
  """y_TxD where gate_TxE says how much each token takes of each expert."""
  T, E = np.shape(gate_TxE)
  expert_TxE = np.broadcast_to(np.arange(E), (T, E))
  return moe(x_TxD, expert_TxE, gate_TxE, weights, activation)


def expert(x_D, e, weights, activation='swiglu'):
  """down(act(x gate) * (x up)) of expert e, or down(act(x up))."""

  def linear(x, weight, bias):
    y = x @ np.asarray(weights[weight][e], np.float64)
    return (
      y + np.asarray(weights[bias][e], np.float64) if bias in weights else y
    )

  up_F = linear(x_D, 'up_ExDxF', 'bias_up_ExF')
  if activation in ('swiglu', 'geglu'):
    act = {'swiglu': silu, 'geglu': gelu}[activation]
    hidden_F = act(linear(x_D, 'gate_ExDxF', 'bias_gate_ExF')) * up_F
  else:
    hidden_F = {'gelu': gelu, 'relu': relu}[activation](up_F)
  return linear(hidden_F, 'down_ExFxD', 'bias_down_ExD')


def silu(x):
  return x / (1 + np.exp(-x))


def gelu(x):
  """The tanh form, which is jax.nn.gelu's default."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
  return np.maximum(x, 0)


def softmax(x):
  y = np.exp(x - x.max(axis=-1, keepdims=True))
  return y / y.sum(axis=-1, keepdims=True)


def best(score_E, k):
  """The k largest, the largest first; of equals the first."""
  chosen = []
  for _ in range(k):
    left = [e for e in range(len(score_E)) if e not in chosen]
    chosen.append(max(left, key=lambda e: (score_E[e], -e)))
  return chosen


def keep(expert_TxK, E, capacity, group=None):
  """expert_TxK with the id E for every choice that finds its expert full.

  In each group of consecutive tokens all first choices queue in token order,
  then all second choices, and so on.
  """
  kept_TxK = np.array(expert_TxK)
  T, K = kept_TxK.shape
  group = group or T
  for start in range(0, T, group):
    taken = [0] * (E + 1)
    for k in range(K):
      for t in range(start, start + group):
        e = kept_TxK[t, k]
        if taken[e] >= capacity:
          kept_TxK[t, k] = E
        taken[e] += 1
  return kept_TxK


def slope(f, at, toward, eps=1e-5):
  """The derivative of f at a dict of arrays in one direction, in float64."""
  step = lambda s: {k: np.asarray(at[k]) + s * toward[k] for k in at}
  return (f(step(eps)) - f(step(-eps))) / (2 * eps)
