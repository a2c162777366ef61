"""Texts that are written: what is kept changes nothing; routes are followed."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_test import drawn, publish, values
from small import command, small_config

from moe_jax import (
  checkpoint,
  config,
  convert,
  generate,
  models,
  programs,
  routers,
  routing,
  tokenizer,
)

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NEW = 6
CASES = {
  'window': values('mixtral', sliding_window=3, num_hidden_layers=2),
  'normed': values('qwen3_moe', num_hidden_layers=2),
  'latent': values('deepseek_v3', num_hidden_layers=2),
}


@functools.cache
def opened(workdir, **sizes):
  """The job, its weights and what continues prompts, greedily."""
  job, weights = generate.newest(workdir, sizes)
  return job, weights, generate.writer(job, NEW)


def lively(theirs):
  """Weights so large that each layer's answer changes what is written."""
  scale = lambda name: 1.0 if 'norm' in name or 'embed' in name else 2.0
  return {
    name: (scale(name) * a.astype(np.float32)).astype(a.dtype)
    for name, a in drawn(theirs).items()
  }


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """A work directory of published weights, by its case."""

  @functools.cache
  def make(name):
    place = tmp_path_factory.mktemp(name)
    theirs = {**CASES[name], 'torch_dtype': 'float32'}
    source = publish(place / 'source', theirs, lively(theirs))
    convert.take(str(source), str(place / 'run'))
    return str(place / 'run')

  return make


@pytest.fixture(params=CASES)
def folder(request, imported):
  return imported(request.param)


@pytest.fixture
def small(imported):
  """The one that compiles first."""
  return imported('window')


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
  job, weights, write = opened(folder)
  found = write(weights, PROMPTS)
  assert found.ids == greedy(job, weights, PROMPTS, NEW)
  assert len({tuple(ids) for ids in found.ids}) == 3


def written(routes, i):
  """Those of a prompt and of what was written but for its last id, as sets."""
  upto = len(PROMPTS[i]) + NEW - 1
  return [np.sort(a[:, :, :, i, :upto]) for a in routes]


@pytest.mark.parametrize(
  'sizes',
  [{'data': 2, 'fsdp': 2}, {'tensor': 2, 'data': 2, 'expert': 2}],
  ids=str,
)
def test_every_mesh_writes_the_same(sizes, imported):
  latent = imported('latent')
  (_, *alone), (_, *many) = (opened(latent, **s) for s in ({}, sizes))
  own, other = (write(weights, PROMPTS) for weights, write in (many, alone))
  assert own.ids == other.ids
  for i in range(len(PROMPTS)):
    a, b = written(own.routes, i), written(other.routes, i)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_routes_are_followed(folder):
  """Those that nobody chose, by every token from the first."""
  job, weights, write = opened(folder)
  own = write(weights, PROMPTS)
  assert write(weights, PROMPTS, routes=own.routes).ids == own.ids
  draw = np.random.default_rng(0)
  some = lambda a: draw.permutation(job.model.c.E)[: a.shape[-1]]
  other = [
    np.reshape([some(a) for _ in range(a[..., 0].size)], a.shape)
    for a in own.routes
  ]
  forced = write(weights, PROMPTS, routes=other)
  assert forced.ids != own.ids
  for i in range(len(PROMPTS)):
    a, b = written(forced.routes, i), written(other, i)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_draws_follow_the_seed_and_the_row_alone(small):
  job, weights, write = opened(small)
  drawing = generate.writer(job, NEW, temperature=1.0)
  three = drawing(weights, PROMPTS).ids
  assert drawing(weights, PROMPTS[:2]).ids == three[:2]
  assert drawing(weights, PROMPTS, seed=1).ids != three
  nearly = generate.writer(job, NEW, temperature=1.0, top_p=1e-6)
  assert nearly(weights, PROMPTS).ids == write(weights, PROMPTS).ids != three


def test_a_row_ends_with_what_stops_it(small):
  job, weights, write = opened(small)
  whole = write(weights, PROMPTS).ids
  stop = whole[0][2]
  found = generate.writer(job, NEW, stop=stop)(weights, PROMPTS).ids
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


@pytest.mark.parametrize(
  'new, options, message',
  [
    (0, {}, 'max_new_tokens=0'),
    (1, {'temperature': -1.0}, 'temperature=-1.0'),
    (1, {'top_p': 0.0}, 'top_p=0.0'),
  ],
)
def test_options_out_of_range(small, new, options, message):
  with pytest.raises(ValueError, match=message):
    generate.writer(opened(small)[0], new, **options)


def test_prompts_and_routes_that_do_not_fit(small):
  _, weights, write = opened(small)
  routes = write(weights, PROMPTS).routes
  for prompts, given, message in (
    ([], None, 'no prompt'),
    ([[1], []], None, 'has no id'),
    ([[1, 20]], None, 'the id 20 is not one of 0 .. 19'),
    ([[1]], routes, r'shapes \[\(2, 1, 1, 3, 11, 2\)\], .*1, 1, 7, 2\)'),
    (PROMPTS, [a + 5 for a in routes], 'an expert that is not one of 0 .. 3'),
    (PROMPTS, [a + 0.5 for a in routes], 'an expert that is not one of'),
  ):
    with pytest.raises(ValueError, match=message):
      write(weights, prompts, routes=given)


@pytest.mark.parametrize(
  'section, name, message',
  [
    ('router', 'expert_choice', "'expert_choice' looks at later"),
    ('attention', 'span', "attention 'span' keeps no keys"),
  ],
)
def test_models_that_cannot_write(section, name, message, small, tmp_path):
  c = json.loads((pathlib.Path(small) / 'config.json').read_text())
  c['model'][section] = config.choice(section, name).to_dict()
  (tmp_path / 'config.json').write_text(json.dumps(c))
  job = routing.load(str(tmp_path))
  with pytest.raises(ValueError, match=message):
    generate.writer(job, 1)


def untrained(workdir, c):
  """The work directory of a run that has just begun, with its tokenizer."""
  workdir.mkdir()
  c = {**config.resolve(c), 'corpus_sha256': 'of some text'}
  (workdir / 'config.json').write_text(json.dumps(c))
  tokenizer.Bytes().save(workdir / 'tokenizer.json')
  job = routing.load(str(workdir))
  weights = programs.Weights(jnp.int32(0), *models.split(job.init(0)))
  whole = jax.NamedSharding(job.mesh, jax.P())
  with checkpoint.Checkpoints(workdir, keep=1) as saved:
    saved.save(0, jax.device_put(weights, whole), {})


def test_the_command(corpus, tmp_path):
  """A dense layer first, two iterations, texts; and the routes of one run."""
  changes = dict(model__first_dense=1, model__N=2, model__iterations=2)
  workdir, routes = tmp_path / 'run', tmp_path / 'routes.npz'
  untrained(workdir, small_config(corpus, **changes))
  common = f'--workdir={workdir}', '--prompt=4 squared', '--max_new_tokens=5'
  first = command('generate', *common, '--json', f'--record={routes}')
  assert first.returncode == 0, first.stderr
  told = json.loads(first.stdout)
  assert len(told['ids']) == 5 and len(told['prompt_ids']) == 9
  job, weights = generate.newest(str(workdir))
  assert greedy(job, weights, [told['prompt_ids']], 5) == [told['ids']]
  assert generate.load_routes(routes)[0].shape == (1, 1, 2, 1, 14, 2)
  again = command('generate', *common, '--json', f'--replay={routes}')
  assert json.loads(again.stdout) == told, again.stderr
  wrong = command('generate', *common, '--prompt_ids=1,2')
  assert wrong.returncode == 2
  assert wrong.stderr == 'moe-generate: give either --prompt or --prompt_ids\n'
