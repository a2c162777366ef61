"""Routed experts with gradients of their own: few copies, little saved.

The strategy `fused` in parallel.py, by `Experts.routed`; it is `local`, to
rounding, where nothing but the products is ever written:

  forward   up, gate = x[token] w, in one product    the rows are not copied
            y = sum over a token's rows of weight * (act(gate) * up) down
  backward  d_hidden = dy[token] down^T              without the weights
            d_weight = the sum of d_hidden * hidden
            d_down = (weight * hidden)^T dy[token]
            dx = the sum over a token's rows of d_up up^T + d_gate gate^T
            d_up, d_gate of the weights = x[token]^T (d_up, d_gate)

As (hidden down) . dy = hidden . (dy down^T), the experts' answers need not be
kept for the gradient of the weights (SonicMoE, arXiv 2512.14080, section 3).
Saved are x_TxD, gate and up, and the plan's integers and weights: not the
copied rows, the hidden ones or the answers, nor the parameters in the dtype of
the computation. Sums over a token's rows are gathers, but where experts choose,
see `plans.sum_by_token`.

Rows past sum(group_sizes_E), and ids E, belong to no expert; an expert without
rows has gradients that are zero. Biases are those of a row's expert. A
mesh that cuts F calls this with a part of F and sums the answers. Where
rows come from other devices (`all_to_all`, `ragged`) they are rows already,
and `Experts` computes them; `model.remat` runs the forward pass again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import plans
from moe_jax.ops import Products
from moe_jax.plans import Rows

# What multiplies a token's row, and its bias; what activates is the first.
INTO = {'gate_ExDxF': 'bias_gate_ExF', 'up_ExDxF': 'bias_up_ExF'}
NAMES = (*INTO, *INTO.values(), 'down_ExFxD', 'bias_down_ExD')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def experts(
  act: Callable[[jax.Array], jax.Array],
  products: Products,
  weights: dict[str, jax.Array],
  x_TxD: jax.Array,
  rows: Rows,
) -> jax.Array:
  """y_TxD: the gated sum of the experts' answers, in the dtype of x.

  Args:
    act: elementwise.
    products: see ops.products; they get weights of the dtype of x.
    weights: the parameters of an `Experts` that has these experts, by name.
    x_TxD: float.
    rows: of these tokens, for these experts.
  """
  return _forward(act, products, weights, x_TxD, rows)[0]


def _forward(act, products, weights, x_TxD, rows):
  into = [name for name in INTO if name in weights]
  w = {name: a.astype(x_TxD.dtype) for name, a in weights.items()}
  hidden_MxF, pre = products.up_and_activate(
    functools.partial(_hidden, act),
    x_TxD,
    [w[name] for name in into],
    rows.group_sizes_E,
    [w[INTO[name]] for name in into if INTO[name] in w],
    rows.token_M,
  )
  (y_MxD,) = products.fwd(hidden_MxF, [w['down_ExFxD']], rows.group_sizes_E)
  if 'bias_down_ExD' in w:
    expert_M = plans.expert_of(rows.group_sizes_E, len(rows.token_M))
    y_MxD += w['bias_down_ExD'].at[expert_M].get(mode='fill', fill_value=0)
  y_TxD = plans.sum_by_token(y_MxD, rows, len(x_TxD), rows.gate_M)
  return y_TxD, (weights, x_TxD, rows, pre)


def _backward(act, products, saved, dy_TxD):
  weights, x_TxD, rows, pre = saved
  # XLA must not find that the forward pass had the same rows, and keep them.
  token_M, pre = jax.lax.optimization_barrier((rows.token_M, pre))
  group_sizes_E, gate_M = rows.group_sizes_E, rows.gate_M
  into = [name for name in INTO if name in weights]
  w = {name: a.astype(x_TxD.dtype) for name, a in weights.items()}

  d_pre, hidden_MxF, d_gate_M = products.down_vjp(
    functools.partial(_hidden, act),
    *(dy_TxD, w['down_ExFxD'], pre, gate_M, group_sizes_E, token_M),
  )
  d_down = products.drhs(
    hidden_MxF, [dy_TxD], group_sizes_E, dy_token_M=token_M
  )
  d_into = products.drhs(x_TxD, d_pre, group_sizes_E, x_token_M=token_M)
  dx_MxD = products.dlhs(d_pre, [w[name] for name in into], group_sizes_E)
  dx_TxD = plans.sum_by_token(dx_MxD, rows, len(x_TxD))
  d = dict(zip((*into, 'down_ExFxD'), (*d_into, *d_down), strict=True))
  if 'bias_down_ExD' in weights:
    wide = np.promote_types(x_TxD.dtype, gate_M.dtype)
    expert_M = plans.expert_of(group_sizes_E, len(token_M))
    for name, d_MxF in zip(into, d_pre, strict=True):
      d[INTO[name]] = jax.ops.segment_sum(
        d_MxF.astype(wide),
        expert_M,
        len(group_sizes_E),
        indices_are_sorted=True,
      )
    d['bias_down_ExD'], more_M = _bias_down(
      dy_TxD.astype(wide), w['bias_down_ExD'].astype(wide), rows, expert_M
    )
    d_gate_M += more_M
  own_M = jnp.arange(len(token_M), dtype=jnp.int32) < jnp.sum(
    group_sizes_E, dtype=jnp.int32
  )
  d_gate_M = jnp.where(own_M, d_gate_M, 0).astype(gate_M.dtype)
  d = {name: a.astype(weights[name].dtype) for name, a in d.items()}
  return d, dx_TxD, Rows(None, d_gate_M, None, None)


experts.defvjp(_forward, _backward)


def _hidden(act, first_MxF, up_MxF=None):
  """The hidden rows: what is activated is the gate, or up where none is."""
  return act(first_MxF) if up_MxF is None else act(first_MxF) * up_MxF


def _bias_down(dy_TxD, bias_ExD, rows, expert_M):
  """The gradients, of the last bias, and by it of the weights of the rows.

  By products with all experts, so that no row of width D is copied.
  """
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  place = rows.token_M, expert_M  # none past the groups, where the expert is E
  gate_TxE = jnp.zeros_like(dy_TxD, shape=(len(dy_TxD), len(bias_ExD)))
  gate_TxE = gate_TxE.at[place].add(
    rows.gate_M.astype(dy_TxD.dtype), mode='drop'
  )
  of_TxE = dot(dy_TxD, bias_ExD.T)
  return dot(gate_TxE.T, dy_TxD), of_TxE.at[place].get(
    mode='fill', fill_value=0
  )
