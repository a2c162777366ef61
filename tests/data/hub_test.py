"""Text through the `datasets` library: what is read, and what is refused."""

import json
import subprocess
import sys

import datasets
import huggingface_hub
import pytest

from moe_jax.data import corpus, dataset, huggingface
from moe_jax.data.corpus import DataError
from moe_jax.data.huggingface import HubConfig

TRAIN = [f'document {i}: {"so it goes " * (i % 5)}\n' for i in range(40)]
HELD_OUT = [f'held out {i}' for i in range(7)]


def _rows(texts):
  return datasets.Dataset.from_dict(
    {'text': texts, 'id': list(range(len(texts)))}
  )


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
  """No copy in the user's cache, and no try of the network."""
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The same two splits, in each way that they may lie on a disk."""
  root = tmp_path_factory.mktemp('hub')
  splits = {'train': _rows(TRAIN), 'validation': _rows(HELD_OUT)}
  datasets.DatasetDict(splits).save_to_disk(root / 'saved')
  for kind in ('parquet', 'jsonl'):
    (root / kind).mkdir()
    for name, rows in splits.items():
      write = rows.to_parquet if kind == 'parquet' else rows.to_json
      write(root / kind / f'{name}.{kind}')
  return root


def _load(path, **options):
  return huggingface.load(HubConfig(path=str(path), **options))


def _refusal(path, **options):
  with pytest.raises(DataError) as error:
    _load(path, **options)
  message = str(error.value)
  assert '\n' not in message
  return message


# --- what is read -----------------------------------------------------------


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('kind', ['saved', 'parquet', 'jsonl'])
def test_the_same_corpus_however_it_lies(folders, kind, streaming):
  found = _load(folders / kind, eval_split='validation', streaming=streaming)
  assert found.train == TRAIN
  assert found.eval == HELD_OUT
  assert found.train_bytes == sum(len(text) for text in TRAIN)
  documents = [
    [corpus.Document(f'{s}:{i}', t, len(t)) for i, t in enumerate(texts)]
    for s, texts in (('train', TRAIN), ('validation', HELD_OUT))
  ]
  assert found.sha256 == corpus.of('', *documents).sha256


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('kind', ['saved', 'parquet'])
def test_only_the_first_rows_are_read(folders, kind, streaming):
  options = dict(eval_split='validation', streaming=streaming)
  found = _load(folders / kind, documents=3, eval_documents=2, **options)
  assert (found.train, found.eval) == (TRAIN[:3], HELD_OUT[:2])
  found = _load(folders / kind, documents=999, eval_documents=999, **options)
  assert (found.train, found.eval) == (TRAIN, HELD_OUT)


def test_a_stream_is_read_no_further_than_asked(monkeypatch):
  """A stream that never ends, and whose columns nothing tells."""
  read = []

  def rows():
    while True:
      read.append(1)
      yield {'text': f'{len(read)}\n', 'id': 3}

  endless = datasets.IterableDataset.from_generator(rows)
  assert endless.column_names is None
  monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kw: endless)
  found = _load('endless', streaming=True, documents=20, eval_fraction=0.3)
  assert len(found.train + found.eval) == 20 and len(read) < 50
  assert "has 'text', 'id'" in _refusal('endless', field='body', documents=1)


def test_what_the_library_is_asked_for(monkeypatch):
  asked = []
  monkeypatch.setattr(
    datasets,
    'load_dataset',
    lambda *args, **kw: (
      asked.append((args, kw))
      or _rows(HELD_OUT if kw['split'] == 'y' else TRAIN)
    ),
  )
  _load('a/b', subset='c', split='x[:9]', eval_split='y', revision='v1')
  _load('a/b', streaming=True)
  known = dict(revision='v1', streaming=False)
  assert asked == [
    (('a/b', 'c'), dict(split='x[:9]', **known)),
    (('a/b', 'c'), dict(split='y', **known)),
    (('a/b', None), dict(split='train', revision=None, streaming=True)),
  ]


def test_several_columns_make_one_document(tmp_path):
  columns = {x: [f'{i}{x}' for i in range(20)] for x in 'ab'}
  datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / 'saved')
  found = _load(tmp_path / 'saved', field='b,a', eval_fraction=0.2)
  assert sorted(found.train + found.eval)[0] == '0b\n0a'
  assert "no column 'c'" in _refusal(tmp_path / 'saved', field='a,c')


def test_a_fraction_is_held_out_as_of_files(folders, tmp_path):
  (tmp_path / 'a.jsonl').write_text(
    ''.join(json.dumps({'text': text}) + '\n' for text in TRAIN)
  )
  files = corpus.load(
    corpus.DataConfig(
      source='text', path=str(tmp_path / 'a.jsonl'), field='text',
      eval_fraction=0.2,
    )
  )  # fmt: skip
  found = _load(folders / 'saved', eval_fraction=0.2)
  assert 3 < len(found.eval) < 12
  assert (found.train, found.eval) == (files.train, files.eval)


def test_no_row_of_one_split_is_in_the_other(tmp_path):
  splits = {'train': _rows(TRAIN + HELD_OUT[2:]), 'test': _rows(HELD_OUT)}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / 'two')
  found = _load(tmp_path / 'two', eval_split='test')
  assert (found.train, found.eval) == (TRAIN, HELD_OUT)
  assert '(5 copies of held-out documents left out)' in found.description
  found = _load(tmp_path / 'two', split='train', eval_fraction=0.2)
  assert len(found.train + found.eval) == 45


def test_empty_and_null_rows_are_left_out_but_counted(tmp_path):
  splits = {'train': _rows(['', 'a', None, 'é']), 'test': _rows([None, 'b'])}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / 'two')
  found = _load(tmp_path / 'two', eval_split='test')
  expected = (
    [corpus.Document('train:1', 'a', 1), corpus.Document('train:3', 'é', 2)],
    [corpus.Document('test:1', 'b', 1)],
  )
  assert (found.train, found.eval) == (['a', 'é'], ['b'])
  assert found.sha256 == corpus.of('', *expected).sha256


# --- what is refused --------------------------------------------------------


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('kind', ['saved', 'parquet', 'jsonl'])
def test_refuses_columns_and_splits_with_those_there_are(
  folders, kind, streaming
):
  options = dict(streaming=streaming)
  message = _refusal(folders / kind, field='body', **options)
  assert "no column 'body'" in message and "'text'" in message
  message = _refusal(folders / kind, field='id', **options)
  assert "'id' of data.field holds int, not strings" in message
  message = _refusal(folders / kind, eval_split='test', **options)
  assert 'test' in message and "'train', 'validation'" in message


def test_columns_are_told_with_their_types(folders):
  message = _refusal(folders / 'saved', field='body')
  assert message.endswith("it has 'text' (string), 'id' (int64)")


def test_a_single_saved_set_has_one_split(tmp_path):
  _rows(TRAIN).save_to_disk(tmp_path / 'one')
  assert len(_load(tmp_path / 'one', documents=9).train) == 8
  assert "no split 'test'; it has 'train'" in _refusal(
    tmp_path / 'one', split='test'
  )
  named = datasets.Dataset.from_dict({'text': TRAIN}, split='validation')
  named.save_to_disk(tmp_path / 'named')
  assert "it has 'validation'" in _refusal(tmp_path / 'named')


def test_refuses_what_does_not_exist(folders, tmp_path):
  assert 'nobody/nothing train: Couldn' in _refusal('nobody/nothing')
  assert str(tmp_path / 'none') in _refusal(tmp_path / 'none')
  message = _refusal(folders / 'parquet', subset='large')
  assert 'large' in message and "Available: ['default']" in message
  assert "subset is 'large'" in _refusal(folders / 'saved', subset='large')
  assert 'is on this disk' in _refusal(folders / 'parquet', revision='main')
  (tmp_path / 'empty').mkdir()
  assert 'empty' in _refusal(tmp_path / 'empty')


def test_refuses_broken_files_and_runs_no_code(tmp_path):
  for kind in ('parquet', 'jsonl'):
    (tmp_path / kind).mkdir()
    (tmp_path / kind / f'train.{kind}').write_text('{"text": what\n')
    for streaming in (False, True):
      assert f'{tmp_path / kind} train: ' in _refusal(
        tmp_path / kind, streaming=streaming
      )
  (tmp_path / 'code').mkdir()
  mark = tmp_path / 'mark'
  (tmp_path / 'code' / 'code.py').write_text(f'open({str(mark)!r}, "w")')
  assert 'no longer supported' in _refusal(tmp_path / 'code')
  assert not mark.exists()


def test_refuses_a_set_without_text(tmp_path):
  _rows(['', '']).save_to_disk(tmp_path / 'one')
  assert 'there is no text in' in _refusal(tmp_path / 'one')


def test_without_the_library_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  assert "pip install -e '.[hf]'" in _refusal('a/b')


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'source': 'text'}, "'text'; it can be huggingface"),
    ({'path': ''}, 'data.path is empty'),
    ({'split': ''}, 'data.split is empty'),
    ({'field': ''}, 'data.field is empty'),
    ({'eval_split': 'train'}, "are both 'train'"),
    ({'documents': -1}, 'data.documents=-1 is not'),
    ({'eval_split': 'test', 'eval_documents': -1}, 'eval_documents=-1 is not'),
    ({'eval_documents': 5}, 'data.eval_split is empty'),
    ({'order': 'sideways'}, "'sideways'"),  # as for all text
  ],
)
def test_config_refuses(options, words):
  with pytest.raises(DataError) as error:
    HubConfig(**{'path': 'a/b', **options})
  assert words in str(error.value) and '\n' not in str(error.value)


def test_nobody_waits_for_a_library_that_is_not_asked_for():
  code = (
    'import sys; from moe_jax import config; config.source("huggingface");'
    'sys.exit("datasets" in sys.modules)'
  )
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_source_is_known_by_name(folders):
  source = dataset.source('huggingface')
  config = HubConfig(path=str(folders / 'saved'), tokenizer='bytes')
  found = source.load(config, 16)
  assert source.model == 'decoder' and found.sizes == {'V': 257}
  assert 'saved: ' in found.description
