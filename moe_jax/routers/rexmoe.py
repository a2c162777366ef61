"""ReXMoE: a pool of several layers' experts, let in step by step."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import balance, exact, ranges, routers

# A part of the run's steps, or a step, which is an int32.
Place = Annotated[float, ranges.Within('[0, 2^31)')]


class Router(routers.Router):
  """Tan et al. 2025, arXiv 2510.17483: top-k of softmax over a shared pool.

  Progressive scaling routing: a training step has some of the E candidates, a
  uniformly random set of its own in every layer, the same for all tokens,
  microbatches and devices. Evaluation has all. Gates of the masked are 0, and
  they are never chosen. With first=None this is `topk` without renormalising,
  bit for bit.

  Args:
    k: experts per token.
    first: candidates at the start, the experts that a layer owns; None is all E
      from the start.
    schedule: 'linear' from `first` at step `start` to E at step `end` (eq. 6),
      or 'stepwise', by `stages`.
    start: up to 1 a part of the run's steps, above 1 a step.
    end: the same.
    stages: of 'stepwise', where how many are let in: '0.21:128,0.63:256'; steps
      are as in `start` and have what begins with them.
    renormalise: gates are divided by their sum over the k chosen.
    mask: 'zero' masks after the softmax over all E; 'neginf' before it, so that
      the candidates' scores sum to 1.
  """

  def __init__(
    self,
    D: int,
    E: int,
    *,
    k: ranges.Count = 2,
    first: ranges.Count | None = None,
    schedule: Literal['linear', 'stepwise'] = 'linear',
    start: Place = 0.21,
    end: Place = 0.63,
    stages: str = '',
    renormalise: bool = False,
    mask: Literal['zero', 'neginf'] = 'zero',
    rngs: nnx.Rngs,
  ):
    routers.check(E, k=k)
    if bool(stages) != (schedule == 'stepwise' and first is not None):
      raise ValueError(
        f'stages is {stages!r} with schedule={schedule!r} and first={first}'
      )
    self.stages = _parsed(stages)
    for size in (E if first is None else first, *(n for _, n in self.stages)):
      if not k <= size <= E:
        raise ValueError(f'{size} candidates are not from k={k} to E={E}')
    self.k, self.E, self.first = k, E, first
    self.schedule, self.start, self.end = schedule, start, end
    self.renormalise, self.mask = renormalise, mask
    self.w_DxE = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (D, E)))

  def __call__(self, x_TxD, ctx, memory):
    logits_TxE = routers.logits(x_TxD, self.w_DxE[...])
    keep_E = self._keep(ctx)
    expert_TxK, gate_TxK = route(
      logits_TxE,
      keep_E,
      self.k,
      ctx,
      renormalise=self.renormalise,
      mask=self.mask,
    )
    decision = routers.by_token(expert_TxK, gate_TxK, self.E, ctx)
    log_TxE = jax.nn.log_softmax(logits_TxE, axis=-1)
    probs_TxE = jax.nn.softmax(log_TxE, axis=-1)
    aux = routers.report(decision, expert_TxK, probs_TxE, ctx)
    load_E = aux['load_E']
    aux['losses']['z'] = balance.z(logits_TxE, ctx.real_T)
    aux['losses']['balance_kept'] = balance.switch_among(
      logits_TxE, load_E, keep_E, ctx.real_T
    )
    return decision, aux, memory

  def _keep(self, ctx):
    """bool [E]: the candidates of this step."""
    if self.first is None or not ctx.train:
      return jnp.ones((self.E,), bool)
    at = lambda place: exact.nearest(place, ctx.steps if place <= 1 else 1)
    if self.schedule == 'linear':
      number = candidates(
        ctx.step, self.first, self.E, at(self.start), at(self.end)
      )
    else:
      stages = [(at(place), size) for place, size in self.stages]
      number = staged(ctx.step, self.first, stages)
    # Uniform draws may be equal; ranks in a permutation are not.
    rank_E = jax.random.permutation(
      ctx.step_key, jnp.arange(self.E, dtype=jnp.int32)
    )
    return rank_E < number


def candidates(
  step: jax.Array, first: int, E: int, start: int, end: int
) -> jax.Array:
  """int32: first + floor((E - first) (step - start) / (end - start)), eq. 6.

  `first` up to the step `start` and E from the step `end` on, exactly: steps
  are compared with those at which one more is let in, so nothing overflows.
  """
  if end < start:
    raise ValueError(f'candidates grow from step {start} to {end}, before it')
  more = E - first
  wait = [-(-i * (end - start) // more) for i in range(1, more + 1)]
  opens = np.array([start + max(1, steps) for steps in wait], np.int32)
  return first + jnp.sum(step >= opens, dtype=jnp.int32)


def staged(
  step: jax.Array, first: int, stages: list[tuple[int, int]]
) -> jax.Array:
  """int32: the size of the last (step, size) that has begun, else `first`."""
  number = jnp.int32(first)
  for begin, size in sorted(stages):
    number = jnp.where(step >= begin, size, number)
  return number


def route(
  logits_TxE: jax.Array,
  keep_E: jax.Array,
  k: int,
  ctx: routers.Ctx,
  *,
  renormalise: bool = False,
  mask: str = 'zero',
) -> tuple[jax.Array, jax.Array]:
  """expert_TxK, the best first, and gate_TxK, where keep_E are candidates."""
  keep_1xE = keep_E[None]
  log_TxE = jax.nn.log_softmax(logits_TxE, axis=-1)
  if mask == 'neginf':
    log_TxE = jnp.where(keep_1xE, log_TxE, -jnp.inf)
    log_TxE = jax.nn.log_softmax(log_TxE, axis=-1)
  # Below any score: a candidate's may be so small that it is 0.
  score_TxE = jnp.where(keep_1xE, jnp.exp(log_TxE), -1)
  expert_TxK = routers.choose(score_TxE, k, ctx)
  # Finite, so that a replayed choice of masked experts alone has gates too.
  lowest = jnp.finfo(log_TxE.dtype).min
  log_TxK = jnp.take_along_axis(
    jnp.where(keep_1xE, log_TxE, lowest), expert_TxK, axis=1
  )
  if renormalise:
    return expert_TxK, jax.nn.softmax(log_TxK, axis=1)
  return expert_TxK, jnp.exp(log_TxK)


def _parsed(stages):
  """((place, size), ...) of 'place:size,place:size'."""
  out = []
  for stage in stages.split(',') if stages else ():
    place, _, size = stage.partition(':')
    try:
      out.append((float(place), int(size)))
    except ValueError:
      message = f"stages has {stage!r}, which is not 'step:candidates'"
      raise ValueError(message) from None
    ranges.option(Place).check(f'the step of {stage!r} in stages', out[-1][0])
  return tuple(out)
