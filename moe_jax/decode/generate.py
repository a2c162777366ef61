"""Texts that a decoder writes, and what its routers did meanwhile.

A batch of prompts is read at once; then each row gets one token after another,
from keys and values that are kept. Rows are independent of each other: what
stands behind a shorter prompt is padding, which no token sees and no router
counts, and routers have no capacity. So a text is what it would be alone, with
the same row number, which is a part of the seed.
"""

import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models, parallel, paths, routers
from moe_jax.training import checkpoint, saved_run, train_step
from moe_jax.training.jobs import Job


class Written(NamedTuple):
  """What was written, and by which experts.

  Attributes:
    ids: of each prompt, the new ids.
    routes: of each segment int32 [G, R, I, B, M, K], the experts of the token
      at each place of a row, prompt included; what a writer replays.
  """

  ids: list[list[int]]
  routes: list[np.ndarray]


def writer(
  job: Job,
  new: int,
  *,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop: Collection[int] = (),
) -> Callable[..., Written]:
  """What continues prompts by `new` ids each, or until one that is in `stop`.

  Returns (weights, prompts, seed=0, routes=None) -> Written. It compiles once
  for each number and largest length of prompts. Draws of a row depend on the
  seed, the row's number and the place alone.

  Args:
    job: of `newest`; weights lie on its mesh.
    temperature: of the softmax; 0 takes the best id, as does one that is less
      than any normal number of the logits' type.
    top_p: drawn from are the best ids that together have this probability.

  Raises:
    ValueError: one line; a model that cannot write, options out of range. When
      called: an empty prompt, an id that the model lacks, routes that do not
      fit.
  """
  with train_step.precision(job):
    _check(job, new, temperature, top_p)
  sample = functools.partial(_sample, temperature=temperature, top_p=top_p)
  run = jax.jit(
    functools.partial(
      _write, job, new=new, sample=sample, stop=tuple(sorted(stop))
    )
  )

  def write(
    weights: train_step.Weights,
    prompts: list[list[int]],
    seed: int = 0,
    routes: list[np.ndarray] | None = None,
  ) -> Written:
    """`routes` of an earlier run of as many rows and places are followed.

    They stand for the routers' choices; gates are the routers' own.
    """
    _check_prompts(job, prompts)
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed={seed} is not in [0, 2**32)')
    rows = -len(prompts) % job.mesh.size + len(prompts)
    length_B = np.zeros(rows, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    ids_BxL = np.zeros((rows, length_B.max()), np.int32)
    for row, prompt in zip(ids_BxL, prompts, strict=False):
      row[: len(prompt)] = prompt
    batch = parallel.put_batch(
      {'ids_BxL': ids_BxL, 'length_B': length_B}, job.mesh, rows
    )
    with train_step.precision(job):
      if routes is not None:
        longest = ids_BxL.shape[1] + new
        like = _routes(job, weights, rows, longest)
        routes = _fitting(job, routes, like, len(prompts))
      found = run(weights, **batch, seed=jnp.uint32(seed), replay=routes)
      new_BxN, made = jax.device_get(found)
    return Written(
      [_until(row.tolist(), stop) for row in new_BxN[: len(prompts)]],
      [route[:, :, :, : len(prompts)] for route in made],
    )

  return write


def _write(job, weights, *, ids_BxL, length_B, seed, replay, new, sample, stop):
  """new_BxN, and the routes of all places."""
  B, L = ids_BxL.shape
  model = models.bind(job.model, weights.params, weights.router_state)
  key = jax.random.key(seed)
  row_B = jnp.arange(B, dtype=jnp.int32)

  def see(ids_BxL, place_BxL, length_B, kv_cache, routes):
    """logits, and the cache with these tokens."""
    batch = {
      'ids_BxL': ids_BxL,
      'pos_BxL': place_BxL,
      'segment_BxL': jnp.where(place_BxL < length_B[:, None], 0, -1),
      'row_B': row_B,
    }
    ctx = routers.context(
      batch,
      key,
      weights.step,
      train=False,
      replay=replay and [_at(a, place_BxL) for a in replay],
      steps=job.config['steps'],
      writes=True,
    )
    logits_BxLxV, aux, kv_cache = model.decode(batch, ctx, kv_cache)
    routes = [
      _put(a, place_BxL, new)
      for a, new in zip(routes, aux.routes(), strict=True)
    ]
    return logits_BxLxV, kv_cache, routes

  def step(carry, _):
    kv_cache, routes, id_B, place_B, done_B = carry
    # What is written after the end is padding.
    length_B = jnp.where(done_B, 0, place_B + 1)
    logits_Bx1xV, kv_cache, routes = see(
      id_B[:, None], place_B[:, None], length_B, kv_cache, routes
    )
    id_B = pick(logits_Bx1xV[:, 0], place_B + 1)
    done_B = done_B | stops(id_B)
    return (kv_cache, routes, id_B, place_B + 1, done_B), id_B

  def pick(logits_BxV, place_B):
    fold = jax.vmap(jax.random.fold_in)
    keys_B = fold(fold(jnp.broadcast_to(key, (B,)), row_B), place_B)
    return jax.vmap(sample)(logits_BxV, keys_B)

  stops = lambda id_B: jnp.isin(id_B, jnp.asarray(stop, jnp.int32))
  place_BxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
  routes = [
    jnp.zeros(a.shape, a.dtype) for a in _routes(job, weights, B, L + new)
  ]
  logits_BxLxV, kv_cache, routes = see(
    ids_BxL, place_BxL, length_B, model.init_kv_cache(B, L + new), routes
  )
  last_Bx1x1 = jnp.maximum(length_B - 1, 0)[:, None, None]
  logits_BxV = jnp.take_along_axis(logits_BxLxV, last_Bx1x1, axis=1)[:, 0]
  id_B = pick(logits_BxV, length_B)
  carry = kv_cache, routes, id_B, length_B, stops(id_B) | (length_B == 0)
  (_, routes, *_), ids_NxB = jax.lax.scan(step, carry, length=new - 1)
  return jnp.concatenate([id_B[None], ids_NxB]).T, routes


def _routes(job, weights, B, M):
  """The shapes of the routes of M places, for each segment."""

  def route(weights):
    model = models.bind(job.model, weights.params, weights.router_state)
    zero_Bx1 = jnp.zeros((B, 1), jnp.int32)
    batch = dict.fromkeys(('ids_BxL', 'pos_BxL', 'segment_BxL'), zero_Bx1)
    batch['row_B'] = zero_Bx1[:, 0]
    ctx = routers.context(
      batch,
      jax.random.key(0),
      weights.step,
      train=False,
      steps=job.config['steps'],
      writes=True,
    )
    _, aux, _ = model.decode(batch, ctx, model.init_kv_cache(B, M))
    return aux.routes()

  of_a_place = jax.eval_shape(route, weights)
  return [
    jax.ShapeDtypeStruct((*a.shape[:3], B, M, a.shape[4]), a.dtype)
    for a in of_a_place
  ]


def _at(route_GxRxIxBxMxK, place_BxL):
  """[G, R, I, T, K]: of these places."""
  found = jnp.take_along_axis(
    route_GxRxIxBxMxK, place_BxL[None, None, None, :, :, None], axis=4
  )
  return found.reshape(*found.shape[:3], -1, found.shape[-1])


def _put(old_GxRxIxBxMxK, place_BxL, route_GxRxIxTxK):
  *outer, _, K = route_GxRxIxTxK.shape
  B, L = place_BxL.shape
  row_Bx1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  new = route_GxRxIxTxK.reshape(*outer, B, L, K)
  return old_GxRxIxBxMxK.at[:, :, :, row_Bx1, place_BxL].set(new)


def _sample(logits_V, key, *, temperature, top_p):
  """The best id, or one drawn from the best that together have top_p."""
  if temperature < jnp.finfo(logits_V.dtype).tiny:
    return jnp.argmax(logits_V).astype(jnp.int32)
  logits_V = (logits_V - jnp.max(logits_V)) / temperature  # none overflows
  order_V = jnp.argsort(-logits_V)
  probs_V = jax.nn.softmax(logits_V[order_V])
  before_V = jnp.cumsum(probs_V, dtype=probs_V.dtype) - probs_V
  kept_V = (before_V < top_p).at[0].set(True)  # of however little top_p
  sorted_V = jnp.where(kept_V, logits_V[order_V], -jnp.inf)
  return order_V[jax.random.categorical(key, sorted_V)].astype(jnp.int32)


def _until(ids, stop):
  last = next((at for at, i in enumerate(ids) if i in stop), len(ids))
  return ids[: last + 1]


def _check(job, new, temperature, top_p):
  if new < 1:
    raise ValueError(f'max_new_tokens={new} is < 1')
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature={temperature} is not in [0, inf)')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} is not in (0, 1]')
  for segment in job.model.trunk.segments().values():
    if not segment.moe.feed.routers.writes:
      raise ValueError(
        f'the router {job.config["model"]["router"]["name"]!r} looks at later'
        ' tokens, and cannot write'
      )
  job.model.init_kv_cache(1, 1)  # does attention keep anything?


def _check_prompts(job, prompts):
  if not prompts:
    raise ValueError('there is no prompt')
  for prompt in prompts:
    if not prompt:
      raise ValueError('a prompt has no id')
    for i in prompt:
      if not 0 <= i < job.model.c.V:
        raise ValueError(f'the id {i} is not one of 0 .. {job.model.c.V - 1}')


def _fitting(job, routes, like, B):
  """Recorded routes of B rows, with padding; ValueError if they do not fit."""
  needed = [(*a.shape[:3], B, *a.shape[4:]) for a in like]
  if [np.shape(a) for a in routes] != needed:
    raise ValueError(
      f'routes have the shapes {[np.shape(a) for a in routes]}, these prompts'
      f' need {needed}'
    )
  E = job.model.c.E * job.model.c.layers_per_pool
  for a in routes:
    if not np.issubdtype(np.asarray(a).dtype, np.integer) or (
      np.min(a) < 0 or np.max(a) > E
    ):
      raise ValueError(f'routes hold an expert that is not one of 0 .. {E}')
  more = (0, like[0].shape[3] - B) if like else (0, 0)
  pad = (0, 0), (0, 0), (0, 0), more, (0, 0), (0, 0)
  return [jnp.asarray(np.pad(a, pad), jnp.int32) for a in routes]


def routes_file(given: str | os.PathLike) -> pathlib.Path:
  """The .npz file of that name, which may be without its ending.

  Raises:
    ValueError: its folder is not there; one line.
  """
  path = paths.absolute(given)
  if not path.parent.is_dir():
    raise ValueError(f'{given}: there is no folder {path.parent}')
  return path.with_name(path.name.removesuffix('.npz') + '.npz')


def save_routes(given: str | os.PathLike, routes: list[np.ndarray]) -> None:
  """Writes them to `routes_file(given)`, the whole file or nothing."""
  path = routes_file(given)
  with tempfile.TemporaryDirectory('.part', dir=path.parent) as folder:
    part = pathlib.Path(folder) / path.name
    np.savez_compressed(part, **{str(i): a for i, a in enumerate(routes)})
    part.replace(path)


def load_routes(given: str | os.PathLike) -> list[np.ndarray]:
  """What `save_routes` wrote; ValueError if the file holds none."""
  path = routes_file(given)
  try:
    with np.load(path, allow_pickle=False) as found:
      return [found[str(i)] for i in range(len(found.files))]
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise ValueError(f'{path} holds no routes: {error}') from None


def prompt_ids(job: Job, text: str) -> list[int]:
  """The ids of a text; ValueError if there is no tokenizer."""
  tok = job.dataset.tokenizer
  if tok is None:
    raise ValueError(
      f'{job.workdir} has no tokenizer.json: give --prompt_ids, not --prompt'
    )
  if saved_run.published(job.config):
    return tok.prompt(text)
  return tok.encode([text])[0].tolist()


def ends(job: Job) -> frozenset[int]:
  """The ids that end a text.

  Those that generation_config.json names for published weights, from which a
  run may have begun, else those of their config.json, else the tokenizer's
  separator.

  Raises:
    ValueError: one of these files is damaged.
  """
  tok, found = job.dataset.tokenizer, frozenset()
  if (job.workdir / checkpoint.ASIDE).exists():
    found = frozenset(saved_run.ends(job.workdir / checkpoint.ASIDE))
  return found or frozenset([] if tok is None else [tok.separator])


def continued(
  job: Job, prompt: list[int], ids: list[int], stop: Collection[int] = ()
) -> str | None:
  """What the ids add to the text of a prompt; None without a tokenizer.

  The last id is no text if it is in `stop`.
  """
  tok = job.dataset.tokenizer
  if tok is None:
    return None
  if ids and ids[-1] in stop:
    ids = ids[:-1]
  # Together, for a decoder may drop the first space of all that it decodes.
  before, whole = tok.decode(prompt), tok.decode([*prompt, *ids])
  if whole.startswith(before):
    return whole[len(before) :]
  return tok.decode(ids)  # the prompt ends within a letter


def newest(
  workdir: str, sizes: dict[str, int] | None = None
) -> tuple[Job, train_step.Weights]:
  """The decoder in a work directory on a mesh, and its newest weights."""
  job = saved_run.load(workdir, sizes)
  return job, saved_run.restore(job, saved_run.checkpoints(job)[-1])
