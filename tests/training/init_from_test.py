"""Runs that begin from the weights of another work directory."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from moe_jax import config, models, objectives, routers
from moe_jax.decode import generate
from moe_jax.training import checkpoint, jobs, loop, saved_run, train_step
from moe_jax.weights import convert
from tests.helpers.small import lines_of, small_config
from tests.weights.convert_test import described, publish, V, values


def words(path, size, end='</s>'):
  """A tokenizer of `size` words, the last of them a separator."""
  known = {f'w{i}': i for i in range(size - 1)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, 'w0'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens([end])
  made.save(str(path))


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Documents of words."""
  path = tmp_path_factory.mktemp('text') / 'text.jsonl'
  draw = np.random.default_rng(0)
  line = lambda: ' '.join(f'w{i}' for i in draw.integers(0, 15, 30))
  lines = [json.dumps({'text': line()}) for _ in range(60)]
  path.write_text('\n'.join(lines))
  return path


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """Published weights; two rows of the embedding have no word."""
  place = tmp_path_factory.mktemp('imported')
  source = publish(place / 'source', values('mixtral', num_hidden_layers=1))
  words(source / 'tokenizer.json', V - 2)
  convert.take(str(source), str(place / 'run'))
  return place / 'run'


def begun(imported, text, **changes):
  c = config.begin(str(imported))
  c.steps, c.batch_size, c.seq_len, c.log_every = 2, 8, 16, 1
  c.data.update(path=str(text), field='text', eval_fraction=0.2)
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


def first_loss(workdir, batch):
  """Of the weights in a work directory, as moe-generate opens them."""
  job, weights = generate.newest(str(workdir))

  @jax.jit
  def nll(weights, batch):
    model = models.bind(job.model, weights.params, weights.router_state)
    ctx = routers.context(batch, jax.random.key(0), jnp.int32(0), train=False)
    logits_BxLxV, _ = model(batch, ctx)
    return objectives.cross_entropy(logits_BxLxV, batch['target_BxL'])

  nll_BxL = np.asarray(nll(weights, batch))
  return float(np.sum(nll_BxL * batch['mask_BxL']) / np.sum(batch['mask_BxL']))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))


def test_the_first_loss_is_that_of_the_imported_model(imported, text, tmp_path):
  """Two steps; what was saved wins over the source, which may be gone."""
  shutil.copytree(imported, tmp_path / 'source')
  c = begun(tmp_path / 'source', text)
  c.data.tokenizer = str(imported / 'tokenizer.json')
  job = jobs.prepare(c, str(tmp_path / 'run'))
  expected = first_loss(imported, next(job.train_batches()))
  summary = loop.run(job)
  np.testing.assert_allclose(summary['initial_loss'], expected, rtol=2e-6)
  lines = lines_of(tmp_path / 'run')
  assert lines[1]['loss'] < expected - 0.02
  shutil.rmtree(tmp_path / 'source')
  (tmp_path / 'run' / 'summary.json').unlink()
  again = loop.run(jobs.prepare(c, str(tmp_path / 'run')))
  assert again['initial_loss'] == summary['initial_loss']
  assert again['eval_loss'] == summary['eval_loss']
  assert lines_of(tmp_path / 'run') == lines
  assert int(generate.newest(str(tmp_path / 'run'))[1].step) == 2
  # Its texts end, and it is exported, as the published model.
  kept = lambda folder: {
    path.name: path.read_bytes()
    for path in (folder / checkpoint.ASIDE).iterdir()
  }
  assert kept(tmp_path / 'run') == kept(imported)
  (tmp_path / 'run' / checkpoint.ASIDE / 'generation_config.json').write_text(
    '{"eos_token_id": [1, 2]}'
  )
  assert generate.ends(saved_run.load(str(tmp_path / 'run'))) == {1, 2}


def test_weights_go_straight_to_the_mesh(imported, text, tmp_path):
  alone = generate.newest(str(imported))[1]
  c = begun(imported, text, mesh__fsdp=2, mesh__expert=3, batch_size=6)
  job = jobs.prepare(c, str(tmp_path / 'run'))
  found = train_step.initial_state(job)
  same(found.params, alone.params)
  up_GxExDxF = found.params['trunk']['body']['pools']['up_ExDxF']
  assert up_GxExDxF.addressable_shards[0].data.shape == (1, 1, 4, 10)


def test_the_optimizer_and_the_step_begin_anew(corpus, tmp_path):
  """And router state goes along, with the weights of the newest step."""
  c = small_config(corpus, model__N=1, model__router__bias_rate=0.01)
  old = jobs.prepare(c, str(tmp_path / 'old'))
  described(tmp_path / 'old', old.config)
  old.dataset.save(tmp_path / 'old')
  whole = jax.NamedSharding(old.mesh, jax.P())
  with checkpoint.Checkpoints(tmp_path / 'old', keep=2) as saved:
    for step in (2, 3):
      made = lambda a, step=step: np.full(a.shape, step, a.dtype)
      state = jax.tree.map(made, train_step.abstract_state(old))
      saved.save(step, jax.device_put(state, whole), {})
  new = config.begin(str(tmp_path / 'old'))
  new.batch_size, new.model.dropout = 8, 0.1
  job = jobs.prepare(new, str(tmp_path / 'run'))
  found = train_step.initial_state(job)
  like = train_step.abstract_weights(job)
  kept = checkpoint.read(tmp_path / 'old', 3, like)
  same(found.params, kept.params)
  same(found.router_state, kept.router_state)
  assert np.any(jax.tree.leaves(kept.router_state)[0])
  new.init_from = ''
  fresh = train_step.initial_state(jobs.prepare(new, str(tmp_path / 'run')))
  same(found.opt_state, fresh.opt_state)
  same((found.step, found.seed), (fresh.step, fresh.seed))
  both = jax.device_get((fresh, found))
  different = jax.tree.map(lambda a, b: np.any(a != b), *both)
  assert all(jax.tree.leaves(different.router_state))
  new.init_from, new.model.router.bias_rate = str(tmp_path / 'old'), 0.0
  told = r'bias_E is float32\[1, 1, 1, 4\] there, and nothing in this run'
  with pytest.raises(ValueError, match=told):
    jobs.prepare(new, str(tmp_path / 'run'))


def _of(folder, **model):
  c = json.loads((folder / 'config.json').read_text())
  c['model'].update(model)
  (folder / 'config.json').write_text(json.dumps(c))


@pytest.mark.parametrize(
  'changes, damage, message',
  [
    ({'model__D': 16}, None, 'another model: model.D: 8 -> 16'),
    ({'model__attention__theta': 1e4}, None, 'model.attention.theta: 100.0 ->'),
    ({'model__router__k': 1}, None, 'model.router.k: 2 -> 1'),
    (
      {'data__padded_size': V + 4},
      None,
      rf'embed_VxD is float32\[{V}, 8\] there, and float32\[{V + 4}, 8\]',
    ),
    ({'data__padded_size': V - 3}, None, 'padded_size is 17, less than the 18'),
    (
      {'data__tokenizer': 'bytes', 'data__padded_size': 0},
      None,
      "data.tokenizer='bytes' has another vocabulary than",
    ),
    ({'model__dtype': 'float64'}, None, 'float32.* there, and float64'),
    ({}, lambda f: _of(f, eps=0.5), 'model.eps: 0.5 -> 1e-05'),
    ({}, lambda f: _of(f, E=8), 'model.E: 8 -> 3'),
    ({}, lambda f: shutil.rmtree(f / 'checkpoints'), 'has no checkpoint'),
    ({}, lambda f: (f / 'config.json').unlink(), 'has no config.json'),
    ({}, lambda f: (f / 'tokenizer.json').unlink(), 'tokenizer.json'),
  ],
)
def test_what_does_not_fit_is_one_line(
  changes, damage, message, imported, text, tmp_path
):
  shutil.copytree(imported, tmp_path / 'source')
  c = begun(imported, text, **changes)
  if c.data.tokenizer == 'bytes':
    c.data.separator = ''
  c.init_from = str(tmp_path / 'source')
  if damage:
    damage(tmp_path / 'source')
  with pytest.raises(ValueError, match=message) as caught:
    jobs.prepare(c, str(tmp_path / 'run'))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


def test_a_damaged_beginning_stops_the_run(imported, text, tmp_path):
  shutil.copytree(imported, tmp_path / 'source')
  shutil.rmtree(tmp_path / 'source' / 'checkpoints' / '0' / 'data')
  c = begun(imported, text)
  c.init_from = str(tmp_path / 'source')
  job = jobs.prepare(c, str(tmp_path / 'run'))
  with pytest.raises(loop.Stopped, match='no whole checkpoint: step 0') as told:
    loop.run(job)
  assert '\n' not in str(told.value)
