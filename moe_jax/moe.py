"""One routed step: tokens to answers, by way of a plan."""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.plan import Plan
from moe_jax.routers import Ctx, Router

Experts = Callable[[jax.Array, jax.Array], jax.Array]
Strategy = Callable[[jax.Array, Plan, Experts], jax.Array]


def moe(
  x_TxD: jax.Array,
  router: Router,
  experts: Experts,
  strategy: Strategy,
  ctx: Ctx,
  memory: Any,
) -> tuple[jax.Array, dict[str, Any], Any]:
  """Returns y_TxD, the router's aux and its memory for the layer above."""
  plan, aux, memory = router(x_TxD, ctx, memory)
  return strategy(x_TxD, plan, experts), aux, memory
