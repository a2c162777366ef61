"""moe-analyze: a run is read, never changed, and its routing is what it was."""

import hashlib
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from moe_jax import config, models, plans, routers
from moe_jax.analysis import measures, page, record
from moe_jax.data import packing
from moe_jax.training import checkpoint, jobs, saved_run, train_step
from tests.analysis.analysis_test import choices, routing, tokens
from tests.helpers.small import command, small_config
from tests.report.report_test import headings, Page
from tests.weights.convert_test import described

L = 16


def run_config(corpus):
  """Two layers of two iterations, with drops."""
  c = small_config(corpus, steps=4)
  c.model.iterations = 2
  c.model.router = config.router('topk', k=2, capacity=0.75)
  return c


def drawn(like, step):
  """Lively random values of these shapes, of the step."""
  draw = np.random.default_rng(step)
  floats = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
  value = lambda a: 0.5 * draw.normal(size=a.shape) if floats(a) else 0
  made = jax.tree.map(lambda a: np.full(a.shape, value(a), a.dtype), like)
  return made._replace(step=np.int32(step))


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
  """The work directory of a run, as if it had been trained."""
  workdir = tmp_path_factory.mktemp('analyze') / 'run'
  job = jobs.prepare(run_config(corpus), str(workdir))
  described(workdir, job.config)
  job.dataset.save(workdir)
  whole = jax.NamedSharding(job.mesh, jax.P())
  with checkpoint.Checkpoints(workdir, keep=2) as saved:
    for step in (2, 4):
      state = drawn(train_step.abstract_state(job), step)
      saved.save(step, jax.device_put(state, whole), {})
  return workdir


@pytest.fixture(scope='module')
def recorder(run):
  """That of the run, which need not compile again."""
  return record.recorder(saved_run.load(str(run)))


@pytest.fixture
def _compiled(recorder, monkeypatch):
  monkeypatch.setattr(record, 'recorder', lambda job: recorder)


@pytest.fixture
def unread(run, tmp_path):
  """What a run is before its first checkpoint; changes to its config."""

  def make(**changes):
    c = json.loads((run / 'config.json').read_text())
    c['model'].update(changes)
    (tmp_path / 'config.json').write_text(json.dumps(c))
    shutil.copy(run / 'tokenizer.json', tmp_path)
    return tmp_path

  return make


def content(folder):
  """Of every file its digest and time."""
  return {
    str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
    for p in folder.rglob('*')
    if p.is_file()
  }


@pytest.mark.usefixtures('_compiled')
def test_the_report_of_a_run(run, corpus, tmp_path, capsys):
  half_saved = run / 'checkpoints' / '6.orbax-checkpoint-tmp' / 'part'
  half_saved.parent.mkdir()
  half_saved.write_text('of a run that goes on')
  before = content(run)
  lines = tmp_path / 'lines.jsonl'
  lines.write_text('{"q": "What is a ring?", "a": "no"}\n' * 40)
  given = [f'sums={corpus}', f'{lines}#q']
  out = record.write(str(run), given, 500, str(tmp_path / 'out'))
  shutil.rmtree(half_saved.parent)
  assert content(run) == {k: v for k, v in before.items() if '-tmp' not in k}
  said = capsys.readouterr().out
  assert 'step 2:' in said and f'{given[1]}: 384 of 640 tokens' in said
  names = sorted(p.name for p in out.parent.iterdir())
  assert names == ['routing.html', 'routing.json', 'routing.npz']
  values = json.loads((out.parent / 'routing.json').read_text())
  assert values['checkpoint'] == 4 and values['texts'] == ['sums', given[1]]
  assert [s['name'] for s in values['steps']] == [
    f'MoE layer {n}, iteration {i}' for n, i in np.ndindex(2, 2)
  ]
  (change,) = values['changes']
  assert (change['first'], change['second']) == (2, 4)
  assert 0 < max(change['moved_S']) < 1
  with np.load(out.parent / 'routing.npz', allow_pickle=False) as arrays:
    B = 8
    assert arrays['expert_SxTxK'].shape == (4, 2 * 3 * B * L, 2)
    np.testing.assert_array_equal(
      np.bincount(arrays['text_T']), values['tokens']
    )
    drops = ~arrays['kept_SxTxK'] & (arrays['expert_SxTxK'] >= 0)
    found = [s['dropped'] for s in values['steps']]
    assert drops.mean(axis=(1, 2)) == pytest.approx(found) and min(found) > 0
  text = out.read_text()
  assert 'MoE layer 1, iteration 1' in text and 'lines.jsonl#q' in text


def test_what_is_recorded_is_what_the_model_does(run, recorder, corpus):
  """Against the job of a training run, on the same rows."""
  job = saved_run.load(str(run))
  read, batches = record.read(job, record.streams(job, []), 10**6)
  found = record.record(recorder, saved_run.restore(job, 4), batches)
  same = jobs.prepare(run_config(corpus), str(run.parent / 'none'))
  with checkpoint.Checkpoints(run, keep=9) as saved:
    state = saved.restore(train_step.abstract_state(same)).state
  evaluate = train_step.make_eval(same)

  @jax.jit
  def both(state, batch, n):
    model = models.bind(same.model, state.params, state.router_state)
    ctx = routers.context(batch, jax.random.key(0), 4, train=False)
    aux = model(batch, ctx)[1][0]
    return evaluate(state, dict(batch), n)[0], aux

  rows = same.eval_batches()
  for n, batch in enumerate(itertools.islice(rows, 2)):
    here = slice(n * 8 * L, (n + 1) * 8 * L)
    np.testing.assert_array_equal(read.id_T[here], batch['ids_BxL'].reshape(-1))
    np.testing.assert_array_equal(
      read.position_T[here], batch['pos_BxL'].reshape(-1)
    )
    sums, aux = jax.device_get(both(state, dict(batch), np.int32(n)))
    nats = float(sums['nll_sum'] / sums['tokens'])
    assert found.nll_T[here].mean() == pytest.approx(nats, rel=1e-5)
    for s, at in enumerate(np.ndindex(2, 1, 2)):
      np.testing.assert_array_equal(
        found.expert_SxTxK[s, here], aux['route'][at]
      )
      lost = 1 - found.kept_SxTxK[s, here].mean()
      assert lost == pytest.approx(float(aux['dropped'][at]))
      total_T = found.gate_SxTxK[s, here].sum(axis=1)
      np.testing.assert_allclose(total_T, 1, rtol=1e-5)
  assert len(read.id_T) == len(found.nll_T) == len(batches) * 8 * L


def test_no_plan_is_carried_through_training(run, corpus):
  job = saved_run.load(str(run))
  batch = next(
    iter(packing.eval_batches(np.arange(9 * L, dtype=np.int32), 8, L))
  )

  def aux(train):
    model = models.bind(job.model, *models.split(job.init(0)))
    ctx = routers.context(batch, jax.random.key(0), 0, train=train)
    return model(batch, ctx)[1][0]

  assert 'plan' not in jax.eval_shape(lambda: aux(True))
  assert 'plan' in jax.eval_shape(lambda: aux(False))


def test_experts_that_choose_are_the_choices_of_tokens():
  draw = np.random.default_rng(0)
  N, E, C, group = 3, 4, 2, 5
  place_NxExC = np.argsort(draw.random((N, E, group)), axis=2)[..., :C]
  gate_NxExC = draw.random((N, E, C))
  found = plans.ExpertChoice(place_NxExC, gate_NxExC, group).choices(None)
  for t in range(N * group):
    mine = [
      (gate_NxExC[n, e, c], e)
      for n, e, c in np.ndindex(N, E, C)
      if n * group + place_NxExC[n, e, c] == t
    ]
    mine = sorted(mine, reverse=True)
    width = found['expert_TxK'].shape[1]
    blank = [-1] * (width - len(mine))
    assert found['expert_TxK'][t].tolist() == [e for _, e in mine] + blank
    gates = [gate for gate, _ in mine] + [0] * len(blank)
    np.testing.assert_array_equal(found['gate_TxK'][t], gates)
  np.testing.assert_array_equal(found['kept_TxK'], found['expert_TxK'] >= 0)


def test_layers_are_counted_over_pools_and_segments():
  def segment(G, R):
    route = np.zeros((G, R, 1, 4, 2), np.int32)
    made = plans.TokenChoice(route, np.ones(route.shape), 3)
    return {'entropy': np.zeros((G, R, 1)), 'route': route, 'plan': made}

  steps = record._steps(routers.Aux([segment(2, 2), segment(1, 1)]))
  assert [step['name'] for step in steps] == [
    f'MoE layer {n}' for n in range(5)
  ]


def test_a_model_whose_experts_choose(unread):
  router = {'name': 'expert_choice', 'k': 2, 'group': None}
  folder = unread(router=router, N=1, iterations=1)
  job = saved_run.load(str(folder))
  ids = np.random.default_rng(0).integers(0, 256, 40 * L + 1, np.int32)
  read, batches = record.read(job, {'noise': ids}, 20 * L)
  assert len(batches) == 2 and len(read.id_T) == 16 * L
  weights = drawn(train_step.abstract_weights(job), 0)
  found = record.record(record.recorder(job), weights, batches)
  for expert_TxK in found.expert_SxTxK:
    for row_LxK in expert_TxK.reshape(16, L, -1):
      np.testing.assert_array_equal(np.bincount(row_LxK[row_LxK >= 0]), [8] * 4)


@pytest.mark.parametrize('per', ['batch', 'sequence'])
def test_draws_are_of_their_batch_and_row(unread, per):
  router = {'name': 'random', 'k': 1, 'per': per, 'eval_per': None, 'fixed': 0}
  job = saved_run.load(str(unread(router=router, N=1, iterations=1)))
  ids = np.zeros(64 * L + 1, np.int32)
  _, batches = record.read(job, {'zeros': ids}, 64 * L)
  weights = drawn(train_step.abstract_weights(job), 0)
  found = record.record(record.recorder(job), weights, batches)
  expert_BxT = found.expert_SxTxK.reshape(len(batches), -1)
  assert (expert_BxT != expert_BxT[:1]).any()


def test_rows_are_whole_spread_and_within_the_limit(run):
  job = saved_run.load(str(run))
  streams = {
    'long': np.arange(1 + 100 * L + 3, dtype=np.int32),
    'short': np.arange(5000, 5001 + 5 * L, dtype=np.int32),
  }
  read, batches = record.read(job, streams, 12 * L)
  assert all(b['mask_BxL'].all() for b in batches)
  assert {b['ids_BxL'].shape for b in batches} == {(5, L)}  # the shorter text
  assert np.bincount(read.text_T).tolist() == [10 * L, 5 * L]
  first_B = read.id_T.reshape(-1, L)[:10, 0]
  assert first_B[0] == 0 and first_B[-1] > 80 * L  # not its beginning alone
  np.testing.assert_array_equal(np.diff(read.id_T.reshape(-1, L)), 1)
  np.testing.assert_array_equal(read.place_T, np.arange(15 * L) % L)
  assert read.texts == ['long', 'short']


@pytest.mark.parametrize(
  'argument, parsed',
  [
    ('a/*.txt', ('a/*.txt', 'a/*.txt', '')),
    ('novels=a/*.txt', ('novels', 'a/*.txt', '')),
    ('q=x.jsonl#question', ('q', 'x.jsonl', 'question')),
    ('x.jsonl.gz#a#b', ('x.jsonl.gz#a#b', 'x.jsonl.gz', 'a#b')),
    ('x.jsonl', ('x.jsonl', 'x.jsonl', '')),
    ('a#b.txt', ('a#b.txt', 'a#b.txt', '')),
    ('/k=v/x.txt', ('/k=v/x.txt', '/k=v/x.txt', '')),
    ('k=v/*.txt', ('k', 'v/*.txt', '')),
  ],
)
def test_how_a_text_is_named(argument, parsed):
  assert record._parsed(argument) == parsed


def test_a_folder_that_is_named_like_a_text(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'k=1').mkdir()
  assert record._parsed('k=1/*.txt') == ('k=1/*.txt', 'k=1/*.txt', '')


def test_a_text_is_read_whole_and_in_order(unread, tmp_path):
  job = saved_run.load(str(unread()))
  tok = job.dataset.tokenizer
  given = {
    'one.txt': 'a line\n' * 400,
    'long.txt': 'word ' * 9000,
    'a[1].txt': '\ufeffwith\r\nall\n\n of it\n',
    'd.jsonl': ''.join(
      f'{{"q": "{i:02} ?"}}\n' * (1 + i % 2) for i in range(9)
    ),
  }
  for name, text in given.items():
    (tmp_path / name).write_bytes(text.encode())
  documents = [[text] for text in list(given.values())[:3]]
  documents.append([f'{i:02} ?' for i in range(9) for _ in range(1 + i % 2)])
  documents.append([given['one.txt'], given['a[1].txt']])
  arguments = [str(tmp_path / name) for name in given]
  arguments[3] += '#q'
  arguments.append(f'two={arguments[0]},{arguments[2]}')
  found = record.streams(job, arguments)
  for (name, stream), texts in zip(found.items(), documents, strict=True):
    assert [tok.decode(ids) for ids in packing.unpack(stream)] == texts, name
    assert stream[0] == stream[-1] == tok.separator


def test_a_published_model_reads_the_marks_that_it_knows(unread, tmp_path):
  """A BOS of a tokenizer.json, with which its prompts begin, too."""
  folder = unread()
  c = json.loads((folder / 'config.json').read_text())
  vocabulary = {'</s>': 0, '<s>': 1, 'a': 2, 'b': 3}
  library = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='b')
  )
  library.add_special_tokens(['</s>', '<s>'])
  library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  library.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 0)]
  )
  library.save(str(folder / 'tokenizer.json'))
  lines = tmp_path / 'x.jsonl'
  lines.write_text('{"q": "a b a"}\n{"q": "b"}\n')
  for sha256, stream in (
    (c['corpus_sha256'], [0, 2, 3, 2, 0, 3, 0]),
    ('', [1, 2, 3, 2, 1, 3, 1]),
  ):
    c['corpus_sha256'] = sha256
    (folder / 'config.json').write_text(json.dumps(c))
    job = saved_run.load(str(folder))
    (found,) = record.streams(job, [f'{lines}#q']).values()
    assert found.tolist() == stream and found.dtype == np.int32


def test_what_cannot_be_analyzed_is_one_line(run, unread, tmp_path, corpus):
  def refused(match, folder, given=(str(corpus),), limit=500):
    out = tmp_path / 'out'
    with pytest.raises((ValueError, OSError), match=match) as told:
      record.write(str(folder), list(given), limit, str(out))
    assert '\n' not in str(told.value) and not out.exists()

  refused('none has no config.json', tmp_path / 'none')
  refused('dense model: no layer has a router', unread(pattern='d'))
  refused('holds a translator; .* decoder', unread(name='translator'))
  refused("not of this version: .*'flavour'", unread(flavour=1))
  refused('has no checkpoint', unread())
  short = tmp_path / 'short.txt'
  short.write_text('a few\nwords')
  refused("'w' has 12 tokens; a row has 16", run, [f'w={short}'])
  refused('tokens=15 is less than a row', run, limit=15)
  refused("two texts are named 'a'", run, [f'a={corpus}', f'a={short}'])
  refused('matches no file', run, ['/no/such/*.txt'])
  lines = tmp_path / 'x.jsonl'
  lines.write_text('{"q": "yes"}\n')
  refused("field is empty; .* it has 'q'", run, [str(lines)])
  (unread() / 'tokenizer.json').write_text('{')
  refused('tokenizer.json holds no tokenizer', tmp_path)


def test_a_damaged_checkpoint_is_told(run, corpus, tmp_path):
  damaged = tmp_path / 'run'
  shutil.copytree(run, damaged)
  largest = max(
    (p for p in (damaged / 'checkpoints' / '4').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  raw = bytearray(largest.read_bytes())
  raw[len(raw) // 2] ^= 1
  largest.write_bytes(raw)
  job = saved_run.load(str(damaged))
  saved_run.restore(job, 2)
  with pytest.raises(OSError, match=rf'{damaged}.* no whole .*step 4:'):
    saved_run.restore(job, 4)
  shutil.rmtree(damaged / 'checkpoints' / '2')
  with pytest.raises(OSError, match='2 is gone'):
    saved_run.restore(job, 2)


def test_a_corpus_that_has_changed_is_not_taken_for_the_held_out(
  run, corpus, tmp_path
):
  job = saved_run.load(str(run))
  assert list(record.streams(job, [])) == [record.HELD_OUT]
  job.config['corpus_sha256'] = '0' * 64
  with pytest.raises(ValueError, match=r'its corpus has changed.*--data'):
    record.streams(job, [])


@pytest.mark.usefixtures('_compiled')
def test_only_what_is_its_own_is_overwritten(run, corpus, tmp_path):
  foreign = tmp_path / 'routing.html'
  foreign.write_text('mine')
  arguments = (str(run), [str(corpus)], 128, str(tmp_path))
  with pytest.raises(ValueError, match=r'routing\.html is not of moe-analyze'):
    record.write(*arguments)
  assert foreign.read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1
  foreign.unlink()
  (tmp_path / 'notes.txt').write_text('mine, too')
  first = record.write(*arguments).read_text()
  assert record.write(*arguments).read_text() == first
  assert (tmp_path / 'notes.txt').read_text() == 'mine, too'
  assert len(list(tmp_path.iterdir())) == 4


def test_the_command(run, corpus):
  given = f'--data={corpus}', '--tokens=128'
  done = command('analyze', f'--workdir={run}', *given)
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith(f'report: {run}/analysis/routing.html\n')
  shutil.rmtree(run / 'analysis')
  wrong = command('analyze', f'--workdir={run}/none')
  assert wrong.returncode == 2
  assert wrong.stderr.startswith('moe-analyze: ')
  assert wrong.stderr.count('\n') == 1


# --- the page ---------------------------------------------------------------


def written(layers=3, texts=('a <b>', 'c'), checkpoints=3, K=2, dropped=True):
  seen = tokens(texts=texts)
  expert_SxTxK = np.stack([choices(s, K=K) for s in range(layers)])
  kept_SxTxK = expert_SxTxK >= 0
  if dropped:
    kept_SxTxK[0, ::7] = False
  made = routing(9, expert_SxTxK, kept_SxTxK)
  olds = [routing(s, expert_SxTxK[:, ::-1]) for s in range(1, checkpoints)]
  changes = [measures.change(old, made) for old in olds]
  steps = measures.study(seen, made)
  return page.page('run & <i>', seen, made, steps, changes)


def test_the_page_is_whole_escaped_and_comes_from_nowhere():
  text = written()
  found = Page(text)
  assert not {'script', 'link', 'iframe', 'object', 'base'} & set(found.tags)
  for name, value in found.attributes:
    assert not name.startswith('on') and name not in ('href', 'srcset')
    assert name != 'src' or value.startswith('data:image/png;base64,')
  assert '://' not in text and 'url(' not in text and '@import' not in text
  assert '<b>' not in re.sub('<b (style|class)=', '', text).replace(
    '<b></b>', ''
  )
  assert 'nan' not in ' '.join(found.texts).split()
  assert written() == text
  assert len(headings(text)) == 9


def test_the_page_says_what_there_is_not():
  text = written(layers=1, texts=('one',), checkpoints=1, K=1, dropped=False)
  Page(text)
  for note in ('has one expert', 'No choice was dropped', 'one checkpoint'):
    assert note in text
  titles = ' '.join(headings(text))
  assert 'Texts' not in titles and 'Paths' not in titles


def test_many_layers_are_folded_away():
  text = written(layers=30)
  shown, hidden = text.split('<summary>the other 18</summary>', 1)
  caption = '<figcaption>MoE layer {} '
  assert caption.format(11) in shown and caption.format(12) not in shown
  assert caption.format(12) in hidden and '<summary>the other 17' in hidden
  assert '<details open>' not in text
