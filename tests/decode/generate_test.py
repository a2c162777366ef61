"""Texts that are written: what is kept changes nothing; routes are followed."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config, models, routers
from moe_jax.decode import generate
from moe_jax.training import saved_run
from moe_jax.weights import families
from tests.helpers.small import command, small_config
from tests.weights.convert_test import begun, made, values

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NEW = 6
# Two layers that are alike, two that differ, and one.
CASES = {
  'window': values('mixtral', sliding_window=3, num_hidden_layers=2),
  'normed': values('qwen3_moe', num_hidden_layers=2),
  'mla': values('deepseek_v3', num_hidden_layers=1, first_k_dense_replace=0),
}


DENSE = values('llama', num_hidden_layers=1)


@functools.cache
def opened(workdir, **sizes):
  """The job, its weights and what continues prompts, greedily."""
  job, weights = generate.newest(workdir, sizes)
  return job, weights, generate.writer(job, NEW)


@pytest.fixture(scope='module')
def lively(tmp_path_factory):
  """A work directory of a model whose layers change what is written."""

  @functools.cache
  def make(name):
    theirs = {**CASES, 'dense': DENSE}[name]
    keys = families.ours({**theirs, 'torch_dtype': 'float32'})[1]
    keys['iterations'] = 2 if name == 'normed' else 1
    return str(made(tmp_path_factory.mktemp(name) / 'run', keys))

  return make


@pytest.fixture
def small(lively):
  """The one that compiles first."""
  return lively('dense')


def greedy(job, weights, prompts, new, routes=None):
  """The same from the whole text for each token, and nothing kept.

  Routes are of one prompt alone.
  """
  longest = max(map(len, prompts)) + new
  place_BxL = np.arange(longest, dtype=np.int32)[None]
  replay = routes and [a[:, :, :, 0] for a in routes]

  @jax.jit
  def logits(weights, ids_1xL, replay):
    model = models.bind(job.model, weights.params, weights.router_state)
    batch = {
      'ids_BxL': ids_1xL,
      'segment_BxL': jnp.zeros_like(ids_1xL),
      'pos_BxL': place_BxL,
      'row_B': jnp.zeros((1,), jnp.int32),
    }
    key = jax.random.key(0)
    ctx = routers.context(batch, key, jnp.int32(0), train=False, replay=replay)
    return model(batch, ctx)[0][0]

  found = []
  for prompt in prompts:
    ids = list(prompt)
    for _ in range(new):
      padded = np.zeros((1, longest), np.int32)
      padded[0, : len(ids)] = ids
      logits_LxV = np.asarray(logits(weights, padded, replay))
      ids.append(int(np.argmax(logits_LxV[len(ids) - 1])))
    found.append(ids[len(prompt) :])
  return found


@pytest.mark.parametrize('name', CASES)
def test_what_is_kept_changes_nothing(name, lively):
  job, weights, write = opened(lively(name))
  found = write(weights, PROMPTS)
  assert found.ids == greedy(job, weights, PROMPTS, NEW)
  assert len({tuple(ids) for ids in found.ids}) == 3


def written(routes, i):
  """Those of a prompt and of what was written but for its last id, as sets."""
  upto = len(PROMPTS[i]) + NEW - 1
  return [np.sort(a[:, :, :, i, :upto]) for a in routes]


@pytest.mark.parametrize(
  'name, sizes',
  [
    ('window', {'data': 2, 'fsdp': 2}),
    ('mla', {'tensor': 2, 'data': 2, 'expert': 2}),
  ],
  ids=str,
)
def test_every_mesh_writes_the_same(name, sizes, lively):
  folder = lively(name)
  (_, *alone), (_, *many) = (opened(folder, **s) for s in ({}, sizes))
  own, other = (write(weights, PROMPTS) for weights, write in (many, alone))
  assert own.ids == other.ids
  for i in range(len(PROMPTS)):
    a, b = written(own.routes, i), written(other.routes, i)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_routes_are_followed(lively):
  """Those that nobody chose, by every token from the first."""
  job, weights, write = opened(lively('mla'))
  own = write(weights, PROMPTS)
  assert write(weights, PROMPTS, routes=own.routes).ids == own.ids
  draw = np.random.default_rng(0)
  some = lambda a: draw.permutation(job.model.c.E)[: a.shape[-1]]
  other = [
    np.reshape([some(a) for _ in range(a[..., 0].size)], a.shape)
    for a in own.routes
  ]
  replay = write(weights, PROMPTS, routes=other)
  assert replay.ids != own.ids
  for i in range(len(PROMPTS)):
    a, b = written(replay.routes, i), written(other, i)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_draws_follow_the_seed_and_the_row_alone(small):
  job, weights, write = opened(small)
  drawing = generate.writer(job, NEW, temperature=1.0)
  three = drawing(weights, PROMPTS).ids
  assert drawing(weights, PROMPTS[:2]).ids == three[:2]
  assert drawing(weights, PROMPTS, seed=1).ids != three
  assert write(weights, PROMPTS).ids != three


def test_the_environment_does_not_change_the_precision(small):
  _, weights, write = opened(small)
  with jax.enable_x64(True):
    _, wide, write_there = opened.__wrapped__(small)
    found = write_there(wide, PROMPTS).ids
  assert jax.tree.map(lambda a: a.dtype, wide) == jax.tree.map(
    lambda a: a.dtype, weights
  )
  assert found == write(weights, PROMPTS).ids


def test_a_row_ends_with_what_stops_it(small):
  """With so small a top_p that the best id is drawn."""
  job, weights, write = opened(small)
  whole = write(weights, PROMPTS).ids
  stop = {whole[0][2], whole[1][4]}  # any of several
  nearly = generate.writer(job, NEW, temperature=1.0, top_p=1e-6, stop=stop)
  found = nearly(weights, PROMPTS).ids
  for own, all_ids in zip(found, whole, strict=True):
    upto = min([all_ids.index(i) + 1 for i in stop if i in all_ids] or [NEW])
    assert own == all_ids[:upto]
  assert len(found[0]) <= 3 and len(found[1]) <= 5


def test_top_p_and_temperature_are_what_they_say():
  logits_V = np.log(np.float32([0.1, 0.6, 0.05, 0.25]))

  def share(**options):
    @jax.jit
    def draw():
      keys = jax.random.split(jax.random.key(0), 4000)
      one = lambda key: generate._sample(jnp.asarray(logits_V), key, **options)
      return jax.vmap(one)(keys)

    return np.bincount(np.asarray(draw()), minlength=4) / 4000

  near = lambda a, b: np.testing.assert_allclose(a, b, atol=0.03)
  near(share(temperature=1.0, top_p=1.0), [0.1, 0.6, 0.05, 0.25])
  near(share(temperature=1.0, top_p=0.7), [0, 0.6 / 0.85, 0, 0.25 / 0.85])
  squared = np.array([0.1, 0.6, 0.05, 0.25]) ** 2
  near(share(temperature=0.5, top_p=1.0), squared / squared.sum())
  near(share(temperature=0.0, top_p=1.0), [0, 1, 0, 0])
  # Less than a float32 can be, than is normal, and than logits can be divided.
  for little in (1e-60, 1e-40, 1e-38):
    near(share(temperature=little, top_p=1.0), [0, 1, 0, 0])
    near(share(temperature=1.0, top_p=little), [0, 1, 0, 0])


@pytest.mark.parametrize(
  'new, options, message',
  [
    (0, {}, 'max_new_tokens=0'),
    (1, {'temperature': -1.0}, 'temperature=-1.0'),
    (1, {'temperature': float('nan')}, 'temperature=nan'),
    (1, {'temperature': float('inf')}, 'temperature=inf'),
    (1, {'top_p': float('nan')}, 'top_p=nan'),
    (1, {'top_p': 0.0}, 'top_p=0.0'),
  ],
)
def test_options_out_of_range(small, new, options, message):
  with pytest.raises(ValueError, match=message):
    generate.writer(opened(small)[0], new, **options)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_a_seed_out_of_range(small, seed):
  _, weights, write = opened(small)
  with pytest.raises(
    ValueError, match=rf'seed={seed} is not in \[0, 2\*\*32\)'
  ):
    write(weights, PROMPTS, seed)


@pytest.mark.parametrize('read', ['routes', 'routes.npz'])
@pytest.mark.parametrize('wrote', ['routes', 'routes.npz', '~/routes'])
def test_routes_are_found_by_the_name_they_were_given(
  tmp_path, monkeypatch, wrote, read
):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  routes = [np.arange(6, dtype=np.int32).reshape(1, 1, 1, 1, 3, 2)]
  generate.save_routes(wrote, routes)
  assert [p.name for p in tmp_path.iterdir()] == ['routes.npz']
  np.testing.assert_array_equal(generate.load_routes(read), routes)
  with pytest.raises(ValueError, match=r'^no/routes: there is no folder'):
    generate.routes_file('no/routes')


def test_prompts_and_routes_that_do_not_fit(lively):
  _, weights, write = opened(lively('window'))
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
    ('attention', 'adaptive_span', "attention 'adaptive_span' keeps no keys"),
  ],
)
def test_models_that_cannot_write(section, name, message, lively, tmp_path):
  path = pathlib.Path(lively('window')) / 'config.json'
  c = json.loads(path.read_text())
  c['model'][section] = config.choice(section, name).to_dict()
  (tmp_path / 'config.json').write_text(json.dumps(c))
  job = saved_run.load(str(tmp_path))
  with pytest.raises(ValueError, match=message):
    generate.writer(job, 1)


def test_the_command(corpus, tmp_path):
  """A dense layer first, two iterations, texts; routes are read and written."""
  changes = dict(model__first_dense=1, model__N=2, model__iterations=2)
  workdir, given, kept = (tmp_path / n for n in ('run', 'a.npz', 'b.npz'))
  begun(small_config(corpus, **changes), workdir)
  draw = np.random.default_rng(0)
  experts = [draw.permutation(4)[:2] for _ in range(2 * 14)]
  routes = [np.reshape(experts, (1, 1, 2, 1, 14, 2)).astype(np.int32)]
  generate.save_routes(given, routes)
  common = f'--workdir={workdir}', '--prompt=4 squared', '--max_new_tokens=5'
  files = f'--replay={given}', f'--record={kept}'
  done = command('generate', *common, '--json', *files)
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert len(told['ids']) == 5 and len(told['prompt_ids']) == 9
  job, weights = generate.newest(str(workdir))
  expected = greedy(job, weights, [told['prompt_ids']], 5, routes)
  assert expected == [told['ids']]
  (followed,) = generate.load_routes(kept)
  assert followed.shape == routes[0].shape
  a, b = (np.sort(a[..., :13, :]) for a in (followed, routes[0]))
  np.testing.assert_array_equal(a, b)  # the last id was not read
  wrong = command('generate', *common, '--prompt_ids=1,2')
  assert wrong.returncode == 2
  assert wrong.stderr == 'moe-generate: give either --prompt or --prompt_ids\n'
