"""Packing, order, parts and resume, against loops over single tokens."""

import collections
import itertools
import json
import math
import string

import datasets
import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from moe_jax import config, exact
from moe_jax.data import dataset, packing, tokenizer
from moe_jax.training import jobs, loop
from tests.helpers import parts
from tests.helpers.small import small_config

DTYPES = {
  'ids_BxL': np.int32,
  'target_BxL': np.int32,
  'segment_BxL': np.int32,
  'pos_BxL': np.int32,
  'mask_BxL': np.float32,
  'row_B': np.int32,
}


def _documents(*lengths):
  """Documents in which token i is the i-th of all, from 1; 0 separates."""
  ends = np.cumsum((0, *lengths))
  return [
    np.arange(start + 1, end + 1) for start, end in itertools.pairwise(ends)
  ]


def _stream(*lengths):
  return packing.pack(_documents(*lengths), 0)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _check_rows(batch, document_of):
  """Compares every row with the definition, token by token."""
  assert {k: v.dtype for k, v in batch.items()} == DTYPES
  for row in range(len(batch['ids_BxL'])):
    ids, target, segment, pos, mask = (
      batch[f'{name}_BxL'][row].tolist()
      for name in ('ids', 'target', 'segment', 'pos', 'mask')
    )
    assert target[:-1] == ids[1:]
    begin = 0
    for i, token in enumerate(ids):
      if token == 0:
        begin = i
      assert pos[i] == i - begin
      real = mask[i - 1] if i else mask[0] or 0 < ids[0]
      own = sum(t == 0 for t in ids[1 : i + 1])
      assert segment[i] == (own if real else -1)
      for j in range(i):
        if mask[i] and ids[i] and ids[j]:
          # The ring may show a document's end and, later, its start.
          same = document_of[ids[i]] == document_of[ids[j]] and ids[j] < ids[i]
          assert (segment[i] == segment[j]) == same


def _document_of(lengths):
  owner = {}
  for number, document in enumerate(_documents(*lengths)):
    owner.update(dict.fromkeys(document.tolist(), number))
  return owner


@st.composite
def cases(draw):
  """Lengths of documents, with a batch size and row length that fit."""
  lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
  targets = sum(lengths) + len(lengths)
  seq_len = draw(st.integers(1, min(6, targets)))
  batch_size = draw(st.integers(1, min(3, targets // seq_len)))
  return lengths, batch_size, seq_len


def test_pack():
  stream = packing.pack([np.array([5, 6]), np.array([7])], 9)
  assert stream.tolist() == [9, 5, 6, 9, 7, 9]
  assert stream.dtype == np.int32


def test_batch_by_hand():
  (batch,) = packing.eval_batches(_stream(2, 3), batch_size=1, seq_len=7)
  assert batch['ids_BxL'].tolist() == [[0, 1, 2, 0, 3, 4, 5]]
  assert batch['target_BxL'].tolist() == [[1, 2, 0, 3, 4, 5, 0]]
  assert batch['segment_BxL'].tolist() == [[0, 0, 0, 1, 1, 1, 1]]
  assert batch['pos_BxL'].tolist() == [[0, 1, 2, 0, 1, 2, 3]]


# --- evaluation -------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(cases())
def test_eval_targets_each_token_once(case):
  lengths, batch_size, seq_len = case
  stream = _stream(*lengths)
  batches = packing.eval_batches(stream, batch_size, seq_len)
  targets = []
  for batch in batches:
    assert batch['ids_BxL'].shape == (batch_size, seq_len)
    assert batch['row_B'].tolist() == list(range(batch_size))
    _check_rows(batch, _document_of(lengths))
    counted = batch['mask_BxL'] == 1
    assert not batch['mask_BxL'][~counted].any()
    assert not batch['ids_BxL'][:, 1:][~counted[:, :-1]].any()
    targets += batch['target_BxL'][counted].tolist()
  assert targets == stream[1:].tolist()
  assert len(list(batches)) == len(batches)  # and it can be read again


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.integers(4, 40), st.floats(0, 1.5), st.integers(1, 4), st.integers(1, 5)
)
@hypothesis.example(rows=8, share=0.5, batch_size=2, seq_len=3)
def test_eval_share_spreads_full_batches(rows, share, batch_size, seq_len):
  stream = _stream(rows * seq_len - 1)
  batches = list(packing.eval_batches(stream, batch_size, seq_len, share=share))
  first = np.concatenate([b['ids_BxL'][:, 0] for b in batches])
  mask = np.concatenate([b['mask_BxL'][:, 0] for b in batches])
  starts = first[mask == 1]
  assert (np.diff(starts) > 0).all()  # no row twice
  wanted = min(rows, exact.nearest(share, rows))
  assert len(batches) == max(1, math.ceil(wanted / batch_size))
  if len(starts) < rows:
    assert (mask == 1).all()
    gaps = np.diff(np.append(starts, rows * seq_len)) / seq_len
    assert gaps.max() - gaps.min() <= 1


# --- training ---------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=12)
@hypothesis.given(cases(), st.integers(0, 2**40))
def test_train_targets_each_token_once(case, seed):
  lengths, batch_size, seq_len = case
  stream = _stream(*lengths)
  rows = (len(stream) - 1) // seq_len
  iterator = packing.train_iterator(stream, batch_size, seq_len, seed)
  batches = _take(iterator, -(-2 * rows // batch_size))
  for batch in batches:
    assert (batch['mask_BxL'] == 1).all()
    _check_rows(batch, _document_of(lengths))
  target_RxL = np.concatenate([b['target_BxL'] for b in batches])
  for epoch in range(2):
    seen = target_RxL[epoch * rows : (epoch + 1) * rows].ravel().tolist()
    skipped = collections.Counter(stream[1:].tolist())
    skipped.subtract(seen)
    assert min(skipped.values()) >= 0  # nothing twice
    assert skipped.total() == len(stream) - 1 - rows * seq_len


def test_train_shuffles_and_cuts_anew_each_epoch():
  stream, rows = _stream(1001), 100  # ring of 1002 tokens: 2 are skipped
  iterator = packing.train_iterator(stream, batch_size=10, seq_len=10, seed=0)
  starts = [
    np.concatenate([b['ids_BxL'][:, 0] for b in _take(iterator, rows // 10)])
    for _ in range(3)
  ]
  for start_R in starts:
    assert abs(np.corrcoef(start_R, np.arange(rows))[0, 1]) < 0.4
  phases = [start_R.min() % 10 for start_R in starts]
  assert len(set(phases)) > 1, phases
  orders = {tuple(np.argsort(start_R)) for start_R in starts}
  assert len(orders) == 3


def test_train_depends_on_the_seed_alone():
  stream = _stream(300)

  def ids(seed):
    batches = _take(packing.train_iterator(stream, 4, 8, seed), 12)
    return np.concatenate([b['ids_BxL'] for b in batches])

  one, two = ids(1), ids(2)
  np.testing.assert_array_equal(one, ids(1))
  assert (one != two).any()
  # Seed 1 in its second epoch must not be seed 2 in its first.
  rows = 301 // 8
  assert (one[rows : rows + 8] != two[:8]).any()


PINNED = [191, 91, 171, 81, 51, 141, 21, 11]


def test_train_order_is_pinned():
  """Fails if grain or numpy change what a seed means: resumed runs would."""
  batch = next(packing.train_iterator(_stream(199), 8, 10, seed=0))
  assert batch['ids_BxL'][:, 0].tolist() == PINNED


# --- parts and resume -------------------------------------------------------


@parts.every_split
def test_parts_together_are_the_global_batch(split):
  stream = _stream(5, 400, 7)  # 103 rows: an epoch is 13 batches
  for make in (
    lambda row_B: _take(packing.train_iterator(stream, 8, 4, 0, row_B), 15),
    lambda row_B: _take(packing.stream_iterator(stream, 8, 4, 0, row_B), 15),
    lambda row_B: list(packing.eval_batches(stream, 8, 4, row_B=row_B)),
    lambda row_B: list(
      packing.eval_batches(stream, 8, 4, row_B=row_B, share=0.6, streams=True)
    ),
  ):
    parts.check(make, split)


@parts.every_split
@pytest.mark.parametrize(
  'make', [packing.train_iterator, packing.stream_iterator]
)
def test_resume_is_exact(make, split):
  stream = _stream(5, 600, 7)  # 153 rows: 40 batches are 2 epochs
  first = make(stream, 8, 4, 3)
  before = make(stream, 8, 4, 3, split[1])
  whole, states = [], []
  for _ in range(41):
    states.append(json.loads(json.dumps(before.get_state())))
    assert states[-1] == first.get_state()
    whole.append(next(first)), next(before)
  whole += _take(first, 7)
  for steps in (0, 1, 16, 40):
    again = make(stream, 8, 4, 3)
    _take(again, 2)  # a used iterator, its buffer full, must jump too
    again.set_state(states[steps])
    after = make(stream, 8, 4, 3, split[0])  # other rows than before
    after.set_state(states[steps])
    for expected in whole[steps : steps + 8]:
      actual, part = next(again), next(after)
      for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
        np.testing.assert_array_equal(part[name], expected[name][split[0]])


@pytest.mark.parametrize('order', ['shuffled', 'stream'])
def test_a_dataset_reads_the_rows_that_it_is_told(tmp_path, order):
  config = packing.DataConfig(
    source='text', path=_files(tmp_path), tokenizer='bytes', order=order,
    cache_dir=str(tmp_path),
  )  # fmt: skip
  text = dataset.source('text').load(config, 16)
  row_B = np.array([2, 1])
  for make in (
    lambda *row_B: next(text.train_batches(4, 0, *row_B)),
    lambda *row_B: next(iter(text.eval_batches(4, 0.1, *row_B))),
  ):
    whole, part = make(), make(row_B)
    assert ('begins_B' in whole) == (order == 'stream')
    for name, value in whole.items():
      np.testing.assert_array_equal(part[name], value[row_B])


def test_reading_leaves_the_state_of_the_batch_read():
  iterator = packing.train_iterator(_stream(200), 4, 8, 0)
  states = []
  for _ in range(5):
    states.append(iterator.get_state())
    next(iterator)
  assert [s['next_index'] for s in states] == [0, 1, 2, 3, 4]


# --- bad input --------------------------------------------------------------


def test_refuses_a_stream_shorter_than_a_batch():
  stream = _stream(30)  # 32 tokens
  packing.train_iterator(stream, 1, 31, 0)
  packing.eval_batches(stream, 1, 31)
  with pytest.raises(
    packing.DataError, match=r'training .* 33 tokens, it has 32'
  ):
    packing.train_iterator(stream, 4, 8, 0)
  with pytest.raises(
    packing.DataError, match=r'held-out .* 33 tokens, it has 32'
  ):
    packing.eval_batches(stream, 4, 8)


@pytest.mark.parametrize(
  'row_B',
  [
    *([0, 4], [-1, 0], [1, 2, 1], [0.0, 1.0], [True, False], [[0, 1]]),
    np.zeros(0, np.int32),
  ],
)
def test_refuses_rows_that_a_batch_does_not_have(row_B):
  row_B, stream = np.asarray(row_B), _stream(100)
  for make in (
    lambda: packing.train_iterator(stream, 4, 8, 0, row_B),
    lambda: packing.stream_iterator(stream, 4, 8, 0, row_B),
    lambda: packing.eval_batches(stream, 4, 8, row_B=row_B),
  ):
    with pytest.raises(packing.DataError) as error:
      make()
    said = f'row_B is {row_B.tolist()}; the rows'
    assert str(error.value).startswith(said)
    assert 'distinct integers in 0..3' in str(error.value)


# --- text to tokens ---------------------------------------------------------


def _files(tmp_path):
  text = ''.join(f'def f{i}(x):\n  return x + {i}\n' for i in range(400))
  (tmp_path / 'a.txt').write_text(text)
  (tmp_path / 'b.txt').write_text('été\n' * 9)
  return str(tmp_path / '*.txt')


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_streams_stand_for_every_byte(tmp_path, kind):
  config = packing.DataConfig(
    source='text', path=_files(tmp_path), tokenizer=kind, vocab_size=300,
    cache_dir=str(tmp_path / 'cache'),
  )  # fmt: skip
  corpus = packing.load(config)
  tok = tokenizer.get(config, corpus)
  for _ in range(2):  # made, then read from the cache
    train_N, eval_N = packing.streams(config, corpus, tok)
    for stream, texts in ((train_N, corpus.train), (eval_N, corpus.eval)):
      assert stream.dtype == np.int32
      cuts = np.flatnonzero(stream == tok.separator)
      assert (cuts[0], cuts[-1]) == (0, len(stream) - 1)
      spans = itertools.pairwise(cuts)
      assert [tok.decode(stream[a + 1 : b]) for a, b in spans] == texts
    counted = sum(
      (tok.token_bytes[batch['target_BxL']] * batch['mask_BxL']).sum()
      for batch in packing.eval_batches(eval_N, 4, 16)
    )
    assert counted == corpus.eval_bytes


@pytest.mark.parametrize('harm', ['cut', 'pickle', 'dtype', 'id', 'token'])
def test_damaged_streams_are_rebuilt(tmp_path, caplog, harm):
  config = packing.DataConfig(
    source='text', path=_files(tmp_path), vocab_size=300,
    cache_dir=str(tmp_path / 'cache'),
  )  # fmt: skip
  corpus = packing.load(config)
  tok = tokenizer.get(config, corpus)
  expected = packing.streams(config, corpus, tok)[0].copy()
  (path,) = (tmp_path / 'cache').glob('*-train.npy')
  broken = expected.copy()
  if harm == 'cut':
    path.write_bytes(path.read_bytes()[:-8])
  elif harm == 'pickle':
    np.save(path, np.array([None]), allow_pickle=True)
  elif harm == 'dtype':
    np.save(path, expected.astype(np.int64))
  elif harm == 'id':
    broken[5] = tok.vocab_size
    np.save(path, broken)
  else:
    long, short = np.argmax(tok.token_bytes), broken[5]
    assert tok.token_bytes[long] != tok.token_bytes[short]
    broken[5] = long
    np.save(path, broken)
  caplog.clear()
  train_N, _ = packing.streams(config, corpus, tok)
  np.testing.assert_array_equal(train_N, expected)
  assert len(caplog.records) == 1 and str(path) in caplog.text


# --- streams ----------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(cases(), st.integers(0, 3))
def test_a_stream_goes_on_where_its_rows_ended(case, seed):
  lengths, batch_size, seq_len = case
  stream = _stream(*lengths)
  blocks = (len(stream) - 1) // batch_size // seq_len
  batches = _take(
    packing.stream_iterator(stream, batch_size, seq_len, seed), 2 * blocks + 1
  )
  for k, (old, new) in enumerate(itertools.pairwise(batches)):
    begins = (k + 1) % blocks == 0
    assert new['begins_B'].tolist() == [begins] * batch_size
    if not begins:
      np.testing.assert_array_equal(
        new['ids_BxL'][:, 0], old['target_BxL'][:, -1]
      )
  assert batches[0]['begins_B'].all()
  # No token is a target twice in an epoch.
  seen = np.concatenate([b['target_BxL'].reshape(-1) for b in batches[:blocks]])
  words = seen[seen > 0]
  assert len(set(words.tolist())) == len(words)


@hypothesis.settings(deadline=None)
@hypothesis.given(cases())
def test_evaluated_streams_target_each_token_once_and_go_on(case):
  lengths, batch_size, seq_len = case
  stream = _stream(*lengths)
  batches = list(
    packing.eval_batches(stream, batch_size, seq_len, streams=True)
  )
  targets = np.concatenate(
    [
      np.concatenate([b['target_BxL'][row] for b in batches])
      for row in range(batch_size)
    ]
  )
  counted = np.concatenate(
    [
      np.concatenate([b['mask_BxL'][row] for b in batches])
      for row in range(batch_size)
    ]
  )
  assert targets[counted == 1].tolist() == stream[1:].tolist()
  begins = [b['begins_B'].tolist() for b in batches]
  first = [1] * batch_size
  assert begins == [first] + [[0] * batch_size] * (len(batches) - 1)
  for old, new in itertools.pairwise(batches):
    both = new['mask_BxL'][:, 0] == 1
    np.testing.assert_array_equal(
      new['ids_BxL'][both, 0], old['target_BxL'][both, -1]
    )


# --- a data set and a tokenizer of others -----------------------------------


def _spelling(path, token):
  """A SentencePiece-like tokenizer of single letters; `token` ends texts."""
  letters = ['<unk>', token, '▁', *string.printable.strip()]
  library = tokenizers.Tokenizer(
    models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token='<unk>')
  )
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  library.add_special_tokens(['<unk>', token])
  library.save(str(path))
  return len(letters)


def _hub_config(tmp_path):
  rows = {'body': [f'{i} squared is {i * i}' for i in range(200)]}
  datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / 'set')
  c = small_config(tmp_path)
  c.data = config.source(
    'huggingface', path=str(tmp_path / 'set'), field='body',
    tokenizer=str(tmp_path / 'letters.json'),
    vocab_size=_spelling(tmp_path / 'letters.json', '</s>'),
    padded_size=257,  # as of bytes: the model of other tests
    cache_dir=str(tmp_path / 'cache'),
  )  # fmt: skip
  return c


def test_a_saved_set_with_a_tokenizer_of_others_trains(tmp_path):
  c = _hub_config(tmp_path)
  ready = jobs.prepare(c, str(tmp_path / 'run'))
  text = ready.dataset
  assert [len(ids) for ids in packing.unpack(text.eval_N)] == [
    1 + len(held_out) for held_out in text.corpus.eval
  ]
  counted = text.token_bytes[text.eval_N[1:]].sum()  # of all targets
  assert counted == text.corpus.eval_bytes
  loop.run(ready)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert 0 < summary['eval_bits_per_byte'] < math.inf
  bits = summary['eval_loss'] / math.log(2)
  per_byte = (len(text.eval_N) - 1) / text.corpus.eval_bytes
  assert summary['eval_bits_per_byte'] == pytest.approx(bits * per_byte, 1e-6)
  again = tokenizer.load(tmp_path / 'run' / 'tokenizer.json')
  assert again.fingerprint() == text.tokenizer.fingerprint()

  # Another tokenizer under the same name is another run.
  c.steps = 7
  assert jobs.prepare(c, str(tmp_path / 'run')) is not None
  _spelling(tmp_path / 'letters.json', '<eos>')
  with pytest.raises(ValueError, match='differ: corpus_sha256'):
    jobs.prepare(c, str(tmp_path / 'run'))


def test_a_tokenizer_that_loses_text_tells_no_bits_per_byte(tmp_path):
  library = tokenizers.Tokenizer(
    models.WordLevel({'[UNK]': 0, '[SEP]': 1, 'is': 2}, unk_token='[UNK]')
  )
  library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  library.add_special_tokens(['[SEP]'])
  library.save(str(tmp_path / 'words.json'))
  found = dataset.source('text').load(
    packing.DataConfig(
      source='text', path=_files(tmp_path), vocab_size=3,
      tokenizer=str(tmp_path / 'words.json'), cache_dir=str(tmp_path / 'new'),
    ),
    16,
  )  # fmt: skip
  assert found.token_bytes is None and found.sizes == {'V': 3}
  assert found.sha256 != found.corpus.sha256


def test_a_bad_tokenizer_is_told_before_the_text_is_read(tmp_path):
  missing = packing.DataConfig(
    source='text', path='no such file', tokenizer=str(tmp_path / 'none.json')
  )
  with pytest.raises(packing.DataError, match='holds no tokenizer'):
    dataset.source('text').load(missing, 16)
