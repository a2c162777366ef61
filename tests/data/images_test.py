"""Which images are read and held out, their batches, and what is refused."""

import collections
import json
import math
import re
import sys
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import exact
from moe_jax.data import images
from moe_jax.data.images import DataError, ImagesConfig
from tests.helpers import parts

DTYPES = {
  'image_BxYxXxC': np.float32,
  'target_BxL': np.int32,
  'mask_BxL': np.float32,
  'segment_BxL': np.int32,
  'row_B': np.int32,
}


def _pixels(n, Y=3, X=4, C=None, first=0):
  """Images in which no two are alike; image i starts with first + i."""
  shape = (n, Y, X) if C is None else (n, Y, X, C)
  pixels = np.random.default_rng(n).integers(1, 255, shape, dtype=np.uint8)
  pixels[:, 0, 0] = np.arange(first, first + n).reshape(-1, *[1] * bool(C))
  return pixels


def _labels(n, V=3):
  return (np.arange(n) % V).astype(np.uint8)


def _write(path, **arrays):
  np.savez_compressed(path, **arrays)
  return path


def _load(path, **options):
  return images.load(ImagesConfig(source='images', path=str(path), **options))


def _both(tmp_path, n=20, held=7, **options):
  """Images with a held-out set of their own, numbered on after training."""
  path = _write(
    tmp_path / 'both.npz',
    x_train=_pixels(n), y_train=_labels(n),
    x_test=_pixels(held, first=100), y_test=_labels(held),
  )  # fmt: skip
  return _load(path, **options)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _raw(found, batch):
  """Pixels as they were read."""
  image = batch['image_BxYxXxC'] * found.deviation_C + found.mean_C
  raw = np.rint(image)
  np.testing.assert_allclose(image, raw, atol=1e-3)
  return raw.astype(np.int64)


def _numbers(found, batches):
  """(number, label) of each image that counts, in order."""
  pairs = []
  for batch in batches:
    number_B = _raw(found, batch)[:, 0, 0, 0]
    for number, (label,), (counts,) in zip(
      number_B, batch['target_BxL'], batch['mask_BxL'], strict=True
    ):
      if counts:
        pairs.append((int(number), int(label)))
  return pairs


def _same(actual, expected):
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name])


# --- what is read -----------------------------------------------------------


def test_digits():
  found = images.load(ImagesConfig())
  assert found.sizes == {'V': 10, 'size': (8, 8, 1)}
  assert '1,617 images of 8x8x1 to train on, 180 held out' in found.description
  batches = list(found.eval_batches(32))
  assert sum(batch['mask_BxL'].sum() for batch in batches) == 180
  values = np.unique([_raw(found, batch) for batch in batches])
  assert values.tolist() == list(range(17))


def test_digits_without_sklearn(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  with pytest.raises(DataError, match=r"pip install -e '.\[vision\]'"):
    images.load(ImagesConfig())


@pytest.mark.parametrize('C', [None, 3])
def test_pixels_are_standardised_by_channel(tmp_path, C):
  pixels = _pixels(40, C=C).astype(np.float64)
  if C:
    pixels = pixels * [1.0, 5.0, 0.0] + [0.0, -9.0, 7.0]
  path = _write(tmp_path / 'a.npz', images=pixels, labels=_labels(40))
  found = _load(path, eval_fraction=0.25, channels='last')
  assert found.sizes == {'V': 3, 'size': (3, 4, C or 1)}
  (batch,) = _take(found.train_batches(30, seed=0), 1)  # an epoch
  assert {name: value.dtype for name, value in batch.items()} == DTYPES
  shapes = {name: value.shape for name, value in batch.items()}
  assert shapes == {
    'image_BxYxXxC': (30, 3, 4, C or 1),
    'target_BxL': (30, 1),
    'mask_BxL': (30, 1),
    'segment_BxL': (30, 1),
    'row_B': (30,),
  }
  image = batch['image_BxYxXxC'].astype(np.float64)
  np.testing.assert_allclose(image.mean(axis=(0, 1, 2)), 0, atol=1e-6)
  expected = [1.0, 1.0, 0.0] if C else [1.0]  # a channel that never varies
  np.testing.assert_allclose(image.std(axis=(0, 1, 2)), expected, rtol=1e-5)
  # The held-out images are measured by those of training, not by their own.
  held = _numbers(found, found.eval_batches(10))
  assert {n for n, _ in held} < set(range(40)) and len(held) == 10


@pytest.mark.parametrize(
  'Y, X, C',
  [(5, 6, 3), (28, 28, 1), (6, 5, 4), (4, 4, 3), (9, 9, 7), (4, 9, 2)],
)
def test_channels_are_last_wherever_they_were(tmp_path, Y, X, C):
  last = _pixels(8, Y, X, C)
  sure = Y > 4 or Y == X
  digests = set()
  for where, pixels in (('last', last), ('first', np.moveaxis(last, -1, 1))):
    path = _write(tmp_path / 'a.npz', images=pixels, labels=_labels(8))
    found = _load(path, channels='auto' if sure else where)
    assert found.sizes['size'] == (Y, X, C)
    (batch,) = found.eval_batches(1)
    assert _raw(found, batch)[0].tolist() in last.tolist()
    digests |= {found.sha256, _load(path, channels=where).sha256}
  assert len(digests) == 1


def test_many_images_are_standardised_together(tmp_path):
  pixels = np.random.default_rng(0).normal(50, 3, (2500, 1, 2))
  pixels[2048:] += 100
  path = _write(
    tmp_path / 'a.npz', images=pixels, labels=_labels(2500),
    x_test=pixels + 1, y_test=_labels(2500),
  )  # fmt: skip
  found = _load(path)
  np.testing.assert_allclose(found.mean_C, [pixels.mean()], rtol=1e-6)
  np.testing.assert_allclose(found.deviation_C, [pixels.std()], rtol=1e-6)


def test_arrays_of_the_same_file_are_held_out(tmp_path):
  found = _both(tmp_path)
  train = _numbers(found, _take(found.train_batches(20, seed=0), 1))
  assert sorted(train) == [(i, i % 3) for i in range(20)]
  held = _numbers(found, found.eval_batches(7))
  assert held == [(100 + i, i % 3) for i in range(7)]


def test_files_by_globs_are_read_in_order_and_once(tmp_path):
  for i, name in enumerate('ba'):
    _write(
      tmp_path / f'{name}.npz', images=_pixels(5, first=10 * i),
      labels=_labels(5), extra=np.zeros(2),
    )  # fmt: skip
  _write(tmp_path / 'c.npz', pictures=_pixels(3, first=90), kinds=_labels(3))
  found = _load(
    f'{tmp_path}/b.npz, {tmp_path}/[ab].npz',
    eval_path=f'{tmp_path}/c.npz',
    eval_images_key='pictures',
    eval_labels_key='kinds',
  )
  train = _numbers(found, _take(found.train_batches(10, seed=0), 1))
  assert sorted(train) == [
    (10 * i + j, j % 3) for i in (0, 1) for j in range(5)
  ]
  held = _numbers(found, found.eval_batches(3))
  assert held == [(90, 0), (91, 1), (92, 2)]
  held = _load(f'{tmp_path}/[ab].npz', eval_path=f'{tmp_path}/a.npz')
  assert [n for n, _ in _numbers(held, held.eval_batches(5))] == [
    *range(10, 15)
  ]
  assert '5 images of 3x4x1 to train on, 5 held out' in held.description


def test_holding_out_goes_by_content(tmp_path):
  pixels, labels = _pixels(60), _labels(60)
  pixels[30:] = pixels[:30]  # doubles stay together
  split = []
  for order in (np.arange(60), np.random.default_rng(0).permutation(60)):
    path = _write(
      tmp_path / 'a.npz', images=pixels[order], labels=labels[order]
    )
    found = _load(path, eval_fraction=0.2)
    held = {n for n, _ in _numbers(found, found.eval_batches(60))}
    size = 60 - 2 * len(held)
    train = _numbers(found, _take(found.train_batches(size, seed=0), 1))
    assert len(held) == 6
    assert {n for n, _ in train} == set(range(30)) - held
    split.append(held)
  assert split[0] == split[1] != set(range(6))


def test_a_copy_of_a_held_out_image_is_not_trained_on(tmp_path):
  pixels, labels = _pixels(20), _labels(20)
  held = pixels[[3, 3, 7]]
  path = _write(
    tmp_path / 'a.npz', x_train=pixels, y_train=labels, x_test=held,
    y_test=_labels(3),
  )  # fmt: skip
  found = _load(path)
  train = _numbers(found, _take(found.train_batches(18, seed=0), 1))
  assert {n for n, _ in train} == set(range(20)) - {3, 7}
  assert [n for n, _ in _numbers(found, found.eval_batches(3))] == [3, 3, 7]
  said = '18 images of 3x4x1 to train on (2 copies of held-out images left out)'
  assert said in found.description
  pixels = np.concatenate([_pixels(5)] * 8)
  _write(tmp_path / 'a.npz', images=pixels, labels=_labels(40))
  found = _load(path)
  assert '32 images of 3x4x1 to train on (7 copies' in found.description
  assert 'left out), 1 held out' in found.description


@pytest.mark.parametrize('what', ['pixel', 'label', 'split', 'held', 'shape'])
def test_sha256_covers(tmp_path, what):
  x, y, x_test, y_test = _pixels(8), _labels(8), _pixels(4), _labels(4)
  args = lambda: dict(x_train=x, y_train=y, x_test=x_test, y_test=y_test)
  first = _load(_write(tmp_path / 'a.npz', **args())).sha256
  again = _load(_write(tmp_path / 'b.npz', **args())).sha256
  assert first == again and re.fullmatch('[0-9a-f]{64}', first)
  if what == 'pixel':
    x[-1, -1, -1] ^= 1
  elif what == 'label':
    y[0] = 1
  elif what == 'split':
    x, x_test = np.concatenate([x, x_test[:1]]), x_test[1:]
    y, y_test = np.append(y, y_test[0]), y_test[1:]
  elif what == 'held':
    y_test[0] = 2
  else:
    x, x_test = x.reshape(8, 4, 3), x_test.reshape(4, 4, 3)
  assert _load(_write(tmp_path / 'c.npz', **args())).sha256 != first


def test_save(tmp_path):
  found = _both(tmp_path)
  found.save(tmp_path)
  said = json.loads((tmp_path / 'images.json').read_text())
  assert (said['classes'], said['size']) == (3, [3, 4, 1])
  assert said['mean'] == found.mean_C.tolist()
  assert said['deviation'] == found.deviation_C.tolist()


# --- training ---------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(st.integers(3, 20), st.data(), st.integers(0, 2**40))
def test_an_epoch_shows_each_image_once(tmp_path_factory, n, data, seed):
  batch_size = data.draw(st.integers(1, n))
  found = _both(tmp_path_factory.mktemp('images'), n)
  iterator = found.train_batches(batch_size, seed)
  pairs = _numbers(found, _take(iterator, -(-2 * n // batch_size)))
  for epoch in range(2):
    seen = pairs[epoch * n : (epoch + 1) * n]
    assert sorted(seen) == [(i, i % 3) for i in range(n)]


def test_orders_depend_on_seed_and_epoch_alone(tmp_path):
  found = _both(tmp_path)
  order = lambda seed: _numbers(found, _take(found.train_batches(4, seed), 10))
  one = order(1)
  assert one == order(1) != order(2)
  assert one[:20] != one[20:]


PINNED = {
  'labels': [0, 2, 1, 1, 1, 1],
  'pixels': [161, 8, 75, 140, 168, 119],
}


def test_order_is_pinned(tmp_path):
  """Fails if grain or numpy change what a seed means: resumed runs would."""
  found = _both(tmp_path, shift=1)
  batch = next(found.train_batches(6, seed=0))
  assert batch['target_BxL'][:, 0].tolist() == PINNED['labels']
  assert _raw(found, batch)[:, 1, 1, 0].tolist() == PINNED['pixels']


def _move(image, y, x):
  """A pixel at a time."""
  moved = np.zeros_like(image)
  for i, j in np.ndindex(*image.shape[:2]):
    if 0 <= i + y < len(image) and 0 <= j + x < image.shape[1]:
      moved[i + y, j + x] = image[i, j]
  return moved


def test_shift_moves_each_image_anew(tmp_path):
  n, epochs, C = 24, 12, 2  # fewer images than moves
  pixels = _pixels(n, Y=4, X=5, C=C, first=1)
  path = _write(
    tmp_path / 'a.npz', images=pixels, labels=np.arange(n),
    x_test=pixels + 1, y_test=np.arange(n),
  )  # fmt: skip
  found = _load(path, shift=2, channels='last')
  steps = range(-2, 3)
  seen = collections.Counter()
  for batch in _take(found.train_batches(n, seed=3), epochs):
    for raw, (label,) in zip(
      _raw(found, batch), batch['target_BxL'], strict=True
    ):
      image = pixels[label].reshape(4, 5, -1)
      moves = [
        (y, x)
        for y in steps
        for x in steps
        if np.array_equal(_move(image, y, x), raw)
      ]
      assert len(moves) == 1
      seen[moves[0]] += 1
  assert len(seen) == 25 and max(seen.values()) < 4 * epochs * n / 25
  (held,) = found.eval_batches(n)  # what is held out does not move
  expected = pixels.reshape(n, 4, 5, -1) + 1
  np.testing.assert_array_equal(_raw(found, held), expected)


# --- evaluation -------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(1, 30), st.integers(1, 8), st.floats(0, 1.5))
@hypothesis.example(held=8, batch_size=2, share=0.5)
@hypothesis.example(held=3, batch_size=8, share=1.0)
def test_eval_share_spreads_full_batches(
  tmp_path_factory, held, batch_size, share
):
  found = _both(tmp_path_factory.mktemp('images'), held=held)
  batches = found.eval_batches(batch_size, share=share)
  first = _numbers(found, batches)
  assert first == _numbers(found, batches)  # it can be read again
  wanted = min(held, exact.nearest(share, held))
  assert len(batches) == max(1, math.ceil(wanted / batch_size))
  assert len(list(batches)) == len(batches)
  place = [number - 100 for number, _ in first]
  assert [label for _, label in first] == [i % 3 for i in place]
  assert len(place) == min(held, len(batches) * batch_size)
  gaps = np.diff([*place, held])
  assert (gaps > 0).all() and gaps.max() - gaps.min() <= 1
  for batch in batches:
    assert batch['image_BxYxXxC'].shape == (batch_size, 3, 4, 1)
    assert {name: value.dtype for name, value in batch.items()} == DTYPES
    assert np.isin(batch['mask_BxL'], [0, 1]).all()
    np.testing.assert_array_equal(batch['segment_BxL'], batch['mask_BxL'] - 1)
    assert (np.diff(batch['mask_BxL'][:, 0]) <= 0).all()  # padding is last


def test_no_more_images_are_evaluated_than_are_asked_for(tmp_path):
  """128 of 360 is a float that is a little more."""
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (720, 2, 2), np.uint8)
  path = _write(tmp_path / 'a.npz', images=images, labels=np.arange(720) % 2)
  found = _load(path, eval_fraction=0.5, eval_images=128)
  assert len(found.eval_batches(64, found.eval_share)) == 2


@pytest.mark.parametrize('eval_images, share', [(0, 1), (2, 2 / 7), (99, 1)])
def test_eval_share(tmp_path, eval_images, share):
  assert _both(tmp_path, eval_images=eval_images).eval_share == share


# --- parts and resume -------------------------------------------------------


@parts.every_split
def test_parts_together_are_the_global_batch(tmp_path, split):
  found = _both(tmp_path, n=100, held=13, shift=1)  # an epoch is 12.5 batches
  for make in (
    lambda row_B: _take(found.train_batches(8, 0, row_B), 15),
    lambda row_B: list(found.eval_batches(8, row_B=row_B)),
    lambda row_B: list(found.eval_batches(8, 0.5, row_B)),
  ):
    parts.check(make, split)


@parts.every_split
def test_resume_is_exact(tmp_path, split):
  found = _both(tmp_path, n=200, shift=1)  # an epoch is 25 batches
  first = found.train_batches(8, 3)
  before = found.train_batches(8, 3, split[1])
  whole, states = [], []
  for _ in range(61):
    states.append(json.loads(json.dumps(before.get_state())))
    assert states[-1] == first.get_state()
    whole.append(next(first)), next(before)
  whole += _take(first, 7)
  for steps in (0, 1, 20, 60):
    again = found.train_batches(8, 3)
    _take(again, 2)  # a used iterator, its buffer full, must jump too
    again.set_state(states[steps])
    after = found.train_batches(8, 3, split[0])  # other rows than before
    after.set_state(states[steps])
    for expected in whole[steps : steps + 8]:
      _same(next(again), expected)
      _same(next(after), {k: v[split[0]] for k, v in expected.items()})


# --- bad input --------------------------------------------------------------


def _refusal(call, *args, **options):
  with pytest.raises(DataError) as error:
    call(*args, **options)
  message = str(error.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize(
  'options, said',
  [
    ({'source': 'png'}, "data.source is 'png'; it can be digits or images"),
    ({'source': 'images'}, 'data.path is empty'),
    ({'path': 'a.npz'}, "data.path is set, but data.source is 'digits'"),
    ({'eval_path': 'a.npz'}, 'data.eval_path is set'),
    ({'eval_fraction': 1.0}, 'data.eval_fraction=1.0 is not'),
    ({'eval_images': -1}, 'data.eval_images=-1 is not'),
    ({'shift': -1}, 'data.shift=-1 is not'),
    ({'channels': 'last'}, "data.channels is set, but data.source is 'digits'"),
    (
      {'source': 'images', 'path': 'a.npz', 'channels': 'c'},
      "data.channels='c'; there are",
    ),
  ],
)
def test_refuses_a_config(options, said):
  assert said in _refusal(ImagesConfig, **options)


X, Y = _pixels(6), _labels(6)


@pytest.mark.parametrize(
  'arrays, said',
  [
    ({'x': X, 'labels': Y}, "no array images or x_train; it holds 'x',"),
    ({'images': X}, "no array labels or y_train; it holds 'images'"),
    ({}, 'it holds nothing'),
    ({'images': X[0], 'labels': Y}, 'images have shape 3x4; they need'),
    ({'images': X[..., None, None], 'labels': Y}, 'shape 6x3x4x1x1'),
    ({'images': X[:0], 'labels': Y[:0]}, 'images have shape 0x3x4'),
    ({'images': _pixels(6, C=3), 'labels': Y}, '6x3x4x3, which does not tell'),
    (
      {'images': _pixels(6, 8, 9, C=7), 'labels': Y},
      "does not tell where the channels are; data.channels can be 'last' or",
    ),
    ({'images': X.astype(np.int64), 'labels': Y}, 'images are int64'),
    ({'images': X, 'labels': Y.astype(float)}, 'labels are float64 of shape 6'),
    ({'images': X, 'labels': Y[:, None]}, 'labels are uint8 of shape 6x1'),
    ({'images': X, 'labels': Y[:5]}, 'there are 6 images but 5 labels'),
    ({'images': X, 'labels': Y - np.int64(1)}, 'labels run from -1 to 1'),
    ({'images': X, 'labels': Y + np.int64(2**40)}, 'labels run from 109951162'),
    ({'images': X, 'labels': Y + 1}, '0..3, 0 has no training image'),
    ({'images': X, 'labels': Y * 2}, '0..4, 1 has no training image'),
    ({'images': X * np.nan, 'labels': Y}, 'NaN, infinite or beyond float32'),
    ({'images': X * 1e300, 'labels': Y}, 'NaN, infinite or beyond float32'),
    ({'images': X.astype(object), 'labels': Y}, "cannot read 'images'"),
    ({'images': X[:1], 'labels': Y[:1]}, 'no image is left to train on'),
    (
      {'images': X, 'labels': Y, 'x_test': X[:, :2], 'y_test': Y},
      'are 3x4x1 uint8, those of the held-out are 2x4x1 uint8',
    ),
    (
      {'images': X, 'labels': Y, 'x_test': X / 255, 'y_test': Y},
      'are 3x4x1 uint8, those of the held-out are 3x4x1 float32',
    ),
    (
      {'images': X, 'labels': Y, 'x_test': X - 1, 'y_test': Y + 1},
      'class 3 is held out but has no training image; those have classes 0..2',
    ),
    ({'images': X, 'labels': Y, 'x_test': X}, 'no array y_test'),
    (
      {'images': X, 'labels': Y, 'x_test': X, 'y_test': Y},
      'no image is left to train on: all are held out, too',
    ),
  ],
)  # fmt: skip
def test_refuses_arrays(tmp_path, arrays, said):
  path = _write(tmp_path / 'a.npz', **arrays)
  assert said in _refusal(_load, path)


@pytest.mark.parametrize(
  'harm', ['text', 'empty', 'cut', 'npy', 'joined', 'behind', 'twice']
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_refuses_broken_files(tmp_path, harm):
  path = _write(tmp_path / 'a.npz', images=X, labels=Y)
  raw = path.read_bytes()
  said = f'cannot read {path}: '
  if harm == 'text':
    path.write_text('no zip\nat all')
  elif harm == 'empty':
    path.write_bytes(b'')
  elif harm == 'cut':
    path.write_bytes(raw[: len(raw) // 2])
  elif harm == 'joined':
    path.write_bytes(raw * 2)
    said += f'{len(raw)} bytes stand before'
  elif harm == 'behind':
    path.write_bytes(raw + b'\0' * 512)
    said += 'bytes stand behind its archive'
  elif harm == 'twice':
    with zipfile.ZipFile(path, 'a') as file:
      file.writestr('images.npy', file.read('images.npy'))
    said += 'it holds arrays of the same name'
  else:
    with open(path, 'wb') as f:
      np.save(f, X)
    said = f'{path} is one array'
  assert said in _refusal(_load, path)


def test_a_wrong_byte_is_refused_or_harmless(tmp_path):
  path = _write(tmp_path / 'a.npz', images=X, labels=Y)
  raw, sha256, refused = path.read_bytes(), _load(path).sha256, 0
  for place in range(len(raw)):
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
    try:
      assert _load(path).sha256 == sha256
    except DataError as error:
      assert str(path) in str(error) and '\n' not in str(error)
      refused += 1
  assert refused > len(raw) / 2


def test_refuses_files_that_do_not_fit_together(tmp_path):
  a = _write(tmp_path / 'a.npz', images=X, labels=Y)
  b = _write(tmp_path / 'b.npz', images=X[:, :2], labels=Y)
  glob = tmp_path / '*.npz'
  assert f'of {a} are 3x4x1 uint8, those of {b} are' in _refusal(_load, glob)
  assert 'holds out every file' in _refusal(_load, a, eval_path=str(a))
  missing = tmp_path / 'c.npz'
  assert f'data.path {missing} matches no file' in _refusal(_load, missing)
  said = f'data.eval_path {missing} matches no file'
  assert said in _refusal(_load, a, eval_path=str(missing))


def test_refuses_batches_that_cannot_be(tmp_path):
  found = _both(tmp_path)
  found.train_batches(20, 0)
  said = _refusal(found.train_batches, 21, 0)
  assert 'it takes 21, there are 20' in said
  row_B, said = np.array([1, 4]), 'row_B is [1, 4]; '
  assert said in _refusal(found.train_batches, 4, 0, row_B)
  assert said in _refusal(found.eval_batches, 4, row_B=row_B)
  _both(tmp_path, shift=2)
  said = _refusal(_both, tmp_path, shift=3)
  assert 'data.shift is 3; the images have 3 pixels' in said
