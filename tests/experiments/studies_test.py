"""Studies: statistics, verdicts, what may be mixed, and one from end to end."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.harness import (
  claims,
  pages,
  pictures,
  results,
  runner,
  sources,
  tables,
  trial,
  variants,
)
from experiments.harness.claims import Claim

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = results.names()


def test_paired_differences_are_students():
  draw = np.random.default_rng(0)
  against = draw.normal(size=7)
  found = against + draw.normal(0.3, 0.1, 7)
  finding = claims.paired(found, against)
  expected = stats.ttest_rel(found, against).confidence_interval(0.95)
  low, high = finding.mean - finding.half, finding.mean + finding.half
  np.testing.assert_allclose((low, high), expected, rtol=1e-12)
  assert finding.n == 7
  with pytest.raises(ValueError, match='1 seeds'):
    claims.paired([1.0], [2.0])


def test_the_resolvable_effect_is_found_in_80_of_100_studies():
  draw = np.random.default_rng(1)
  spread, n = 1.0, 5
  t = stats.t(n - 1)
  effect = (t.ppf(0.975) + t.ppf(0.8)) * spread / math.sqrt(n)
  margins, hits = [], 0
  for _ in range(4000):
    finding = claims.paired(draw.normal(-effect, spread, n), np.zeros(n))
    margins.append(finding.margin)
    hits += finding.mean + finding.half < 0
  assert 0.75 < hits / 4000 < 0.9
  # A deviation of 5 is 6 % too small in the mean.
  assert 0.9 * effect < np.mean(margins) < effect


@pytest.mark.parametrize(
  ('mean', 'half', 'low', 'high', 'verdict'),
  [
    (-0.3, 0.2, -math.inf, 0.0, claims.SUPPORTED),
    (-0.1, 0.2, -math.inf, 0.0, claims.NOT_RESOLVED),
    (+0.3, 0.2, -math.inf, 0.0, claims.CONTRADICTED),
    (+0.3, 0.2, 0.0, math.inf, claims.SUPPORTED),
    (0.01, 0.02, -math.inf, 0.05, claims.SUPPORTED),  # no worse by 0.05
    (0.01, 0.02, -0.05, 0.05, claims.SUPPORTED),  # equal to 0.05
    (0.04, 0.02, -0.05, 0.05, claims.NOT_RESOLVED),
    (0.08, 0.02, -0.05, 0.05, claims.CONTRADICTED),
  ],
)
def test_a_verdict_is_about_the_whole_interval(mean, half, low, high, verdict):
  claim = Claim('', low=low, high=high)
  for n in (3, 5):
    finding = claims.Finding(mean, half, n, 0.0)
    assert claims.verdict(claim, finding) == verdict
  of_two = claims.Finding(mean, half, 2, 0.0)
  assert claims.verdict(claim, of_two) == claims.NOT_RESOLVED


@pytest.mark.parametrize(
  ('low', 'high', 'size'),
  [
    (-math.inf, 0.0, 0.3),
    (0.0, math.inf, 0.3),
    (-math.inf, 0.02, 0.32),  # no worse by 0.02: less than that says nothing
    (-0.02, math.inf, 0.32),
    (-0.05, 0.02, 0.35),
  ],
)
def test_what_would_have_been_resolved_lies_beyond_the_bound(low, high, size):
  finding = claims.Finding(0.1, 0.25, 5, 0.3)
  found = claims.resolvable(Claim('', low=low, high=high), finding)
  assert found == pytest.approx(size)


def test_only_seeds_of_both_arms_are_compared():
  rows = [
    {'arm': arm, 'seed': seed, 'eval_loss': value}
    for arm, values in (('a', (1.0, 2.0, 9.0)), ('b', (1.5, 2.7)))
    for seed, value in enumerate(values)
  ]
  finding = claims.find(Claim('', 'a', 'b'), rows)
  assert finding.n == 2 and finding.mean == pytest.approx(-0.6)
  rows[0]['eval_loss'] = None  # was not finite
  assert claims.find(Claim('', 'a', 'b'), rows) is None
  assert claims.find(Claim('', untestable='no chip'), rows) is None
  untestable = Claim('', untestable='no chip')
  assert claims.verdict(untestable, None) == claims.NOT_TESTABLE


@pytest.mark.parametrize('name', STUDIES)
def test_a_study_is_whole(name):
  """Its claims are about its arms; its files are there."""
  study = results.study(name)
  folder = results.folder(study)
  assert set(study.DATA) <= set(sources.SOURCES)
  text = (folder / 'README.md').read_text()
  assert f'<!-- by python -m experiments.run {name} -->\n' in text
  for source in study.DATA:
    assert source in text
  assert (folder / 'plot.py').exists()
  results.measure(study)
  metrics = {*study.COLUMNS}
  for claim in study.CLAIMS:
    assert claim.untestable or claim.metric in metrics
  rows = results.read(study)
  arms = {row['arm'] for row in rows}
  for claim in study.CLAIMS if rows else ():
    assert claim.untestable or {claim.arm, claim.against} <= arms
  # The tables are those of the lines.
  if rows:
    for part in (tables.arms(study, rows), tables.claims_of(study, rows)):
      assert part in text
    assert (folder / f'{name}.png').exists()


def test_the_table_of_variants_is_that_of_the_lines():
  assert variants.table() in (ROOT / 'README.md').read_text()


def test_no_other_file_is_called_as_results_are():
  found = {p.parent.name for p in ROOT.glob('experiments/**/results.jsonl')}
  assert found <= set(STUDIES)


def test_what_stands_between_marks_is_replaced(tmp_path):
  page = tmp_path / 'README.md'
  page.write_text('a\n<!-- by x y -->\nold\n<!-- end -->\nb\n')
  for text in ('one\n', 'two\n'):
    pages.put(page, 'x y', text)
    assert page.read_text() == (
      f'a\n<!-- by x y -->\n\n{text}\n<!-- end -->\nb\n'
    )


STUDY = """
import pathlib
from experiments.harness.claims import Claim
from moe_jax import config

DATA = ()
COLUMNS = {'eval_loss': 'nats', 'twice': 'twice'}
CLAIMS = [Claim('x', 'two', 'one'), Claim('y', untestable='no chip')]

def arms(data):
  def arm(name):
    c = config.default()
    c.description = name  # so that both arms are one program
    c.steps, c.batch_size, c.seq_len = 3, 2, 16
    c.data = config.source(
      'text', path=str(data / 'a.txt'), eval_path=str(data / 'b.txt'),
      tokenizer='bytes')
    c.model.update(N=1, D=16, H=2, E=4, expert_F=16)
    return c
  return {'one': arm('one'), 'two': arm('two')}
"""
MEASURE = """
import pathlib

from experiments.harness import measures

def measure(job, state):
  assert int(state.step) == 3
  arm = job.config['description']
  if pathlib.Path(job.config['data']['path']).with_name(f'no {arm}').exists():
    raise ValueError(f'no {arm}')
  same = measures.evaluated(measures.changed(job, seed=7), state)
  return {'twice': 2.0 * float(state.step), 'again': same['eval_loss']}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A study of two arms in a folder beside the real ones."""
  folder = tmp_path / 'root/experiments/studies/fake'
  folder.mkdir(parents=True)
  (folder / 'study.py').write_text(textwrap.dedent(STUDY))
  (folder / 'measure.py').write_text(MEASURE)
  (folder / 'plot.py').write_text('def draw(rows, folder):\n  pass\n')
  mark = '<!-- by python -m experiments.run fake -->\n<!-- end -->\n'
  (folder / 'README.md').write_text(mark)
  data = tmp_path / 'data'
  data.mkdir()
  for name in 'ab':
    (data / f'{name}.txt').write_text(f'{name} quick brown fox\n' * 40)
  # Namespace packages: the folder joins the real `experiments`.
  monkeypatch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{tmp_path / "root"}')
  return folder, data


def _command(data, *flags):
  return subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.run', 'fake', f'--data={data}'),
      *(f'--workdir={data / "runs"}', '--seeds=2', *flags),
    ],
    cwd=data,
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_a_study_from_end_to_end(fake):
  folder, data = fake
  lines = folder / 'results.jsonl'
  read = lambda: [json.loads(line) for line in lines.read_text().splitlines()]
  runs = lambda rows: [(row['arm'], row['seed']) for row in rows]

  # A run that fails leaves the others be.
  (data / 'no two').touch()
  first = _command(data, '--jobs=1')
  assert first.returncode == 1
  failed = [x for x in first.stdout.splitlines() if x.startswith('FAILED')]
  assert [x.split(': exit')[0] for x in failed] == [
    'FAILED two, seed 0', 'FAILED two, seed 1',
  ]  # fmt: skip
  # The second time in another process, whose words are its own.
  assert all(x.endswith('exit 1: ValueError: no two') for x in failed)
  assert runs(read()) == [('one', 0), ('one', 1)]
  (data / 'no two').unlink()

  # The same command makes what is left.
  second = _command(data, '--jobs=1')
  assert second.returncode == 0, second.stderr
  assert '2 runs to make, 2 are there' in second.stdout
  assert '2 of 2' in second.stdout and 'minutes left' in second.stdout
  rows = read()
  assert runs(rows) == [('one', 0), ('one', 1), ('two', 0), ('two', 1)]
  assert all(row['twice'] == 6 and row['device'] == 'cpu' for row in rows)
  assert all(row['again'] == row['eval_loss'] for row in rows)
  assert all(0 < row['wall_seconds'] < 100 for row in rows)
  page = (folder / 'README.md').read_text()
  assert '| one | 2 |' in page and claims.NOT_TESTABLE in page

  # What a step costs is told of each arm, anew, and stands in the table.
  assert '|  |  |\n' in page
  (folder / 'cost.jsonl').write_text('{"arm": "old", "config": ""}\n')
  assert _command(data, '--cost').returncode == 0
  text = (folder / 'cost.jsonl').read_text()
  costs = [json.loads(line) for line in text.splitlines()]
  assert [line['arm'] for line in costs] == ['one', 'two']
  assert all(0 < line['step_seconds'] < 10 for line in costs)
  assert all(1e4 < line['step_bytes'] < 1e9 for line in costs)
  assert '|  |  |\n' not in (folder / 'README.md').read_text()

  # A run without its line is made again, and no other. Before, its worker had
  # made another one; a run does not depend on that. By
  # default as many are made at a time as there are cores.
  lines.write_text(''.join(json.dumps(row) + '\n' for row in rows[:-1]))
  shutil.rmtree(data / 'runs/fake/two-1')
  third = _command(data)
  assert third.returncode == 0, third.stderr
  assert '1 runs to make, 3 are there' in third.stdout
  same = lambda row: {k: v for k, v in row.items() if k in trial.KEPT}
  assert same(read()[-1]) == same(rows[-1])

  # Nothing is added to lines that something else made.
  before = lines.read_text()
  text = (folder / 'study.py').read_text()
  (folder / 'study.py').write_text(text.replace('D=16', 'D=32'))
  done = _command(data)
  assert done.returncode == 0 and '0 runs to make, 4 are' in done.stdout
  more = _command(data, '--seeds=3')
  assert more.returncode == 1 and lines.read_text() == before
  assert 'was made with config' in more.stderr
  assert len(more.stderr.strip().splitlines()) == 1


def test_mistakes_are_one_line(fake):
  _, data = fake
  (data / 'a.txt').unlink()
  told = _command(data, '--seeds=1')
  assert told.returncode == 1 and 'FAILED' in told.stdout
  last = told.stderr.strip().splitlines()
  assert len(last) == 1 and 'a.txt' in last[0]


def test_missing_data_are_named(tmp_path):
  (tmp_path / 'gsm8k').mkdir()
  (tmp_path / 'gsm8k/train.jsonl').write_text('{}')
  with pytest.raises(
    ValueError, match=r'gsm8k lacks test.jsonl: .*MIT'
  ) as told:
    sources.digests(tmp_path, ['gsm8k'])
  assert '\n' not in str(told.value)
  (tmp_path / 'gsm8k/test.jsonl').write_text('{}')
  one = sources.digests(tmp_path, ['gsm8k'])
  (tmp_path / 'gsm8k/test.jsonl').write_text('{"a": 1}')
  assert one != sources.digests(tmp_path, ['gsm8k'])
  # Nor are they the files that the results here were made of.
  assert sources.others(one) == ['gsm8k']
  published = {'gsm8k': sources.SOURCES['gsm8k'].digest}
  assert sources.others(published) == []
  page = (ROOT / 'experiments/README.md').read_text()
  assert all(f'| `{name}` |' in page for name in sources.SOURCES)


def test_other_code_and_packages_are_refused():
  now = {'a': {'code': 'x', 'versions': {'jax': '1', 'numpy': '2'}}}
  row = {'arm': 'a', 'seed': 0, 'code': 'x', 'versions': now['a']['versions']}
  results.check([row], now, 'here')
  with pytest.raises(ValueError, match=r'here: a of seed 0 .*code y.*be x'):
    results.check([{**row, 'code': 'y'}], now, 'here')
  other = {**row, 'versions': {'jax': '0', 'numpy': '2'}}
  with pytest.raises(ValueError, match=r"versions \{'jax': '0'\}") as told:
    results.check([other], now, 'here')
  assert 'numpy' not in str(told.value)
  with pytest.raises(ValueError, match=r'an arm that study\.py lacks'):
    results.check([{**row, 'arm': 'b'}], now, 'here')


def test_a_router_that_no_arm_names_changes_no_code(monkeypatch, tmp_path):
  """So that a board can grow: one file more leaves its lines valid."""
  package = tmp_path / 'moe_jax/routers'
  package.mkdir(parents=True)
  (tmp_path / 'experiments/harness').mkdir(parents=True)
  (tmp_path / 'experiments/harness/trial.py').write_text('')
  for name in ('__init__', 'topk'):
    (package / f'{name}.py').write_text(name)
  monkeypatch.setattr(results, 'ROOT', tmp_path)
  values = {'model': {'router': {'name': 'topk'}}}
  before = results._code(claims, values)
  (package / 'new.py').write_text('new')
  assert results._code(claims, values) == before
  for name in ('__init__', 'topk'):
    (package / f'{name}.py').write_text('changed')
    after = results._code(claims, values)
    assert after != before
    before = after


def test_all_arms_of_a_seed_come_before_the_next(monkeypatch):
  monkeypatch.setattr(results, 'read', lambda _: [{'arm': 'b', 'seed': 0}])
  left = runner.left_of(None, ['a', 'b'], 2)
  assert left == [('a', 0), ('a', 1), ('b', 1)]


def test_what_lies_beyond_a_picture_is_told_in_numbers():
  rows = [
    {
      'arm': arm,
      'seed': seed,
      'eval_loss': value + 0.01 * seed**2 * (arm != 'base'),
    }
    for arm, value in (('base', 1.0), ('near', 1.1), ('far', 3.0))
    for seed in range(3)
  ]
  board = [Claim('', arm, 'base') for arm in ('near', 'far')]
  figure, ((axes,),) = pictures.figure(5, 3, 1)
  pictures.differences(
    axes, board, rows, 'nats', within=(-0.5, 0.5), words=str.upper
  )
  assert [text.get_text() for text in axes.texts] == ['+2.02 ±0.05']
  assert len(axes.containers) == 1 and axes.get_xlim() == (-0.5, 0.5)
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend == [verdict.upper() for verdict in pictures.COLOURS]
  pictures.plt.close(figure)


def test_two_seeds_say_that_they_are_too_few():
  rows = [
    {'arm': arm, 'seed': seed, 'eval_loss': seed + (arm == 'b')}
    for arm in 'ab'
    for seed in range(3)
  ]
  study = results.study('coe')
  few = tables.finding(study, Claim('', 'a', 'b'), rows[:2] + rows[3:])
  assert few[-1] == f'{claims.NOT_RESOLVED}; fewer than 3 seeds'
  assert (
    tables.finding(study, Claim('', 'a', 'b'), rows)[-1] == claims.SUPPORTED
  )
