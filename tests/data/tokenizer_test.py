"""Tokens lose nothing, and a BPE is the same wherever it is trained."""

import argparse
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from moe_jax.data import corpus, tokenizer
from moe_jax.data.corpus import DataConfig, DataError

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


def test_ids_beyond_the_vocabulary_are_no_text():
  """A model may have more than its tokenizer."""
  assert tokenizer.Bytes().decode([97, 256, 300, 98]) == 'ab'
  text = BPE.encode(['a b'])[0].tolist()
  assert BPE.decode([*text, BPE.vocab_size + 3]) == 'a b'


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


# --- tokenizers of others ---------------------------------------------------

WORDS = ['hello world, this is it\n', 'the world is 2 é  wide']
TEXTS = [*WORDS, 'this  is\n\tit']


def _others(kind):
  """A tokenizer as others make them, trained on WORDS."""
  special, trainer, options = ['<unk>', '<s>', '</s>'], trainers.BpeTrainer, {}
  if kind == 'gpt2':
    library, special = tokenizers.Tokenizer(models.BPE()), [tokenizer.SEPARATOR]
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    options = {'initial_alphabet': pre_tokenizers.ByteLevel.alphabet()}
  elif kind == 'llama':
    library = tokenizers.Tokenizer(
      models.BPE(byte_fallback=True, unk_token='<unk>')
    )
    library.normalizer = normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
    library.decoder = decoders.Sequence(
      [
        *(decoders.Replace('▁', ' '), decoders.ByteFallback()),
        *(decoders.Fuse(), decoders.Strip(' ', 1, 0)),
      ]
    )
    special += [f'<0x{byte:02X}>' for byte in range(256)]
  elif kind == 'wordpiece':
    library = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer, special = trainers.WordPieceTrainer, ['[UNK]', '[CLS]', '[SEP]']
    library.enable_truncation(4)
    library.enable_padding()
  elif kind == 'unigram':
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer, options = trainers.UnigramTrainer, {'unk_token': '<unk>'}
  else:
    library = tokenizers.Tokenizer(models.WordLevel(unk_token='[UNK]'))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer, special = trainers.WordLevelTrainer, ['[UNK]', '[EOS]']
  library.train_from_iterator(
    WORDS * 20,
    trainer(
      vocab_size=400, special_tokens=special, show_progress=False, **options
    ),
  )
  return library


def _file(tmp_path, library):
  library.save(str(tmp_path / 'tokenizer.json'))
  return tmp_path / 'tokenizer.json'


def _stream_bytes(tok, texts):
  """What a stream of these texts counts, separators included."""
  ids = tok.encode(texts)
  sizes = tok.measure(texts, ids)
  if sizes is None:
    return None
  assert sizes.dtype == np.int32 and sizes.shape == (tok.vocab_size,)
  return sum(sizes[own].sum() + sizes[tok.separator] for own in ids)


@pytest.mark.parametrize(
  ('kind', 'separator', 'spells'),
  [
    ('gpt2', '<|endoftext|>', True),
    ('llama', '</s>', True),
    ('wordpiece', '[SEP]', False),
    ('unigram', '</s>', False),
    ('words', '[EOS]', False),
  ],
)
def test_files_of_others(tmp_path, kind, separator, spells):
  library = _others(kind)
  path = _file(tmp_path, library)
  tok = tokenizer.load(path)
  assert tok.separator == library.token_to_id(separator)
  assert tok.vocab_size == library.get_vocab_size()

  library.no_truncation(), library.no_padding()
  expected = [library.encode(t, add_special_tokens=False).ids for t in TEXTS]
  found = tok.encode(TEXTS)
  assert [ids.tolist() for ids in found] == expected
  assert all(ids.dtype == np.int32 for ids in found)
  assert tok.decode([*found[0], tok.separator]) == library.decode(expected[0])

  if spells:
    size = sum(len(text.encode()) for text in TEXTS)
    assert _stream_bytes(tok, TEXTS) == size
    assert tok.decode(found[2]) == TEXTS[2]
  else:
    assert _stream_bytes(tok, TEXTS) is None

  tok.save(tmp_path / 'again.json')
  again = tokenizer.load(tmp_path / 'again.json')
  assert again.fingerprint() == tok.fingerprint()
  assert [ids.tolist() for ids in again.encode(TEXTS)] == expected


def _marked(kind='llama'):
  """With a mark before a text and marks of a chat."""
  library = _others(kind)
  library.add_special_tokens(['<s>', '<|im_start|>'])
  first = '<s>', library.token_to_id('<s>')
  library.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[first]
  )
  return library


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_a_prompt_has_the_marks_that_it_spells(tmp_path, kind):
  """A document that spells them has letters."""
  library = _marked(kind)
  tok = tokenizer.load(_file(tmp_path, library))
  text, of = '<|im_start|>hello', library.token_to_id
  found = tok.prompt(text)
  assert found[:2] == [of('<s>'), of('<|im_start|>')]
  assert found == library.encode(text).ids
  assert of('<|im_start|>') not in tok.encode([text])[0]  # and afterwards
  assert tok.marks() == [of('<s>')]
  assert tokenizer.load(_file(tmp_path, _others(kind))).marks() == []
  assert BPE.prompt('a<|endoftext|>')[-1] == BPE.separator
  assert BPE.separator not in BPE.encode(['a<|endoftext|>'])[0]


def _published(path, family='llama', ends=(), **settings):
  text, separator = tokenizer.published(path, settings, family, list(ends))
  return tokenizers.Tokenizer.from_str(text), separator


def test_a_published_tokenizer_is_read_as_its_class_reads_it(tmp_path):
  """Of LlamaTokenizer; what transformers says is in transformers_test.py."""
  path, llama = (
    _file(tmp_path, _marked()),
    {'tokenizer_class': 'LlamaTokenizer'},
  )
  plain = tokenizers.Tokenizer.from_file(str(path)).encode(' hello').tokens
  for family, settings in (('llama', {}), ('mixtral', llama)):
    found, _ = _published(path, family, **settings)
    assert found.encode(' hello').tokens == plain
  found, _ = _published(path, **llama)
  assert found.encode(' hello').tokens == found.encode('hello').tokens != plain
  assert found.encode('hello').tokens[0] == '<s>'
  ids = found.encode('hello', add_special_tokens=False).ids
  assert found.decode(ids) == 'hello'
  for settings, spaces in (({}, 0), ({'legacy': True}, 1)):
    found, _ = _published(path, **{**llama, **settings})
    tokens = found.encode('<|im_start|>hello').tokens
    assert ''.join(tokens[2:]) == '\u2581' * spaces + 'hello'
  found, _ = _published(path, **llama, add_prefix_space=False)
  assert found.encode('hello').tokens[1:] != plain[2:]
  assert ''.join(found.encode('hello').tokens[1:]) == 'hello'


def test_an_end_that_is_not_marked_special_becomes_it(tmp_path):
  library = _others('gpt2')
  library.add_tokens(['<end>'])
  path, at = _file(tmp_path, library), library.token_to_id('<end>')
  found, separator = _published(path, ends=[10**6, at])
  assert separator == '<end>' and found.get_vocab_size() == at + 1
  tok = tokenizer.load(_file(tmp_path, found), separator)
  assert tok.separator == at
  assert _published(path, ends=[])[1] == ''


def test_bytes_are_told_only_of_text_that_is_spelled_exactly(tmp_path, caplog):
  tok = tokenizer.load(_file(tmp_path, _others('llama')))
  assert _stream_bytes(tok, ['a', 'b']) == 2 and not caplog.records
  assert _stream_bytes(tok, ['a', 'one\u2581two']) is None  # reads as a space
  assert 'no bits per byte' in caplog.text
  library = _others('gpt2')
  library.normalizer = normalizers.Lowercase()  # loses no byte, but the text
  tok = tokenizer.load(_file(tmp_path, library))
  assert _stream_bytes(tok, ['hello']) == 5
  assert _stream_bytes(tok, ['Hello']) is None


def test_added_tokens_count_as_they_are_written(tmp_path):
  library = _others('gpt2')
  library.add_tokens(['  ', 'ü'])  # not in the letters of byte-level BPE
  library.add_special_tokens(['<\uff5cstop\uff5c>'])
  tok = tokenizer.load(_file(tmp_path, library))
  ids = tok.encode(['a  ü'])[0].tolist()
  assert library.token_to_id('  ') in ids and library.token_to_id('ü') in ids
  assert _stream_bytes(tok, ['a  ü', '<\uff5cstop\uff5c>']) == 5 + 12


def test_ids_may_have_holes(tmp_path):
  library = tokenizers.Tokenizer(
    models.WordLevel({'[UNK]': 0, 'a': 5, '</s>': 9}, unk_token='[UNK]')
  )
  library.add_special_tokens(['</s>'])
  tok = tokenizer.load(_file(tmp_path, library))
  assert tok.vocab_size == 10
  assert _stream_bytes(tok, ['a']) == 1


def test_a_separator_may_be_named_and_added(tmp_path):
  library = _others('wordpiece')
  path = _file(tmp_path, library)
  tok = tokenizer.load(path, '[CLS]')
  assert tok.separator == library.token_to_id('[CLS]')
  assert tok.fingerprint() != tokenizer.load(path).fingerprint()
  new = tokenizer.load(path, tokenizer.SEPARATOR)
  assert new.separator == tok.vocab_size == new.vocab_size - 1
  new.save(tmp_path / 'new.json')
  again = tokenizer.load(tmp_path / 'new.json', tokenizer.SEPARATOR)
  assert again.fingerprint() == new.fingerprint()


def test_refuses_a_file_without_a_separator(tmp_path):
  library = tokenizers.Tokenizer(models.WordLevel({'a': 0}))
  path = _file(tmp_path, library)
  with pytest.raises(DataError, match=r"be '<.endoftext.>', which is added"):
    tokenizer.load(path)
  assert tokenizer.load(path, tokenizer.SEPARATOR).separator == 1
  library.add_special_tokens(['[PAD]', '[MASK]'])
  path = _file(tmp_path, library)
  with pytest.raises(DataError, match=r"has none of .* '\[MASK\]', '\[PAD\]'"):
    tokenizer.load(path)
  with pytest.raises(DataError, match=r"no special token '\[PAF\]'; .*\[PAD\]"):
    tokenizer.load(path, '[PAF]')
  with pytest.raises(DataError, match="no special token 'a'"):
    tokenizer.load(path, 'a')


def test_refuses_text_that_reads_as_the_separator(tmp_path):
  tok = tokenizer.load(_file(tmp_path, _others('words')))
  with pytest.raises(DataError) as error:
    tok.encode(['hello', 'so [EOS] it'])
  message = str(error.value)
  assert 'document 2 of 2' in message and "'[EOS]'" in message
  assert message.endswith("can be '[UNK]' or '<|endoftext|>', which is added")
  # Where the tokenizer can spell it, it is text like any other.
  tok = tokenizer.load(_file(tmp_path, _others('llama')))
  assert tok.decode(tok.encode(['</s> it'])[0]) == '</s> it'


def test_refuses_a_tokenizer_that_fails_or_draws(tmp_path):
  library = tokenizers.Tokenizer(models.WordLevel({'a': 0}))
  library.add_special_tokens(['</s>'])
  tok = tokenizer.load(_file(tmp_path, library))
  with pytest.raises(DataError, match=r'fails on a text: .*UNK'):
    tok.encode(['b'])
  for library in (_others('gpt2'), tokenizer.train([CODE], 300)._library):
    library.model.dropout = 0.5
    with pytest.raises(DataError, match=r'dropout of 0\.5'):
      tokenizer.load(_file(tmp_path, library))


def test_the_batches_of_documents_are_not_seen(tmp_path, monkeypatch):
  tok = tokenizer.load(_file(tmp_path, _others('gpt2')))
  texts = ['hello ' * i for i in range(30)]
  expected = [ids.tolist() for ids in tok.encode(texts)]
  monkeypatch.setattr(tokenizer, 'CHUNK', 1)
  assert 1 < len(list(tokenizer._batches(texts))) < 30
  assert [ids.tolist() for ids in tok.encode(texts)] == expected


def test_get_reads_a_file_that_must_have_the_size_of_the_config(tmp_path):
  path = _file(tmp_path, _others('words'))
  size = tokenizer.load(path).vocab_size
  options = dict(tokenizer=str(path), cache_dir=str(tmp_path / 'new'))
  config = DataConfig(vocab_size=size, separator='[UNK]', **options)
  assert tokenizer.get(config, _corpus('a')).separator == 0
  assert not (tmp_path / 'new').exists()
  with pytest.raises(DataError, match=f'is 4096, but .* has {size} ids'):
    tokenizer.get(DataConfig(**options), _corpus('a'))
  with pytest.raises(DataError, match='holds no tokenizer'):
    tokenizer.get(DataConfig(tokenizer='none.json'), _corpus('a'))


def test_a_file_of_a_run_is_read_as_that_run_did(tmp_path):
  BPE.save(tmp_path / 'bpe.json')
  tokenizer.Bytes().save(tmp_path / 'bytes.json')
  for name, expected in (('bpe', BPE), ('bytes', tokenizer.Bytes())):
    config = DataConfig(
      tokenizer=str(tmp_path / f'{name}.json'), vocab_size=expected.vocab_size
    )
    found = tokenizer.get(config, _corpus('a'))
    assert type(found) is type(expected)
    assert found.fingerprint() == expected.fingerprint()
  with pytest.raises(DataError, match=r'has no special token .x.'):
    tokenizer.load(tmp_path / 'bpe.json', 'x')
  with pytest.raises(DataError, match='holds no tokenizer'):
    tokenizer.load(tmp_path / 'bytes.json', 'x')
