"""Writing is reading: the contract of every router and attention, unasked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import attention, models, routers
from tests.helpers import tiny

LENGTH_B = np.array([8, 3, 6], np.int32)  # of texts that stand side by side
PROMPT_B = np.array([2, 3, 1], np.int32)  # of which so much is read at once
B, M, P = 3, 8, 3

# Options beside the defaults; a new router or attention needs no entry.
ROUTERS = {
  'topk': [{'capacity': 0.5, 'group': 2 * M}],
  'random': [{'k': 2, 'per': 'position'}, {'eval_per': 'ensemble'}],
}
ATTENTION = {
  'gqa': {'num_kv_heads': 1, 'theta': 100.0, 'window': 3},
  'mla': {'nope': 3, 'rope': 4, 'value': 5, 'rank': 7, 'theta': 50.0},
}
CASES = [
  *(
    {'router': {'name': name, **options}}
    for name in routers.names()
    for options in [{}, *ROUTERS.get(name, [])]
  ),
  *(
    {'attention': {'name': name, **ATTENTION.get(name, {})}}
    for name in attention.names()
  ),
]


def _id(changes):
  ((_, options),) = changes.items()
  return '-'.join(map(str, options.values()))


def _ids():
  return np.random.default_rng(0).integers(0, tiny.V, (B, M), np.int32)


def _writes(model):
  """Whether it can, by what its parts declare."""
  try:
    jax.eval_shape(lambda: model.init_kv_cache(1, 1))
  except ValueError:
    return False
  return model.trunk.body.moe.feed.routers.writes


@pytest.mark.parametrize('changes', CASES, ids=_id)
def test_writing_is_reading(changes):
  """One token after another beside other texts, or the whole text alone."""
  model = tiny.model(N=1, **changes)
  if not _writes(model):
    name = next(iter(changes.values()))['name']
    assert name in (
      'expert_choice',
      'full',
      'adaptive_span',
    )  # as their files say
    return
  weights = tiny.params(model), tiny.state(model)
  read, written = jax.device_get(_both(model)(*weights, _ids()))
  for (logits, route), (other, followed), length in zip(
    zip(*read, strict=True), zip(*written, strict=True), LENGTH_B, strict=True
  ):
    np.testing.assert_array_equal(followed[:length], route[:length])
    np.testing.assert_allclose(other[:length], logits[:length], 1e-4, 1e-5)
    assert np.std(logits[:length]) > 0.1


@functools.cache
def _both(model):
  """(params, state, ids_BxM) -> (logits_BxMxV, route_BxMxK), of each way.

  Read as an evaluation does, or without a capacity where there is one.
  """
  coupled = model.trunk.body.moe.feed.routers.coupled

  def context(ids_BxL, place_BxL, length_B, row_B, writes):
    batch = {
      'ids_BxL': ids_BxL,
      'pos_BxL': place_BxL,
      'segment_BxL': jnp.where(place_BxL < length_B[:, None], 0, -1),
      'row_B': row_B,
    }
    ctx = routers.context(
      batch, jax.random.key(3), jnp.int32(5), train=False, writes=writes
    )
    return batch, ctx

  def route(aux, B):
    a = aux[0]['route']
    return a.reshape(B, -1, a.shape[-1])

  @jax.jit
  def both(params, state, ids_BxM):
    bound = models.bind(model, params, state)
    length_B, prompt_B = jnp.asarray(LENGTH_B), jnp.asarray(PROMPT_B)
    row_B = jnp.arange(B, dtype=jnp.int32)

    def alone(row):
      place_1xM = jnp.arange(M, dtype=jnp.int32)[None]
      of_row = ids_BxM[row][None], place_1xM, length_B[row][None], row[None]
      logits_1xMxV, aux = bound(*context(*of_row, writes=coupled))
      return logits_1xMxV[0], route(aux, 1)[0]

    def see(kv_cache, ids_BxL, place_BxL, length_B):
      here = context(ids_BxL, place_BxL, length_B, row_B, writes=True)
      logits_BxLxV, aux, kv_cache = bound.decode(*here, kv_cache)
      return kv_cache, (logits_BxLxV, route(aux, B))

    def step(carry, _):
      kv_cache, place_B = carry
      id_Bx1 = jnp.take_along_axis(ids_BxM, place_B[:, None], axis=1)
      kv_cache, found = see(kv_cache, id_Bx1, place_B[:, None], length_B)
      return (kv_cache, place_B + 1), (place_B, jax.tree.map(_only, found))

    place_BxP = jnp.tile(jnp.arange(P, dtype=jnp.int32), (B, 1))
    prompt = ids_BxM[:, :P], place_BxP, prompt_B
    kv_cache, found = see(bound.init_kv_cache(B, M), *prompt)
    _, (place_NxB, more) = jax.lax.scan(
      step, (kv_cache, prompt_B), length=M - int(PROMPT_B.min())
    )
    put = lambda old, new: (
      jnp.zeros((B, M, old.shape[-1]), old.dtype)
      .at[:, :P]
      .set(old)
      .at[row_B[None], place_NxB]
      .set(new, mode='drop')
    )
    return jax.lax.map(alone, row_B), jax.tree.map(put, found, more)

  return both


def _only(a_Bx1xX):
  return a_Bx1xX[:, 0]
