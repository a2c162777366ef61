"""Feed-forward experts: rows_MxD, grouped by expert, to y_MxD."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import fused, ops, plans
from moe_jax.init import Init, LECUN
from moe_jax.plans import Rows

ACTIVATIONS = {
  'swiglu': (jax.nn.silu, True),
  'geglu': (jax.nn.gelu, True),
  'gelu': (jax.nn.gelu, False),
  'relu': (jax.nn.relu, False),
}  # name: (function, whether a gate matrix multiplies the up projection)


class Experts(nnx.Module):
  """E feed-forward experts of hidden width F, as grouped matmuls.

  swiglu, geglu: down(act(x gate) * (x up)); gelu, relu: down(act(x up)).

  Args:
    activation: a name in ACTIVATIONS.
    bias: whether each expert has biases.
    init: of the weights and biases.
    gmm: (x_MxA, w_ExAxB, group_sizes_E) -> y_MxB, see ops.gmm.
    products: of that gmm, for `routed`; None takes those that its gradients
      have, and copies rows for them.
    out_scale: factor on the initial down projection.
  """

  def __init__(
    self,
    E: int,
    D: int,
    F: int,
    *,
    activation: str,
    gmm: Callable[..., jax.Array],
    products: ops.Products | None = None,
    bias: bool = False,
    init: Init = LECUN,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.E, self.gmm, self.activation = E, gmm, activation
    self.products = products or ops.by_gradients(gmm)
    _, gated = ACTIVATIONS[activation]
    weight = lambda A, B: init.weight(rngs.params(), (E, A, B), A, B)
    self.up_ExDxF = nnx.Param(weight(D, F))
    if gated:
      self.gate_ExDxF = nnx.Param(weight(D, F))
    self.down_ExFxD = nnx.Param(weight(F, D) * out_scale)
    self.bias = bias
    if bias:
      bias_of = lambda A, B: nnx.Param(init.bias(rngs.params(), (E, B), A))
      self.bias_up_ExF = bias_of(D, F)
      self.bias_down_ExD = bias_of(F, D)
      if gated:
        self.bias_gate_ExF = bias_of(D, F)

  def __call__(
    self, rows_MxD: jax.Array, group_sizes_E: jax.Array
  ) -> jax.Array:
    """y_MxD; rows from sum(group_sizes_E) on are undefined."""
    act, gated = ACTIVATIONS[self.activation]
    up_MxF = self._linear(rows_MxD, 'up_ExDxF', 'bias_up_ExF', group_sizes_E)
    gate_MxF = None
    if gated:
      gate_MxF = self._linear(
        rows_MxD, 'gate_ExDxF', 'bias_gate_ExF', group_sizes_E
      )

    # Computed again for the gradient: cheaper than to keep another [M, F].
    @jax.checkpoint
    def down(up_MxF, gate_MxF):
      hidden_MxF = act(gate_MxF) * up_MxF if gated else act(up_MxF)
      return self._linear(
        hidden_MxF, 'down_ExFxD', 'bias_down_ExD', group_sizes_E
      )

    return down(up_MxF, gate_MxF)

  def routed(self, x_TxD: jax.Array, rows: Rows) -> jax.Array:
    """y_TxD: combine(self(dispatch(x_TxD, rows), rows.group_sizes_E), rows, T).

    The same to rounding, by `fused.experts`.
    """
    weights = {
      name: getattr(self, name)[...]
      for name in fused.NAMES
      if hasattr(self, name)
    }
    act, _ = ACTIVATIONS[self.activation]
    return fused.experts(act, self.products, weights, x_TxD, rows)

  def _linear(self, x_MxA, weight, bias, group_sizes_E):
    """One grouped matmul; the rows past the groups are undefined."""
    dtype = x_MxA.dtype
    w_ExAxB = getattr(self, weight)[...].astype(dtype)
    y_MxB = self.gmm(x_MxA, w_ExAxB, group_sizes_E)
    if self.bias:
      bias_ExB = getattr(self, bias)[...].astype(dtype)
      y_MxB += _per_row(bias_ExB, group_sizes_E, y_MxB.shape[0])
    return y_MxB


def _per_row(bias_ExB, group_sizes_E, M):
  """[M, B]: the bias of each row's expert, zero past the groups."""
  expert_M = plans.expert_of(group_sizes_E, M)
  return bias_ExB.at[expert_M].get(mode='fill', fill_value=0)


class Mlp(nnx.Module):
  """One feed-forward for all tokens: dense layers and shared experts.

  The same expert without routing: x_TxD to y_TxD.
  """

  def __init__(
    self,
    D: int,
    F: int,
    *,
    activation: str,
    bias: bool = False,
    init: Init = LECUN,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.one = Experts(
      1,
      D,
      F,
      activation=activation,
      gmm=_dense,
      bias=bias,
      init=init,
      out_scale=out_scale,
      rngs=rngs,
    )

  def __call__(self, x_TxD: jax.Array) -> jax.Array:
    return self.one(x_TxD, jnp.full((1,), x_TxD.shape[0], jnp.int32))


def _dense(x_TxA, w_1xAxB, group_sizes_E):
  del group_sizes_E  # all rows
  return x_TxA @ w_1xAxB[0]
