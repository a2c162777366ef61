"""What is read, what is held out, and the one line each bad input gets."""

import gzip
import hashlib
import json
import lzma
import pathlib
import shutil
import tarfile

import pytest

from moe_jax.data import corpus
from moe_jax.data.corpus import DataConfig, DataError


def _write(path, content):
  """Writes text or bytes, packed as the name says."""
  raw = content.encode() if isinstance(content, str) else content
  pack = {'.xz': lzma.compress, '.gz': gzip.compress}
  path.write_bytes(pack.get(path.suffix, bytes)(raw))
  return path


def _load(path, **options):
  return corpus.load(DataConfig(source='text', path=str(path), **options))


def _refusal(path, **options):
  with pytest.raises(DataError) as error:
    _load(path, **options)
  message = str(error.value)
  assert '\n' not in message
  return message


def _lines(first, last):
  return ''.join(f'line {i:06d}\n' for i in range(first, last))


# --- the standard library ---------------------------------------------------


def test_stdlib_is_real_code_without_tests():
  found = corpus.load(DataConfig())
  text = '\n'.join(found.train + found.eval)
  assert 1_000_000 <= found.eval_bytes < found.train_bytes
  assert found.eval_bytes == sum(len(t.encode()) for t in found.eval)
  assert found.train_bytes == sum(len(t.encode()) for t in found.train)
  assert 'class ArgumentParser' in text
  assert 'class AbstractMemoryTests' not in text  # of test_memoryview
  assert not set(found.train) & set(found.eval)


def test_stdlib_holds_out_by_hash_of_the_path(tmp_path, monkeypatch):
  names = [f'{folder}m{i}.py' for folder in ('', 'p/q/') for i in range(20)]
  left_out = [f'{name}/m.py' for name in corpus.STDLIB_LEFT_OUT]
  left_out += ['p/tests/m.py', 'notes.txt']
  for name in names + left_out:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{name:<300000}')
  (tmp_path / 'p' / '__init__.py').write_text('')
  monkeypatch.setattr(corpus.sysconfig, 'get_path', lambda _: str(tmp_path))
  found = corpus.load(DataConfig())

  ranked = sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
  held = set(ranked[:4])  # 3 files of 300,000 bytes are too few
  assert [t.strip() for t in found.eval] == sorted(held)
  assert [t.strip() for t in found.train] == sorted(set(names) - held)


def test_stdlib_without_sources_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus.sysconfig, 'get_path', lambda _: str(tmp_path))
  with pytest.raises(DataError, match='holds 0 bytes'):
    corpus.load(DataConfig())


# --- files ------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.txt', '.txt.xz', '.txt.gz'])
def test_text_is_read_exactly(tmp_path, suffix):
  content = 'ä\r\nb\n\n' * 50 + '\ufeff€\x00 end'
  path = _write(tmp_path / f'a{suffix}', content)
  found = _load(path)
  assert ''.join(found.train + found.eval) == content


def test_several_fields_make_one_document(tmp_path):
  lines = [json.dumps({'a': f'{i}?', 'b': f'{i}!'}) for i in range(20)]
  path = _write(tmp_path / 'a.jsonl', '\n'.join(lines))
  found = _load(path, field='b,a')
  assert sorted(found.train + found.eval)[0] == '0!\n0?'
  assert "no field 'c'; it has 'a', 'b'" in _refusal(path, field='a,c')


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.xz', '.jsonl.gz'])
def test_jsonl_records_are_documents(tmp_path, suffix):
  texts = [f'text {i}\u2028\n' for i in range(20)]
  lines = [json.dumps({'id': 1, 'body': t}, ensure_ascii=False) for t in texts]
  lines.insert(3, '')
  lines.insert(5, json.dumps({'body': ''}))
  path = _write(tmp_path / f'a{suffix}', '\r\n'.join(lines))
  found = _load(path, field='body')
  assert sorted(found.train + found.eval) == sorted(texts)
  assert len(found.eval) == 2
  assert [t for t in texts if t in found.train] == found.train  # order kept


def test_globs_are_a_list_sorted_and_read_once(tmp_path):
  for name in ('b.txt', 'a.txt', 'sub/deep/c.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    _write(tmp_path / name, name)
  _write(tmp_path / 'eval.md', 'held out')
  found = _load(
    f'{tmp_path}/**/c.txt, {tmp_path}/*.txt,{tmp_path}/a*',
    eval_path=f'{tmp_path}/eval.md',
  )
  assert found.train == ['a.txt', 'b.txt', 'sub/deep/c.txt']
  assert found.eval == ['held out']


@pytest.mark.parametrize(
  'name', ['a[1].txt', 'what?.txt', 'run[1]/a.txt', 'x*/b[2].txt', 'a,b.txt']
)
def test_what_exists_as_it_is_written_is_no_glob(tmp_path, name):
  for other in ('a1.txt', 'whats.txt', 'run1/a.txt', 'xy/b2.txt', 'a', 'b.txt'):
    (tmp_path / other).parent.mkdir(exist_ok=True)
    _write(tmp_path / other, 'another')
  _write(tmp_path / 'held.md', 'held out')
  held = {'eval_path': f'{tmp_path}/held.md'}
  if ',' not in name:
    assert _load(tmp_path / name, **held).train == ['another']
  (tmp_path / name).parent.mkdir(exist_ok=True)
  _write(tmp_path / name, 'literal')
  assert _load(tmp_path / name, **held).train == ['literal']
  if '/' in name:  # files of such a folder, and not of those it would match
    glob = (tmp_path / name).parent / '*.txt'
    assert _load(glob, **held).train == ['literal']


def test_a_file_is_read_once_whatever_leads_to_it(tmp_path, monkeypatch):
  for name in ('a.txt', 'b.txt'):
    _write(tmp_path / name, name)
  _write(tmp_path / 'held.md', 'held out')
  (tmp_path / 'link.txt').symlink_to('b.txt')
  (tmp_path / 'also').symlink_to('.')
  monkeypatch.chdir(tmp_path)
  paths = f'*.txt,./a.txt,{tmp_path}/a.txt,also/b.txt'
  found = _load(paths, eval_path='held.md')
  assert sorted(found.train) == ['a.txt', 'b.txt']
  (tmp_path / 'c.txt').symlink_to('gone.txt')
  assert 'c.txt is a link to a file that does not exist' in _refusal('*.txt')


def test_eval_path_is_taken_out_of_path(tmp_path):
  for name in ('a.txt', 'b.txt'):
    _write(tmp_path / name, name)
  (tmp_path / 'link.txt').symlink_to(tmp_path / 'b.txt')
  found = _load(tmp_path / '*.txt', eval_path=str(tmp_path / 'link.txt'))
  assert (found.train, found.eval) == (['a.txt'], ['b.txt'])
  message = _refusal(tmp_path / 'a.txt', eval_path=str(tmp_path / '*.txt'))
  assert 'holds out every file' in message


def test_fraction_holds_out_whole_documents_by_content(tmp_path):
  for i in range(100):
    _write(tmp_path / f'{i:02d}.txt', f'{i:<1000}')
  found = _load(tmp_path / '*.txt', eval_fraction=0.1)
  assert len(found.eval) == 10 and len(found.train) == 90
  # Another name or place of a document does not change its side.
  for i in range(100):
    (tmp_path / f'{i:02d}.txt').rename(tmp_path / f'{99 - i:02d}.text')
  again = _load(tmp_path / '*.text', eval_fraction=0.1)
  assert set(again.eval) == set(found.eval)
  assert again.sha256 != found.sha256


@pytest.mark.parametrize('others', [0, 2])
def test_fraction_of_few_documents_is_the_end_of_the_largest(tmp_path, others):
  for i in range(others):
    _write(tmp_path / f'{i}.txt', 'small')
  _write(tmp_path / 'x.txt', _lines(0, 1000))
  found = _load(tmp_path / '*.txt', eval_fraction=0.2)
  assert found.eval == [_lines(800, 1000)]
  assert found.train == ['small'] * others + [_lines(0, 800)]


def _documents(tmp_path, texts, **options):
  """Loads lines of a .jsonl file."""
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  return _load(_write(tmp_path / 'a.jsonl', lines), field='text', **options)


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize(
  'texts, held, left_out',
  [
    ([f'text {i % 5} of five' for i in range(40)], 1, 7),
    # Of distinct texts a tenth, however much one is repeated.
    ([f'text {i:03}' for i in range(300)] + ['text 300'] * 9000, 30, None),
    ([f'text {i % 100:03}' for i in range(300)], 10, 20),
    ([f'text {i:03}' for i in range(300)], 30, 0),
  ],
)
def test_no_copy_of_what_is_held_out_is_trained_on(
  tmp_path, texts, held, left_out, order
):
  found = _documents(tmp_path, texts[::order])
  assert len(found.eval) == len(set(found.eval)) == held
  kept = [t for t in texts if t not in set(found.eval)]
  assert found.train == kept[::order]
  copies = len(texts) - held - len(kept)
  assert copies == left_out or left_out is None
  said = f'({copies:,} copies of held-out documents left out), '
  assert (said in found.description) == bool(copies)


def test_copies_may_differ_in_line_ends_and_space_around(tmp_path):
  texts = [f'text {i}\nof some\nlines' for i in range(40)]
  alike = [f'\ufeff{t}\n'.replace('\n', '\r\n') for t in texts]
  found = _documents(tmp_path, texts + alike)
  held = {texts.index(t) for t in found.eval}
  assert len(held) == len(found.eval) > 2
  assert found.train == [
    t for kind in (texts, alike) for i, t in enumerate(kind) if i not in held
  ]
  # Exact ones do not change what is held out.
  assert (
    _documents(tmp_path, texts * 3).eval == _documents(tmp_path, texts).eval
  )


def test_copies_of_the_largest_are_cut_as_it_is(tmp_path):
  texts = ['small', _lines(0, 1000), 'small', _lines(0, 1000) + '\n']
  found = _documents(tmp_path, texts, eval_fraction=0.2)
  assert found.eval == [_lines(800, 1000)]
  head = _lines(0, 800)
  assert found.train == ['small', head, 'small', head]
  assert '(1 copy of held-out documents left out)' in found.description


def test_copies_of_what_eval_path_names_are_left_out(tmp_path):
  for name, text in (('a', 'one'), ('b', 'two\n'), ('c', 'two'), ('d', 'two')):
    _write(tmp_path / f'{name}.txt', text)
  held = f'{tmp_path}/c.txt,{tmp_path}/d.txt'
  found = _load(tmp_path / '[ab].txt', eval_path=held)
  assert (found.train, found.eval) == (['one'], ['two', 'two'])
  assert '1 document (3 bytes) to train on (1 copy of' in found.description
  message = _refusal(tmp_path / 'b.txt', eval_path=held)
  assert 'no text is left to train on: all of it is held out' in message


def test_single_lines_are_held_out_whole_where_they_are_few(tmp_path):
  found = _documents(tmp_path, ['a' * 50, 'b' * 40, 'c' * 60])
  assert (found.train, found.eval) == (['a' * 50, 'c' * 60], ['b' * 40])
  for texts in (['a' * 50, 'b' * 50], ['a' * 5, 'b' * 5, 'c' * 5000]):
    with pytest.raises(DataError, match=r'single line, .* name what to hold'):
      _documents(tmp_path, texts)


@pytest.mark.parametrize('fraction', [1e-9, 0.3, 1 - 1e-9])
def test_fraction_leaves_text_on_both_sides(tmp_path, fraction):
  path = _write(tmp_path / 'a.txt', 'one\ntwo')
  found = _load(path, eval_fraction=fraction)
  assert (found.train, found.eval) == (['one\n'], ['two'])


def test_sha256_sees_content_order_and_split(tmp_path):
  def digest(train, held_out):
    shutil.rmtree(tmp_path)
    for i, text in enumerate(train + held_out):
      folder = tmp_path / ('train' if i < len(train) else 'eval')
      folder.mkdir(parents=True, exist_ok=True)
      _write(folder / f'{i}.txt', text)
    return _load(f'{tmp_path}/train/*', eval_path=f'{tmp_path}/eval/*').sha256

  assert digest(['a', 'b'], ['c']) == digest(['a', 'b'], ['c'])
  variants = [
    digest(['a', 'b'], ['c']),
    digest(['b', 'a'], ['c']),
    digest(['ab'], ['c']),
    digest(['a'], ['b', 'c']),
    digest(['a', 'B'], ['c']),
  ]
  assert len(set(variants)) == len(variants)


def test_eval_share():
  found = corpus.Corpus([], [], '', 0, 200, '')
  assert [found.eval_share(n) for n in (0, 50, 200, 999)] == [1, 0.25, 1, 1]


# --- bad input --------------------------------------------------------------


def test_refuses_paths_without_files(tmp_path):
  _write(tmp_path / 'a.txt', _lines(0, 9))
  assert 'matches no file' in _refusal(tmp_path / 'b.txt')
  assert 'b*' in _refusal(f'{tmp_path}/a.txt,{tmp_path}/b*')
  assert 'is a directory' in _refusal(tmp_path)
  message = _refusal(tmp_path / 'a.txt', eval_path=str(tmp_path / 'none'))
  assert 'data.eval_path' in message and 'matches no file' in message


def test_refuses_text_that_is_empty_or_one_line(tmp_path):
  assert 'no text in' in _refusal(_write(tmp_path / 'a.txt', ''))
  assert 'no text in' in _refusal(
    _write(tmp_path / 'a.jsonl', '{"body": ""}\n\n'), field='body'
  )
  assert 'single line' in _refusal(_write(tmp_path / 'b.txt', 'one line\n'))


@pytest.mark.parametrize('suffix', ['.txt', '.txt.xz', '.txt.gz', '.jsonl'])
def test_refuses_bytes_that_are_no_utf8(tmp_path, suffix):
  raw = 'ä\n'.encode() * 4 + b'{"\xff"}'
  path = _write(tmp_path / f'bad{suffix}', raw)
  message = _refusal(path, field='body' if suffix == '.jsonl' else '')
  assert str(path) in message and '0xff at offset 14' in message
  assert ('uncompressed' in message) == (suffix[-2:] in ('xz', 'gz'))


@pytest.mark.parametrize('suffix', ['.xz', '.gz'])
@pytest.mark.parametrize(
  'harm',
  ['cut', 'flip', 'stain', 'other', 'empty', 'behind', 'byte', 'second', 'end'],
)
def test_refuses_broken_archives(tmp_path, suffix, harm):
  path = _write(tmp_path / f'a.txt{suffix}', _lines(0, 999))
  raw = bytearray(path.read_bytes())
  first = bytes(raw)
  if harm == 'cut':
    raw = raw[: len(raw) // 2]
  elif harm == 'flip':
    raw[len(raw) // 2] ^= 0xFF
  elif harm == 'stain':
    raw[20:40] = b'\xff' * 20
  elif harm == 'other':
    raw = b'no archive at all'
  elif harm == 'behind':
    raw += bytes(4) + b'no archive at all'
  elif harm == 'byte':
    raw += b'!'
  elif harm == 'second':
    raw[len(raw) // 2] ^= 0xFF
    raw = first + raw
  elif harm == 'end':
    raw = first + raw[:-3]
  else:
    raw = b''
  path.write_bytes(raw)
  assert f'{path} is broken' in _refusal(path)


@pytest.mark.parametrize('suffix', ['.xz', '.gz'])
def test_all_streams_of_an_archive_are_read(tmp_path, suffix):
  pack = {'.xz': lzma.compress, '.gz': gzip.compress}[suffix]
  parts = [pack(_lines(i, i + 9).encode()) for i in (0, 9, 18)]
  path = tmp_path / f'a.txt{suffix}'
  for between, last in ((0, 0), (4, 8), (0, 4)):
    path.write_bytes(bytes(between).join(parts) + bytes(last))
    found = _load(path)
    assert ''.join(found.train + found.eval) == _lines(0, 27)
  if suffix == '.xz':  # its padding is of four bytes
    path.write_bytes(bytes(3).join(parts))
    assert f'{path} is broken' in _refusal(path)


@pytest.mark.parametrize('form', ['GNU tar', 'tar', 'zip', 'bz2'])
@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_refuses_archives_of_other_forms(tmp_path, form, suffix):
  (tmp_path / 'files').mkdir()
  _write(tmp_path / 'files' / 'a.txt', _lines(0, 9))
  kind = {'bz2': 'bztar', 'GNU tar': 'tar'}.get(form, form)
  made = shutil.make_archive(str(tmp_path / 'a'), kind, tmp_path / 'files')
  if form == 'GNU tar':
    with tarfile.open(made, 'w', format=tarfile.GNU_FORMAT) as file:
      file.add(tmp_path / 'files')
  path = _write(tmp_path / f'b.txt{suffix}', pathlib.Path(made).read_bytes())
  assert f'{path} is a {form} archive' in _refusal(path)


def test_a_text_about_archives_is_no_archive(tmp_path):
  path = _write(tmp_path / 'a.txt', 'a line\n' * 36 + 'what ustar is\n' * 99)
  assert path.read_bytes()[257:].startswith(b'ustar')
  assert _load(path).train_bytes


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('{"body": "a"', 'is not JSON'),
    ('[' * 100_000, 'too deep'),
    ('["body"]', 'JSON list, not an object'),
    ('{"text": "a", "id": 1}', "no field 'body'; it has 'text', 'id'"),
    ('{}', "no field 'body'; it has none"),
    ('{"body": 3}', 'is int, not a string'),
    ('{"body": "a\\ud800"}', 'half a surrogate pair at character 1'),
  ],
)
def test_refuses_bad_records(tmp_path, line, words):
  path = _write(tmp_path / 'a.jsonl', f'{{"body": "good"}}\n\n{line}\n')
  message = _refusal(path, field='body')
  assert f'{path} line 3' in message and words in message


def test_refuses_a_field_that_is_not_used_or_not_named(tmp_path):
  jsonl = _write(tmp_path / 'a.jsonl', '{"body": "good"}\n')
  assert 'data.field is empty; name the text field' in _refusal(jsonl)
  assert "it has 'body'" in _refusal(jsonl)
  text = _write(tmp_path / 'a.json', '{"body": "good"}\n')
  assert 'is no .jsonl file' in _refusal(text, field='body')


def test_refuses_a_file_that_cannot_be_read(tmp_path, monkeypatch):
  path = _write(tmp_path / 'a.txt', 'text')

  def denied(self):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'read_bytes', denied)
  assert f'cannot read {path}: Permission denied' in _refusal(path)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'source': 'web'}, "'web'; it can be python_stdlib or text"),
    ({'tokenizer': 'words'}, "'words'; it can be bytes, bpe or the path of"),
    ({'separator': '</s>'}, "'</s>', but data.tokenizer is 'bpe', which has"),
    ({'vocab_size': 256}, 'is 256; bpe needs at least 257'),
    ({'eval_fraction': 0.0}, 'is not a float in (0, 1)'),
    ({'eval_fraction': 1.0}, 'is not a float in (0, 1)'),
    ({'eval_bytes': -1}, '=-1 is not'),
    ({'source': 'text'}, 'data.path is empty'),
    ({'path': 'a.txt'}, "data.source='text' reads files"),
    ({'eval_path': 'a.txt'}, "data.source='text' reads files"),
    ({'field': 'body'}, "data.source='text' reads files"),
  ],
)
def test_config_refuses(options, words):
  with pytest.raises(DataError) as error:
    DataConfig(**options)
  assert words in str(error.value) and '\n' not in str(error.value)
