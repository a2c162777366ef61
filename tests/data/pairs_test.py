"""Pairs become batches without loss, each once, the same after any restart."""

import collections
import gzip
import hashlib
import json
import lzma
import shutil
import sys

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from moe_jax.data import pairs, tokenizer
from moe_jax.data.corpus import DataError
from moe_jax.data.pairs import PairsConfig
from tests.helpers import parts

DTYPES = {
  'source_BxS': np.int32,
  'source_mask_BxS': np.float32,
  'ids_BxL': np.int32,
  'target_BxL': np.int32,
  'mask_BxL': np.float32,
  'segment_BxL': np.int32,
  'pos_BxL': np.int32,
  'row_B': np.int32,
}
TRAIN = [(f'{i} men and a dog', f'{i} hommes et un chien') for i in range(40)]
EVAL = [(f'{i} dogs', f'{i} chiens, {"et " * (i % 3)}') for i in range(11)]


def _write(path, lines):
  """Writes pairs, or bytes as they are, packed as the name says."""
  if not isinstance(lines, bytes):
    lines = ''.join(
      f'{source}\t{target}\n' for source, target in lines
    ).encode()
  pack = {'.xz': lzma.compress, '.gz': gzip.compress}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pack.get(path.suffix, bytes)(lines))
  return path


def _load(folder, train=TRAIN, held_out=EVAL, **options):
  """Loads lists of pairs, or those of each file by its name."""
  for split, lines in (('train', train), ('eval', held_out)):
    files = lines if isinstance(lines, dict) else {'a.tsv': lines}
    for name, content in files.items():
      _write(folder / split / name, content)
  options = {'vocab_size': 270, 'cache_dir': str(folder / 'cache'), **options}
  return pairs.load(
    PairsConfig(
      path=f'{folder}/train/*',
      eval_path=f'{folder}/eval/*' if held_out else '',
      **options,
    )
  )


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  return _load(tmp_path_factory.mktemp('pairs'))


def _refusal(folder, **options):
  with pytest.raises(DataError) as error:
    _load(folder, **options)
  message = str(error.value)
  assert '\n' not in message
  return message


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _texts(found, batches):
  """(source, target) of every row that is not padding."""
  return [
    (found.decode(source), found.decode(target))
    for batch in batches
    for source, target, mask in zip(
      batch['source_BxS'], batch['target_BxL'], batch['mask_BxL'], strict=True
    )
    if mask.any()
  ]


def _check_rows(found, batch):
  """Compares every row with the definition, token by token."""
  L = found.length
  assert {k: v.dtype for k, v in batch.items()} == DTYPES
  for row in range(len(batch['row_B'])):
    source, seen, ids, target, mask, segment, pos = (
      batch[name][row].tolist()
      for name in (
        'source_BxS', 'source_mask_BxS', 'ids_BxL', 'target_BxL', 'mask_BxL',
        'segment_BxL', 'pos_BxL',
      )
    )  # fmt: skip
    size, length = int(sum(seen)), int(sum(mask))
    assert seen == [1] * size + [0] * (L - size)
    assert [i for i, s in enumerate(source) if s == found.end] == (
      [size - 1] if size else []
    )
    assert source[size:] == [found.pad] * (L - size)
    assert mask == [1] * length + [0] * (L - length)
    assert target[length:] == [found.pad] * (L - length)
    assert bool(size) == bool(length)
    read = [found.begin, *target][:length]
    assert ids == read + [found.pad] * (L - length)
    assert segment == [0] * length + [-1] * (L - length)
    assert pos == list(range(L))


# --- a batch ----------------------------------------------------------------


def test_batch_by_hand(tmp_path):
  found = _load(tmp_path, held_out=[('ab', 'c')], max_length=4, vocab_size=258)
  (batch,) = found.eval_batches(2)
  a, b, c = (found.tokenizer.encode([x])[0].item() for x in 'abc')
  end, pad = found.end, found.pad
  assert len({a, b, c, end, pad}) == 5 and found.begin == end
  assert batch['source_BxS'].tolist() == [[a, b, end, pad], [pad] * 4]
  assert batch['source_mask_BxS'].tolist() == [[1, 1, 1, 0], [0] * 4]
  assert batch['ids_BxL'].tolist() == [[end, c, pad, pad], [pad] * 4]
  assert batch['target_BxL'].tolist() == [[c, end, pad, pad], [pad] * 4]
  assert batch['mask_BxL'].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
  assert batch['segment_BxL'].tolist() == [[0, 0, -1, -1], [-1] * 4]
  assert batch['pos_BxL'].tolist() == [[0, 1, 2, 3]] * 2
  assert batch['row_B'].tolist() == [0, 1]


def test_longer_pairs_are_left_out_or_cut_and_counted(tmp_path):
  train = [('a' * 9, 'b'), *(('a', 'b' * n) for n in range(7, 0, -1))]
  held_out = [('abcdef', 'x'), ('c', 'bcdefg'), ('abcd', 'efgh')]
  found = _load(tmp_path, train, held_out, max_length=5, vocab_size=258)
  assert ' 8 pairs in 1 file to train on, of which 4 longer than 5' in (
    found.description
  )
  assert '3 pairs in 1 file held out, of which 1 sources and 1 targets cut' in (
    found.description
  )
  batches = _take(found.train_batches(4, seed=0), 3)
  assert set(_texts(found, batches)) == set(train[4:])
  with pytest.raises(DataError, match='batch of 5: there are 4 of at most 5'):
    found.train_batches(5, seed=0)

  (batch,) = found.eval_batches(3)
  _check_rows(found, batch)  # a cut source keeps an end mark
  cut = [('abcd', 'x'), ('c', 'bcdef'), ('abcd', 'efgh')]
  assert _texts(found, [batch]) == cut
  assert batch['mask_BxL'].sum(axis=1).tolist() == [2, 5, 5]
  whole = [(r['source'], r['target']) for r in found.references(1.0, 3)]
  assert whole == held_out


@pytest.mark.parametrize('length', [3, 30])
def test_decode_stops_at_the_end_mark(found, length):
  ids = found.tokenizer.encode(['un chien'])[0][:length]
  text = found.tokenizer.decode(ids)
  junk = [found.end, *ids, found.pad]
  assert found.decode([*ids, *junk]) == text
  assert found.decode(np.array([*ids, *junk])) == text
  assert found.decode(ids) == text
  assert found.decode([found.pad, *ids]) == text
  assert found.decode(junk) == ''


# --- evaluation -------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(batch_size=st.integers(1, 15))
def test_every_held_out_pair_is_once(found, batch_size):
  batches = found.eval_batches(batch_size)
  assert len(batches) == -(-len(EVAL) // batch_size) == len(list(batches))
  for batch in batches:
    assert batch['row_B'].tolist() == list(range(batch_size))
    _check_rows(found, batch)
  assert _texts(found, batches) == EVAL
  references = found.references(1.0, batch_size)
  assert [(r['source'], r['target']) for r in references] == EVAL


@hypothesis.settings(deadline=None)
@hypothesis.given(share=st.floats(0, 1.5), batch_size=st.integers(1, 15))
@hypothesis.example(share=4 / 11, batch_size=4)
def test_a_share_is_spread_and_has_its_references(found, share, batch_size):
  batches = found.eval_batches(batch_size, share=share)
  texts = _texts(found, batches)
  references = found.references(share, batch_size)
  assert texts == [(r['source'], r['target']) for r in references]
  wanted = round(min(1, share) * len(EVAL))
  assert len(batches) == max(1, -(-wanted // batch_size))
  assert len(texts) == min(len(EVAL), len(batches) * batch_size)
  places = [EVAL.index(text) for text in texts]
  gaps = np.diff([*places, len(EVAL)])
  assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_eval_lines_is_a_share(tmp_path):
  shares = [_load(tmp_path, eval_lines=n).eval_share for n in (0, 11, 99, 4)]
  assert shares == [1, 1, 1, 4 / 11]


# --- training ---------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_an_epoch_has_every_pair_once(found, batch_size, seed):
  iterator = found.train_batches(batch_size, seed)
  batches = _take(iterator, -(-2 * len(TRAIN) // batch_size))
  for batch in batches:
    _check_rows(found, batch)
  texts = _texts(found, batches)
  for epoch in range(2):
    seen = texts[epoch * len(TRAIN) : (epoch + 1) * len(TRAIN)]
    assert collections.Counter(seen) == collections.Counter(TRAIN)


def test_order_changes_with_epoch_and_seed_alone(found):
  def order(seed):
    return _texts(found, _take(found.train_batches(10, seed), 8))

  one, two = order(1), order(2)
  assert one == order(1) != two
  assert one[:40] != one[40:] != two[:40]
  assert one[:40] != TRAIN


PINNED = [18, 35, 16, 7, 20, 13, 24, 0]


def test_train_order_is_pinned(found):
  """Fails if grain or numpy change what a seed means: resumed runs would."""
  texts = _texts(found, [next(found.train_batches(8, seed=0))])
  assert [TRAIN.index(text) for text in texts] == PINNED


@parts.every_split
def test_parts_together_are_the_global_batch(found, split):
  for make in (
    lambda row_B: _take(found.train_batches(8, 0, row_B), 7),
    lambda row_B: list(found.eval_batches(8, row_B=row_B)),
    lambda row_B: list(found.eval_batches(8, 0.5, row_B)),
  ):
    parts.check(make, split)


@parts.every_split
def test_resume_is_exact(found, split):
  first = found.train_batches(8, 3)
  before = found.train_batches(8, 3, split[1])
  whole, states = [], []
  for steps in range(13):
    states.append(json.loads(json.dumps(before.get_state())))
    assert states[-1] == first.get_state()
    assert states[-1]['next_index'] == steps
    whole.append(next(first)), next(before)
  whole += _take(first, 5)
  for steps, used in (0, 3), (4, 0), (12, 1):  # 5 batches are an epoch
    again = found.train_batches(8, 3)
    _take(again, used)  # a used iterator, its buffer full, must jump too
    again.set_state(states[steps])
    after = found.train_batches(8, 3, split[0])  # other rows than before
    after.set_state(states[steps])
    for expected in whole[steps : steps + 6]:
      actual, part = next(again), next(after)
      for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
        np.testing.assert_array_equal(part[name], expected[name][split[0]])


def test_refuses_rows_that_a_batch_does_not_have(found):
  for make in (
    lambda row_B: found.train_batches(4, 0, row_B),
    lambda row_B: found.eval_batches(4, row_B=row_B),
  ):
    with pytest.raises(DataError, match=r'row_B is \[1, 4\]; .* in 0..3'):
      make(np.array([1, 4]))


# --- files ------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.tsv', '.tsv.xz', '.tsv.gz'])
def test_lines_are_read_exactly(tmp_path, suffix):
  exact = [('a\u2028b', ' ä '), ('\ufeff€', '<|pad|>'), ('c', 'd\x0b"')]
  raw = '\r\n'.join(f'{s}\t{t}' for s, t in exact).encode()
  found = _load(tmp_path, held_out={f'a{suffix}': raw})
  assert _texts(found, found.eval_batches(4)) == exact


def test_a_file_that_both_globs_match_is_held_out(tmp_path):
  for name, lines in (('a', TRAIN), ('b', EVAL)):
    _write(tmp_path / f'{name}.tsv', lines)
  found = pairs.load(
    PairsConfig(
      path=f'{tmp_path}/*.tsv', eval_path=f'{tmp_path}/b.tsv', vocab_size=270,
      cache_dir=str(tmp_path),
    )
  )  # fmt: skip
  assert _texts(found, found.eval_batches(4)) == EVAL
  epoch = _texts(found, _take(found.train_batches(40, 0), 1))
  assert sorted(epoch) == sorted(TRAIN)


def test_fraction_holds_out_a_source_in_all_its_languages(tmp_path):
  def held_out(train):
    shutil.rmtree(tmp_path)
    options = {'language': '(..).tsv', 'vocab_size': 275}
    found = _load(tmp_path, train, [], eval_fraction=0.2, **options)
    kept = _texts(found, _take(found.train_batches(1, 0), len(found.train_R)))
    out = [(r['source'], r['target']) for r in found.references(1.0, 1)]
    assert sorted(kept + out) == sorted(
      pair for lines in train.values() for pair in lines
    )
    assert not {source for source, _ in kept} & {source for source, _ in out}
    return {source for source, _ in out}

  other = [
    (source, f'{i} uomini e un cane') for i, (source, _) in enumerate(TRAIN)
  ]
  first = held_out({'fr.tsv': TRAIN, 'it.tsv': other})
  assert len(first) == 8
  # By content: neither order nor place decides.
  assert held_out({'it.tsv': other[::-1], 'de.tsv': TRAIN}) == first
  digest = lambda source: hashlib.sha256(source.encode()).hexdigest()
  assert first == set(sorted(dict(TRAIN), key=digest)[:8])


KNOWN = [
  EVAL[0],
  (EVAL[1][0], 'autre'),
  ('other', EVAL[2][1]),
  EVAL[3][::-1],
  (f'{EVAL[4][0]} ', 'encore'),
]


def _epoch(found):
  return _texts(found, _take(found.train_batches(1, 0), len(found.train_R)))


def test_no_sentence_of_a_held_out_pair_is_trained_on(tmp_path):
  found = _load(tmp_path, TRAIN + KNOWN, EVAL + EVAL[:2])
  assert sorted(_epoch(found)) == sorted(TRAIN)
  held = [(r['source'], r['target']) for r in found.references(1.0, 1)]
  assert held == EVAL + EVAL[:2]  # as it was given
  assert ' 40 pairs in 1 file to train on, of which 0 longer than 64' in (
    found.description
  )
  said = ', besides 5 that share a sentence with held-out pairs; 13 pairs'
  assert said in found.description
  message = _refusal(tmp_path / 'none', train=KNOWN, held_out=EVAL)
  assert 'all 5 share a sentence with held-out pairs' in message


def test_a_fraction_holds_out_pairs_with_their_copies(tmp_path):
  found = _load(tmp_path, TRAIN * 3, [], eval_fraction=0.1)
  held = [(r['source'], r['target']) for r in found.references(1.0, 1)]
  assert len(held) == len(set(held)) == 4
  assert sorted(_epoch(found)) == sorted([*set(TRAIN).difference(held)] * 3)
  assert 'besides 8 that share' in found.description
  other = [(f'other {i}', target) for i, (_, target) in enumerate(TRAIN)]
  found = _load(tmp_path / 'targets', TRAIN + other, [], eval_fraction=0.1)
  held = {r['target'] for r in found.references(1.0, 1)}
  assert not held & {target for _, target in _epoch(found)}


def test_sha256_sees_content_order_split_and_language(tmp_path):
  def digest(train, held_out, **options):
    shutil.rmtree(tmp_path)
    options = {'language': '(..).tsv', 'vocab_size': 260, **options}
    return _load(tmp_path, train, held_out, **options).sha256

  one, two, out = ('aa', 'bb'), ('cc', 'dd'), ('ee', 'ff')
  base = {'fr.tsv': [one, two]}, {'fr.tsv': [out]}
  assert digest(*base) == digest(*base)
  variants = [
    digest(*base),
    digest({'fr.tsv': [two, one]}, {'fr.tsv': [out]}),
    digest({'fr.tsv': [one]}, {'fr.tsv': [two, out]}),
    digest({'it.tsv': [one, two]}, {'it.tsv': [out]}),
    digest({'afr.tsv': [one, two]}, {'fr.tsv': [out]}),
    digest({'fr.tsv': [one, ('cc', 'de')]}, {'fr.tsv': [out]}),
    digest({'fr.tsv': [one], 'gfr.tsv': [two]}, {'hfr.tsv': [out]}),
    digest({'fr.tsv': [one]}, {'gfr.tsv': [two], 'hfr.tsv': [out]}),
    digest(*base, language=''),
  ]
  assert len(set(variants)) == len(variants)


# --- languages and the vocabulary -------------------------------------------


def test_each_language_begins_the_source_with_its_own_id(tmp_path):
  train = {'en-fr.tsv': TRAIN, 'en-de.tsv': [('a dog', 'ein Hund')] * 5}
  held_out = {'x.en-fr.tsv': EVAL[:3], 'x.en-de.tsv': [('<|to fr|>', 'Hund')]}
  options = {'language': 'en-(..)', 'vocab_size': 280}
  found = _load(tmp_path, train, held_out, **options)
  assert found.sizes == {'V': 280}
  assert found.token_bytes.shape == (280,)
  (batch,) = found.eval_batches(4)
  _check_rows(found, batch)
  de, fr = batch['source_BxS'][0, 0], batch['source_BxS'][1, 0]
  assert len({de, fr, found.end, found.pad}) == 4
  assert batch['source_BxS'][:, 0].tolist() == [de, fr, fr, fr]
  assert not np.isin(batch['source_BxS'][:, 1:], [de, fr]).any()
  assert not np.isin(batch['target_BxL'], [de, fr]).any()
  # The marks are no text, and text that spells one is no mark.
  assert _texts(found, [batch]) == [('<|to fr|>', 'Hund'), *EVAL[:3]]
  references = found.references(1.0, 4)
  assert [r['language'] for r in references] == ['de', 'fr', 'fr', 'fr']
  assert ' to de, fr: 45 pairs in 2 files to train on' in found.description
  for batch in _take(found.train_batches(5, 0), 9):
    german = [
      found.decode(row) == 'ein Hund' for row in batch['target_BxL']
    ]  # fmt: skip
    assert (batch['source_BxS'][:, 0] == np.where(german, de, fr)).all()


def test_the_bpe_is_of_both_training_sides_alone(tmp_path):
  train = [('qqqqqqqq', 'zzzzzzzz')] * 9
  found = _load(tmp_path, train, [('xxxxxxxx', 'y')], vocab_size=262)
  lengths = [len(ids) for ids in found.tokenizer.encode(['q' * 8, 'z' * 8])]
  assert max(lengths) <= 2
  assert len(found.tokenizer.encode(['x' * 8])[0]) == 8


def test_save_is_read_by_the_library_and_by_tokenizer(found, tmp_path):
  found.save(tmp_path)
  again = tokenizer.load(tmp_path / 'tokenizer.json')
  assert again.fingerprint() == found.tokenizer.fingerprint()
  assert again.specials == {
    tokenizer.SEPARATOR: found.end,
    pairs.PAD: found.pad,
  }
  library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert library.get_vocab_size() == found.sizes['V']
  assert library.token_to_id(pairs.PAD) == found.pad


# --- the cache --------------------------------------------------------------


def test_the_second_start_neither_trains_nor_encodes(tmp_path, monkeypatch):
  first = _load(tmp_path)

  def fail(*args):
    raise AssertionError('made again')

  monkeypatch.setattr(tokenizer, 'train', fail)
  monkeypatch.setattr(tokenizer.BPE, 'encode', fail)
  again = _load(tmp_path)
  assert again.description == first.description
  assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
  for one, other in (
    (next(first.train_batches(8, 0)), next(again.train_batches(8, 0))),
    (*first.eval_batches(11), *again.eval_batches(11)),
  ):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  # The cut of the rows is no part of what is kept.
  assert _load(tmp_path, max_length=9).length == 9


@pytest.mark.parametrize(
  'harm', ['cut', 'mark', 'bound', 'text', 'id', 'rows', 'dtype']
)
def test_damaged_tokens_are_rebuilt(tmp_path, caplog, harm):
  first = _load(tmp_path)
  (path,) = (tmp_path / 'cache').glob('*-train.npz')
  with np.load(path) as kept:
    arrays = dict(kept)
  target_N = arrays['target_N']
  if harm == 'mark':
    target_N[arrays['target_bound_Q'][3] - 1] = first.pad
  elif harm == 'bound':
    arrays['target_bound_Q'][3] += 1
  elif harm == 'text':
    long = int(np.argmax(first.tokenizer.token_bytes))
    assert first.tokenizer.token_bytes[target_N[1]] == 1
    target_N[1] = long
  elif harm == 'id':
    target_N[1] = 270
  elif harm == 'rows':
    arrays['target_bound_Q'] = arrays['target_bound_Q'][:-1]
  elif harm == 'dtype':
    arrays['target_N'] = target_N.astype(np.int64)
  if harm == 'cut':
    path.write_bytes(path.read_bytes()[:-100])
  else:
    np.savez(path, **arrays)
  caplog.clear()
  again = _load(tmp_path)
  assert len(caplog.records) == 1 and str(path) in caplog.text
  np.testing.assert_array_equal(
    again.train.target.token_N, first.train.target.token_N
  )


# --- bad input --------------------------------------------------------------


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('no tab at all', "0 tabs, not one, in 'no tab at all'"),
    ('', "0 tabs, not one, in ''"),
    ('a\tb\tc', r"2 tabs, not one, in 'a\tb\tc'"),
    (' \tb', r"the source is empty in ' \tb'"),
    ('a\t', r"the target is empty in 'a\t'"),
    (b'\xc3\xa4\t\xff', 'byte 0xff is not UTF-8'),
  ],
)
@pytest.mark.parametrize('suffix', ['.tsv', '.tsv.gz'])
def test_refuses_bad_lines(tmp_path, line, words, suffix):
  raw = line if isinstance(line, bytes) else line.encode()
  content = 'ä\tb\nc\td\n'.encode() + raw + b'\ne\tf\n'
  message = _refusal(tmp_path, held_out={f'b{suffix}': content})
  assert f'{tmp_path}/eval/b{suffix}:3: {words}' in message


def test_refuses_files_without_pairs(tmp_path):
  assert 'a.tsv is empty' in _refusal(tmp_path / '1', train=b'')
  message = _refusal(tmp_path / '2', train={'b.tsv': TRAIN, 'a.tsv.xz': b''})
  assert 'a.tsv.xz is empty' in message
  message = _refusal(tmp_path / '3', train={})
  assert 'train/* matches no file' in message
  message = _refusal(tmp_path / '4', train=[('a', 'b')] * 9, held_out=[])
  assert 'no pair is left to train on, of 1 distinct sources' in message


def test_refuses_names_without_a_language(tmp_path):
  train = {'en-fr.tsv': TRAIN}
  message = _refusal(
    tmp_path / '1', train={**train, 'other.tsv': TRAIN}, language='en-(..)'
  )
  assert "'en-(..)' finds no language in the name of" in message
  assert message.endswith('other.tsv')
  message = _refusal(
    tmp_path / '2',
    train=train,
    held_out={'en-de.tsv': EVAL},
    language='en-(..)',
  )
  assert "en-de.tsv is held out in language 'de'" in message


def test_refuses_a_vocabulary_the_text_cannot_fill(tmp_path):
  message = _refusal(tmp_path, train=[('a', 'b')], vocab_size=300)
  assert 'data.vocab_size is 300, but this text makes a BPE of 258' in message
  languages = {f'{name}.tsv': TRAIN for name in ('ab', 'cd', 'ef')}
  message = _refusal(
    tmp_path / 'more', train=languages, held_out={'ab.tsv': EVAL},
    language='(..).tsv', vocab_size=260,
  )  # fmt: skip
  assert 'data.vocab_size is 260, but this text makes a BPE of 261' in message


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'path': ''}, 'data.path is empty'),
    ({'eval_fraction': 0.0}, 'is not a float in (0, 1)'),
    ({'vocab_size': 257}, 'data.vocab_size=257 is not an int in [258, 2^31)'),
    ({'eval_lines': -1}, 'data.eval_lines=-1 is not'),
    ({'max_length': 2}, 'seq_len is 2; it must be 3'),
    ({'source': 'text'}, "'text'; it can be pairs"),
    ({'language': 'en-('}, "'en-(' is no regular expression"),
    ({'language': 'en'}, "'en' has 0 groups"),
    ({'language': '(e)(n)'}, "'(e)(n)' has 2 groups"),
  ],
)
def test_config_refuses(options, words):
  with pytest.raises(DataError) as error:
    PairsConfig(**{'path': 'a.tsv', **options})
  assert words in str(error.value) and '\n' not in str(error.value)


# --- BLEU -------------------------------------------------------------------


def test_bleu_by_hand():
  reference = 'the cat sat on the mat , and so it goes'
  assert pairs.bleu([reference], [reference]) == pytest.approx(
    {'bleu': 100, 'chrf': 100}
  )
  # 9, 7, 5 and 3 of 10, 9, 8 and 7 n-grams match; one word is missing of 11.
  hypothesis_ = 'the cat sat in the mat , and so it'
  precision = (9 / 10 * 7 / 9 * 5 / 8 * 3 / 7) ** 0.25
  expected = 100 * precision * np.exp(1 - 11 / 10)
  assert pairs.bleu([hypothesis_], [reference])['bleu'] == pytest.approx(
    expected
  )


def test_bleu_is_of_the_corpus_and_has_an_order():
  references = ['a b c d e f', 'g h i j k l m n']
  swapped = pairs.bleu(references[::-1], references)
  assert pairs.bleu(references, references)['bleu'] > 99 > 1 > swapped['bleu']


def test_bleu_refuses(monkeypatch):
  for hypotheses, references in ((['a'], ['a', 'b']), ([], [])):
    with pytest.raises(ValueError, match=f'for {len(references)} references'):
      pairs.bleu(hypotheses, references)
  monkeypatch.setitem(sys.modules, 'sacrebleu', None)
  with pytest.raises(DataError, match=r"pip install -e '.\[translation\]'"):
    pairs.bleu(['a'], ['a'])
