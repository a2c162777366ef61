"""Tokens lose nothing, and a BPE is the same wherever it is trained."""

import argparse
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from moe_jax import corpus, tokenizer
from moe_jax.corpus import DataConfig, DataError

CODE = pathlib.Path(argparse.__file__).read_text(encoding='utf-8')
BPE = tokenizer.train([CODE], 400)

SPELLINGS = st.sampled_from(
  [tokenizer.SEPARATOR, '\r\n\t', '\n\n    ', 'def f():', '\u00a0', '😀', ' ']
)
TEXT = st.lists(st.text() | SPELLINGS).map(''.join)


def _corpus(*texts, sha256='0'):
  size = sum(len(text.encode()) for text in texts)
  return corpus.Corpus(list(texts), ['eval'], sha256, size, 4, '')


@pytest.mark.parametrize('tok', [tokenizer.Bytes(), BPE])
@hypothesis.settings(deadline=None)
@hypothesis.given(texts=st.lists(TEXT, max_size=4))
def test_nothing_is_lost(tok, texts):
  encoded = tok.encode(texts)
  assert len(encoded) == len(texts)
  for text, ids in zip(texts, encoded, strict=True):
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tok.decode(ids) == text
    assert tok.separator not in ids
    assert tok.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize('tok', [tokenizer.Bytes(), BPE])
def test_vocabulary(tok):
  assert tok.token_bytes.shape == (tok.vocab_size,)
  assert tok.token_bytes.dtype == np.int32
  assert np.flatnonzero(tok.token_bytes == 0).tolist() == [tok.separator]
  # Any ids a model may sample decode to some text.
  assert isinstance(tok.decode(np.arange(tok.vocab_size)), str)
  assert tok.decode([tok.separator]) == ''


def test_bytes_are_utf8():
  assert tokenizer.Bytes().encode(['aé'])[0].tolist() == [97, 195, 169]
  assert tokenizer.Bytes().vocab_size == 257


def test_bpe_learns_from_code():
  (ids,) = BPE.encode([CODE])
  assert len(ids) < len(CODE.encode()) / 1.8
  assert '\n        ' in [BPE.decode([i]) for i in ids]


def test_bpe_merges_only_within_the_pattern():
  for index in range(BPE.vocab_size):
    token = BPE.decode([index]).rstrip(' \t')
    assert '\n' not in token.rstrip('\n'), repr(token)


def test_training_is_deterministic():
  again = tokenizer.train([CODE], 400)
  assert again.fingerprint() == BPE.fingerprint()
  assert tokenizer.train([CODE], 401).fingerprint() != BPE.fingerprint()


def test_large_documents_are_cut_where_the_pattern_cuts(monkeypatch):
  monkeypatch.setattr(tokenizer, 'CHUNK', 10**9)
  whole = BPE.encode([CODE, 'x'])
  monkeypatch.setattr(tokenizer, 'CHUNK', 100)
  assert len(list(tokenizer._chunks(CODE))) > 500
  cut = BPE.encode([CODE, 'x'])
  assert [c.tolist() for c in cut] == [w.tolist() for w in whole]
  assert tokenizer.train([CODE], 400).fingerprint() == BPE.fingerprint()


@pytest.mark.parametrize('tok', [tokenizer.Bytes(), BPE])
def test_save_and_load(tok, tmp_path):
  tok.save(tmp_path / 'tokenizer.json')
  again = tokenizer.load(tmp_path / 'tokenizer.json')
  assert type(again) is type(tok)
  assert (again.vocab_size, again.separator) == (tok.vocab_size, tok.separator)
  assert again.fingerprint() == tok.fingerprint()
  text = f'{CODE[:5000]} é {tokenizer.SEPARATOR}'
  assert again.encode([text])[0].tolist() == tok.encode([text])[0].tolist()
  assert again.decode(again.encode([text])[0]) == text


def test_the_library_alone_reads_what_bpe_saves(tmp_path):
  BPE.save(tmp_path / 'tokenizer.json')
  library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  ids = library.encode(CODE).ids
  assert ids == BPE.encode([CODE])[0].tolist()
  assert library.decode(ids) == CODE


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"model": 1}', '\x00'])
def test_load_refuses_what_is_no_tokenizer(tmp_path, content):
  path = tmp_path / 'tokenizer.json'
  path.write_text(content)
  with pytest.raises(DataError, match='holds no tokenizer'):
    tokenizer.load(path)
  with pytest.raises(DataError, match='holds no tokenizer'):
    tokenizer.load(tmp_path / 'missing')


def test_get_bytes_needs_no_cache(tmp_path):
  config = DataConfig(tokenizer='bytes', cache_dir=str(tmp_path / 'new'))
  assert tokenizer.get(config, _corpus('a')).vocab_size == 257
  assert not (tmp_path / 'new').exists()


def test_get_caches_by_corpus_and_vocabulary(tmp_path, monkeypatch):
  config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
  first = tokenizer.get(config, _corpus(CODE))
  trained = []
  train = tokenizer.train
  monkeypatch.setattr(
    tokenizer, 'train', lambda *args: trained.append(args) or train(*args)
  )
  again = tokenizer.get(config, _corpus(CODE))
  assert not trained and again.fingerprint() == first.fingerprint()
  tokenizer.get(config, _corpus(CODE, sha256='1'))
  larger = DataConfig(vocab_size=301, cache_dir=str(tmp_path))
  assert tokenizer.get(larger, _corpus(CODE)).vocab_size == 301
  assert len(trained) == 2


def test_get_trains_on_the_training_split_alone(tmp_path):
  config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
  found = corpus.Corpus([CODE], ['zqzq' * 9999], '0', 0, 0, '')
  (ids,) = tokenizer.get(config, found).encode(['zqzq'])
  assert len(ids) == 4


@pytest.mark.parametrize('harm', ['cut', 'empty', 'other', 'vocabulary'])
def test_get_rebuilds_a_damaged_file(tmp_path, caplog, harm):
  config = DataConfig(vocab_size=300, cache_dir=str(tmp_path))
  first = tokenizer.get(config, _corpus(CODE))
  (path,) = tmp_path.iterdir()
  content = json.loads(path.read_text())
  content['model']['vocab'].popitem()
  path.write_text(
    {
      'cut': path.read_text()[:5000],
      'empty': '',
      'other': json.dumps({'type': 'bytes'}),
      'vocabulary': json.dumps(content),
    }[harm]
  )
  again = tokenizer.get(config, _corpus(CODE))
  assert again.fingerprint() == first.fingerprint()
  assert len(caplog.records) == 1 and str(path) in caplog.text
  caplog.clear()
  tokenizer.get(config, _corpus(CODE))
  assert not caplog.records  # the file is whole again


def test_refuses_a_vocabulary_the_text_cannot_fill():
  with pytest.raises(DataError, match=r'is 300, but .* a BPE of 259 tokens'):
    tokenizer.train(['abc'], 300)
