"""The small configs of the systems, cut down further: they train and resume."""

import json
import pathlib
import runpy

import numpy as np
import pytest

from moe_jax.training import jobs, loop, train_step

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
TINY = {
  'model.D': 16,
  'model.H': 2,
  'model.expert_F': 16,
  'eval_every': 0,
  'checkpoint_every': 0,
  'log_every': 1,
}
SYSTEMS = {
  'coe': {'model.shared_F': 16},
  'rexmoe': {},
  'momentum': {'model.N': 2},
  'momentum_lm': {'model.attention.span': 8},
  'thor': {'model.F': 16, 'model.N': 1, 'model.encoder_N': 1},
  'vmoe': {'model.F': 16, 'model.N': 2},
}


@pytest.fixture(scope='session')
def pairs(tmp_path_factory):
  """Sentences and, as their translation, the same words backwards."""
  path = tmp_path_factory.mktemp('pairs') / 'train.tsv'
  draw = np.random.default_rng(0)
  words = 'one two three four five six seven eight nine ten'.split()
  lines = []
  for _ in range(300):
    chosen = draw.choice(words, draw.integers(2, 5)).tolist()
    lines.append(' '.join(chosen) + '\t' + ' '.join(chosen[::-1]) + '\n')
  path.write_text(''.join(lines))
  return path


def small(name, corpus, pairs, bleu=False, **changes):
  c = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']()
  c.steps, c.batch_size, c.seq_len = 3, 8, 16
  if c.data.source == 'pairs':
    c.data.update(path=str(pairs), vocab_size=290, bleu_lines=8 * bleu)
  elif c.data.source != 'digits':
    c.data.update(source='text', path=str(corpus), tokenizer='bytes')
  values = {**TINY, **SYSTEMS[name], **changes}
  c.update_from_flattened_dict(values)
  return c


def go(c, workdir):
  return loop.run(jobs.prepare(c, str(workdir)))


def losses(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return np.array([line['total_loss'] for line in lines if 'loss' in line])


@pytest.mark.slow
@pytest.mark.parametrize('name', SYSTEMS)
def test_three_steps_with_the_tpu_kernel_interpreted(
  name, corpus, pairs, tmp_path
):
  """The same losses as with the CPU kernel, and an evaluation at the end."""
  plain = go(small(name, corpus, pairs, bleu=True), tmp_path / 'cpu')
  c = small(name, corpus, pairs, **{'model.gmm': 'interpret'})
  go(c, tmp_path / 'interpret')
  found, expected = losses(tmp_path / 'interpret'), losses(tmp_path / 'cpu')
  assert len(found) == 3 and expected[2] != expected[0]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert np.isfinite(plain['eval_loss'])
  if name == 'thor':
    assert {'eval_bleu', 'eval_chrf', 'copy_bleu'} <= plain.keys()
  if name == 'vmoe':
    assert 0 <= plain['eval_accuracy'] <= 1


@pytest.mark.parametrize('name', ['momentum_lm', 'thor'])
def test_a_stopped_run_ends_as_if_it_had_not_been(
  name, corpus, pairs, tmp_path, monkeypatch, traced_once
):
  """With what lives over steps: the cache of a stream, dropout's draws."""
  dropout = 0.1 if name == 'momentum_lm' else 0.0  # of one, which is dear
  changes = {'steps': 4, 'checkpoint_every': 2, 'model.dropout': dropout}
  c = small(name, corpus, pairs, **changes)
  whole = go(c, tmp_path / 'whole')

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train_step, 'evaluate', killed)  # before the last checkpoint
    go(c, tmp_path / 'cut')
  summary = go(c, tmp_path / 'cut')
  np.testing.assert_array_equal(
    losses(tmp_path / 'cut'), losses(tmp_path / 'whole')
  )
  assert summary['eval_loss'] == whole['eval_loss']


def test_a_cache_lives_over_steps(corpus, pairs, tmp_path):
  c = small('momentum_lm', corpus, pairs, **{'optimizer.accumulate': 2})
  job = jobs.prepare(c, str(tmp_path))
  state, batches = train_step.initial_state(job), job.train_batches()
  step = train_step.make_step(job)
  assert not np.asarray(state.cache_BxNxCxD).any()
  caches = []
  for _ in range(2):
    state, _ = step(state, next(batches))
    caches.append(np.asarray(state.cache_BxNxCxD))
  assert caches[0].shape == (8, 3, 8, 16)
  assert np.abs(caches[0]).max() > 0.1 < np.abs(caches[1] - caches[0]).max()
  # The first layer's inputs are embeddings: those of the last eight tokens.
  batch = next(job.train_batches())
  first = train_step.initial_state(job)
  embed_VxD = np.asarray(first.params['embed_VxD'])
  np.testing.assert_allclose(
    caches[0][:, 0], embed_VxD[batch['ids_BxL'][:, -8:]], rtol=1e-6
  )


def test_a_stream_needs_a_model_with_a_cache(corpus, pairs, tmp_path):
  c = small('momentum', corpus, pairs, **{'data.order': 'stream'})
  with pytest.raises(ValueError, match=r"order='stream'.*'gqa'.*'pre'"):
    jobs.prepare(c, str(tmp_path))
