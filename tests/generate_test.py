"""Texts that are written: what is kept changes nothing; routes are followed."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_test import publish, values
from small import small_config

from moe_jax import config, convert, generate, models, routers, routing, train
from moe_jax import job as jobs

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NEW = 6
CASES = {
  'window': values('mixtral', sliding_window=3),
  'normed': values('qwen3_moe'),
  'latent': values('deepseek_v3'),
}


@pytest.fixture(scope='module', params=CASES)
def folder(request, tmp_path_factory):
  """A work directory of published weights."""
  place = tmp_path_factory.mktemp(request.param)
  theirs = {**CASES[request.param], 'torch_dtype': 'float32'}
  source = publish(place / 'source', theirs)
  convert.take(str(source), str(place / 'run'))
  return str(place / 'run')


def greedy(job, weights, prompts, new):
  """The same from the whole text for each token, and nothing kept."""
  model = models.bind(job.model, weights.params, weights.router_state)
  longest = max(map(len, prompts)) + new
  place_BxL = np.broadcast_to(np.arange(longest, dtype=np.int32), (1, longest))

  @jax.jit
  def logits(ids_1xL):
    batch = {
      'ids_BxL': ids_1xL,
      'segment_BxL': jnp.zeros_like(ids_1xL),
      'pos_BxL': place_BxL,
      'row_B': jnp.zeros((1,), jnp.int32),
    }
    ctx = routers.context(batch, jax.random.key(0), jnp.int32(0), train=False)
    return model(batch, ctx)[0][0]

  found = []
  for prompt in prompts:
    ids = list(prompt)
    for _ in range(new):
      padded = np.zeros((1, longest), np.int32)
      padded[0, : len(ids)] = ids
      ids.append(int(np.argmax(logits(padded)[len(ids) - 1])))
    found.append(ids[len(prompt) :])
  return found


def test_what_is_kept_changes_nothing(folder):
  job, weights = generate.newest(folder)
  found = generate.write(job, weights, PROMPTS, NEW)
  assert found.ids == greedy(job, weights, PROMPTS, NEW)
  assert len({tuple(ids) for ids in found.ids}) == 3


def test_every_mesh_writes_the_same(folder):
  job, weights = generate.newest(folder)
  alone = generate.write(job, weights, PROMPTS, NEW)
  for sizes in ({'data': 2, 'fsdp': 2}, {'tensor': 2, 'data': 4}):
    job, weights = generate.newest(folder, sizes)
    found = generate.write(job, weights, PROMPTS, NEW)
    assert found.ids == alone.ids
    for a, b in zip(found.routes, alone.routes, strict=True):
      written = [
        (a[:, :, :, i, : len(p) + NEW - 1], b[:, :, :, i, : len(p) + NEW - 1])
        for i, p in enumerate(PROMPTS)
      ]
      for own, other in written:
        np.testing.assert_array_equal(np.sort(own), np.sort(other))


def test_experts_on_other_devices_write_the_same(tmp_path):
  theirs = values('olmoe', torch_dtype='float32')
  source = publish(tmp_path / 'source', theirs)
  convert.take(str(source), str(tmp_path / 'run'))
  found = [
    generate.write(*generate.newest(str(tmp_path / 'run'), s), PROMPTS, NEW)
    for s in (None, {'expert': 4, 'data': 2})
  ]
  assert found[0].ids == found[1].ids


def test_routes_are_followed(folder):
  """Those of other weights, by every token from the first."""
  job, weights = generate.newest(folder)
  own = generate.write(job, weights, PROMPTS, NEW)
  again = generate.write(job, weights, PROMPTS, NEW, routes=own.routes)
  assert again.ids == own.ids
  draw = np.random.default_rng(0)
  other = [
    np.stack(
      [
        draw.permutation(job.model.c.E)[: a.shape[-1]]
        for _ in range(a[..., 0].size)
      ]
    ).reshape(a.shape)
    for a in own.routes
  ]
  forced = generate.write(job, weights, PROMPTS, NEW, routes=other)
  assert forced.ids != own.ids
  for a, b in zip(forced.routes, other, strict=True):
    for i, prompt in enumerate(PROMPTS):
      upto = len(prompt) + NEW - 1
      np.testing.assert_array_equal(a[:, :, :, i, :upto], b[:, :, :, i, :upto])


def test_draws_follow_the_seed_and_the_row_alone(folder):
  job, weights = generate.newest(folder)
  draw = lambda prompts, **more: (
    generate.write(job, weights, prompts, NEW, temperature=1.0, **more).ids
  )
  three, two = draw(PROMPTS), draw(PROMPTS[:2])
  assert three[:2] == two
  assert draw(PROMPTS, seed=1) != three
  best = generate.write(job, weights, PROMPTS, NEW).ids
  assert draw(PROMPTS, top_p=1e-6) == best != three


def test_a_row_ends_with_what_stops_it(folder):
  job, weights = generate.newest(folder)
  whole = generate.write(job, weights, PROMPTS, NEW).ids
  stop = whole[0][2]
  found = generate.write(job, weights, PROMPTS, NEW, stop=stop).ids
  for own, all_ids in zip(found, whole, strict=True):
    upto = all_ids.index(stop) + 1 if stop in all_ids else NEW
    assert own == all_ids[:upto]


def test_top_p_and_temperature_are_what_they_say():
  logits_V = jnp.log(jnp.array([0.1, 0.6, 0.05, 0.25]))
  keys = jax.random.split(jax.random.key(0), 4000)

  def share(**options):
    drawn = jax.vmap(lambda key: generate._sample(logits_V, key, **options))(
      keys
    )
    return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

  near = lambda a, b: np.testing.assert_allclose(a, b, atol=0.03)
  near(share(temperature=1.0, top_p=1.0), [0.1, 0.6, 0.05, 0.25])
  near(share(temperature=1.0, top_p=0.7), [0, 0.6 / 0.85, 0, 0.25 / 0.85])
  squared = np.array([0.1, 0.6, 0.05, 0.25]) ** 2
  near(share(temperature=0.5, top_p=1.0), squared / squared.sum())
  near(share(temperature=0.0, top_p=1.0), [0, 1, 0, 0])


@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
  """The work directory of a run, by its changes."""

  def make(**changes):
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    c = small_config(corpus, steps=1, log_every=0, **changes)
    train.run(jobs.prepare(c, str(workdir)))
    return workdir

  return make


@pytest.mark.parametrize(
  'prompts, new, options, message',
  [
    ([], 1, {}, 'no prompt'),
    ([[1], []], 1, {}, 'has no id'),
    ([[1, 20]], 1, {}, 'the id 20 is not one of 0 .. 19'),
    ([[1]], 0, {}, 'max_new_tokens=0'),
    ([[1]], 1, {'temperature': -1.0}, 'temperature=-1.0'),
    ([[1]], 1, {'top_p': 0.0}, 'top_p=0.0'),
    ([[1]], 1, {'routes': [np.zeros((1, 1))]}, r'shapes \[\(1, 1\)\]'),
  ],
)
def test_what_cannot_be_written(folder, prompts, new, options, message):
  job, weights = generate.newest(folder)
  with pytest.raises(ValueError, match=message):
    generate.write(job, weights, prompts, new, **options)


def test_routes_of_experts_that_are_not_there(folder):
  job, weights = generate.newest(folder)
  routes = generate.write(job, weights, PROMPTS, 2).routes
  bad = [a + 100 for a in routes]
  with pytest.raises(ValueError, match='an expert that is not one of'):
    generate.write(job, weights, PROMPTS, 2, routes=bad)


@pytest.mark.parametrize(
  'part, message',
  [
    (('router', 'expert_choice'), "'expert_choice' looks at later"),
    (('attention', 'span'), "attention 'span' keeps no keys"),
  ],
)
def test_models_that_cannot_write_are_refused(part, message, trained):
  section, name = part
  made = {'router': config.router, 'attention': config.attend}[section](name)
  workdir = trained(**{f'model__{section}': made})
  with pytest.raises(ValueError, match=message):
    generate.write(*generate.newest(str(workdir)), [[1]], 2)


def run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'moe_jax.commands.generate', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command(trained, tmp_path):
  """A dense layer first, two iterations, texts; and the routes of one run."""
  workdir = trained(model__first_dense=1, model__N=3, model__iterations=2)
  routes = tmp_path / 'routes.npz'
  common = f'--workdir={workdir}', '--prompt=4 squared', '--max_new_tokens=5'
  first = run(*common, '--json', f'--record={routes}')
  assert first.returncode == 0, first.stderr
  told = json.loads(first.stdout)
  assert len(told['ids']) == 5 and len(told['prompt_ids']) == 9
  job, weights = generate.newest(str(workdir))
  assert greedy(job, weights, [told['prompt_ids']], 5) == [told['ids']]
  assert generate.load_routes(routes)[0].shape == (2, 1, 2, 1, 14, 2)
  again = run(*common, '--json', f'--replay={routes}')
  assert json.loads(again.stdout) == told, again.stderr
  assert routing.load(str(workdir)).model.c.iterations == 2
  wrong = run(*common, '--prompt_ids=1,2')
  assert wrong.returncode == 2
  assert wrong.stderr == 'moe-generate: give either --prompt or --prompt_ids\n'
