"""Bad numbers: the rule by hand, and whole runs on poisoned data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checks.faults import child
from moe_jax import config
from moe_jax.optim import guard
from moe_jax.training import jobs, loop, train_step
from tests.helpers.small import lines_of, small_config, without_clocks


def rule(spike=0.0, skips=2, rollbacks=1):
  return guard.Config(spike=spike, skips=skips, rollbacks=rollbacks)


def judged(c, losses, norm=1.0):
  """Which of the steps with these losses are bad, and the last state."""
  state, found = guard.init(), []
  for loss in losses:
    bad, state = guard.judge(c, state, jnp.float32(loss), jnp.float32(norm))
    found.append(bool(bad))
  return found, state


def test_what_is_not_finite_is_bad():
  found, state = judged(rule(), [1.0, np.nan, 2.0, np.inf, -np.inf])
  assert found == [False, True, False, True, True]
  assert (int(state.skipped), int(state.row), int(state.good)) == (3, 2, 2)
  assert judged(rule(), [1.0], norm=np.nan)[0] == [True]
  assert judged(rule(), [1.0], norm=np.inf)[0] == [True]


def test_a_spike_is_bad_by_the_deviation_of_good_steps():
  draws = np.random.default_rng(0).normal(3.0, 0.1, 200)
  found, state = judged(rule(spike=6.0), [*draws, 4.0, 3.1, 4.0])
  assert found == [False] * 200 + [True, False, True]
  np.testing.assert_allclose(state.mean, 3.0, atol=0.05)
  np.testing.assert_allclose(np.sqrt(state.variance), 0.1, rtol=0.3)
  # Not without the rule, not before there is something to compare with.
  assert not any(judged(rule(), [*draws, 4.0])[0])
  assert not any(judged(rule(spike=6.0), [3.0] * 20 + [9.0])[0])


def test_mean_and_variance_begin_as_plain_ones():
  losses = np.random.default_rng(1).normal(size=guard.KNOWN)
  _, state = judged(rule(), losses)
  np.testing.assert_allclose(state.mean, losses.mean(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(state.variance, losses.var(), rtol=1e-4)


@pytest.mark.parametrize(
  'field, value', [('spike', -1.0), ('skips', 0), ('rollbacks', -1)]
)
def test_a_rule_that_cannot_be_is_named(field, value):
  with pytest.raises(ValueError, match=f'guard.{field}={value} is not'):
    rule(**{field: value})


# --- whole runs ---------------------------------------------------------------
# Of as many steps as others where they can, which makes them one program.

pytestmark = pytest.mark.usefixtures('traced_once')


def poisoned(c, workdir, steps):
  """A job whose loss is NaN in these steps' batches, by their data."""
  which = ','.join(map(str, sorted(steps)))
  job = child.poisoned(jobs.prepare(c, str(workdir)), which)
  job.objective.variant = which
  return job


def test_a_bad_step_changes_nothing_but_the_count(corpus, tmp_path):
  c = small_config(corpus, steps=8, model__router__bias_rate=0.01)
  c.model.router.score = 'sigmoid'
  job = poisoned(c, tmp_path, {2})
  batches, step = job.train_batches(), train_step.make_step(job)
  state = train_step.initial_state(job)
  state, _ = step(state, job.put(next(batches)))
  before = jax.device_get(state)
  state, found = step(state, job.put(next(batches)))
  after = jax.device_get(state)
  assert not np.isfinite(found['loss'])
  assert (int(after.step), int(after.guard.row)) == (2, 1)
  jax.tree.map(np.testing.assert_array_equal, before[1:5], after[1:5])
  state, _ = step(state, job.put(next(batches)))
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), after.params, state.params
  )
  assert any(jax.tree.leaves(moved)) and int(state.guard.row) == 0


def test_after_skipped_steps_the_rate_is_the_one_that_is_logged(
  corpus, tmp_path
):
  """A weight without a gradient moves by the rate times its decay."""
  c = small_config(corpus, steps=8, model__tied=False, guard__skips=9)
  c.optimizer.update(learning_rate=0.1, weight_decay=0.5, warmup=0.0)
  job = poisoned(c, tmp_path, {2, 3, 4})
  batches, step = job.train_batches(), train_step.make_step(job)
  state, rates = train_step.initial_state(job), []
  for _ in range(6):
    before = np.asarray(state.params['embed_VxD'][255])  # of no byte there
    state, _ = step(state, job.put(next(batches)))
    lost = 1 - np.asarray(state.params['embed_VxD'][255]) / before
    rates.append(lost.mean() / 0.5)
  expected = [0 if i in (1, 2, 3) else job.schedule(i) for i in range(6)]
  np.testing.assert_allclose(rates, expected, 1e-3, 1e-6)


def test_streams_begin_anew_after_a_skipped_step(corpus, tmp_path):
  """What follows the skipped blocks does not follow those before them."""
  c = small_config(corpus, steps=8, data__order='stream', model__tied=False)
  c.model.block, c.model.pattern = 'momentum_lm', 'm'
  c.model.attention = config.attend('adaptive_span', span=4)
  job = poisoned(c, tmp_path, {2})
  batches, step = job.train_batches(), train_step.make_step(job)
  state, kept = train_step.initial_state(job), []
  for _ in range(3):
    state, _ = step(state, job.put(next(batches)))
    kept.append(bool(jnp.any(state.cache_BxNxCxD)))
  assert kept == [True, False, True]
  assert not jnp.any(train_step.without_cache(state).cache_BxNxCxD)


def test_the_first_loss_is_of_the_first_step_that_counts(corpus, tmp_path):
  c = small_config(corpus, steps=8)
  summary = loop.run(poisoned(c, tmp_path, {1}))
  assert summary['initial_loss'] == pytest.approx(
    lines_of(tmp_path)[1]['loss'], rel=1e-6
  )


def test_a_run_that_ends_in_nan_fails_and_its_summary_is_json(
  corpus, tmp_path, monkeypatch
):
  c = small_config(corpus, steps=8)
  nan = lambda *_: {'eval_loss': float('nan'), 'eval_bits_per_byte': np.nan}
  monkeypatch.setattr(train_step, 'evaluate', nan)
  with pytest.raises(loop.Stopped, match='held-out loss is not finite'):
    loop.run(jobs.prepare(c, str(tmp_path)))
  refuse = lambda name: pytest.fail(f'{name} is no JSON')
  text = (tmp_path / 'summary.json').read_text()
  assert json.loads(text, parse_constant=refuse)['eval_loss'] is None
  with pytest.raises(ValueError, match='held-out loss is not finite'):
    jobs.prepare(c, str(tmp_path))


def test_a_skipped_step_is_counted_and_told(corpus, tmp_path, capsys):
  c = small_config(corpus, steps=8)
  loop.run(poisoned(c, tmp_path, {4}))
  lines = lines_of(tmp_path)[:8]
  assert [line['skipped'] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1]
  assert [i for i, line in enumerate(lines, 1) if line.get('bad')] == [4]
  assert lines[3]['total_loss'] is None
  assert 'step 4: bad numbers, skipped; 1 in a row' in capsys.readouterr().err


@pytest.mark.parametrize('bad, back', [({4, 5}, 3), ({2, 3}, 0)])
def test_a_run_goes_back_and_on_with_other_data(
  corpus, tmp_path, capsys, bad, back
):
  """To the checkpoint of step 3, or where there is none to the beginning."""
  c = small_config(corpus, steps=8, checkpoint_every=3, guard__skips=2)
  job = poisoned(c, tmp_path / 'bad', bad)
  summary = loop.run(job)
  told = capsys.readouterr().err
  assert f'back to step {back}, and on with the data that follow' in told
  lines = lines_of(tmp_path / 'bad')
  steps = [line['step'] for line in lines if 'loss' in line]
  assert steps == list(range(1, 9))
  assert lines[-2]['skipped'] == 2 and summary['steps'] == 8
  # As a run that never saw the bad batches, nor the one that was under way.
  clean = jobs.prepare(c, str(tmp_path / 'clean'))
  batches, state = clean.train_batches(), train_step.initial_state(clean)
  step = train_step.make_step(clean)
  left_out = {i + 1 for i in bad} | bad | set(range(back + 1, min(bad)))
  for i in range(1, 9 + len(left_out)):
    batch = next(batches)
    if i not in left_out:
      state, found = step(state, clean.put(batch))
  np.testing.assert_allclose(
    float(found['loss']), lines[-2]['total_loss'], rtol=1e-6
  )


def test_a_run_that_was_killed_after_it_went_back_ends_the_same(
  corpus, tmp_path, monkeypatch
):
  c = small_config(corpus, steps=8, checkpoint_every=3, guard__skips=2)
  loop.run(poisoned(c, tmp_path / 'whole', {4, 5}))
  read = jobs.Job.put
  count = []

  def put_then_die(job, batch):
    count.append(1)
    if len(count) == 8:
      raise KeyboardInterrupt
    return read(job, batch)

  job = poisoned(c, tmp_path / 'killed', {4, 5})
  monkeypatch.setattr(jobs.Job, 'put', put_then_die)
  with pytest.raises(KeyboardInterrupt):
    loop.run(job)
  monkeypatch.undo()
  loop.run(poisoned(c, tmp_path / 'killed', {4, 5}))
  found, expected = (
    without_clocks(lines_of(tmp_path / name)) for name in ('killed', 'whole')
  )
  assert found == expected


@pytest.mark.parametrize('bad', [{4, 5}, {7, 8}], ids=['amid', 'at the end'])
def test_a_kill_before_it_would_have_stopped(
  corpus, tmp_path, monkeypatch, bad
):
  """The last step's verdict is in the checkpoint: it stops all the same."""
  c = small_config(corpus, steps=8, checkpoint_every=1, guard__skips=2)
  c.guard.rollbacks = 0
  # Where the first bad number is takes long to find, and is tested below.
  told = lambda *_: 'the loss'
  monkeypatch.setattr(train_step, 'first_bad_number', told)
  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, '_go_back', _die)
    with pytest.raises(KeyboardInterrupt):
      loop.run(poisoned(c, tmp_path, bad))
  with pytest.raises(loop.Stopped, match='2 steps in a row had bad numbers'):
    loop.run(poisoned(c, tmp_path, bad))


def _die(run, *_):
  run.saved.close()
  raise KeyboardInterrupt


def test_it_stops_and_says_where_the_first_bad_number_is(corpus, tmp_path):
  c = small_config(corpus, steps=9, guard__skips=2, guard__rollbacks=1)
  c.optimizer.update(learning_rate=1e30, clip=0.0, warmup=0.0)
  with pytest.raises(loop.Stopped) as error:
    loop.run(jobs.prepare(c, str(tmp_path)))
  told = str(error.value)
  assert '2 steps in a row had bad numbers, after 1 rollbacks: ' in told
  assert 'made by' in told and 'moe_jax/' in told and '\n' not in told


def test_a_bad_parameter_is_named_with_its_layer(corpus, tmp_path):
  job = jobs.prepare(small_config(corpus, model__N=3), str(tmp_path))
  state = train_step.initial_state(job)
  name = 'trunk.body.pools.up_ExDxF'

  def poke(value):
    def one(path, a):
      here = jax.tree_util.keystr(path, simple=True, separator='.') == name
      return a.at[2].set(value) if here else a

    params = jax.tree_util.tree_map_with_path(one, state.params)
    return state._replace(params=params)

  batch = job.put(next(job.train_batches()))
  told = train_step.first_bad_number(job, poke(jnp.nan), batch)
  assert told == f'the parameter {name}[2] is not finite'
  told = train_step.first_bad_number(job, poke(1e38), batch)
  assert 'moe_jax/' in told and told.endswith('pool 2, layer 0')
