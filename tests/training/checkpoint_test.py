"""Checkpoints that storage has changed, and that another mesh reads."""

import functools
import gc
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import parallel
from moe_jax.training import checkpoint

# When a read fails, orbax forgets others that it has begun.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def _forgotten_here():
  gc.freeze()  # what is older need not be searched
  yield
  gc.collect()
  gc.unfreeze()


MESHES = ((1, 1, 1, 1), (8, 1, 1, 1), (1, 2, 4, 1), (2, 2, 1, 2))


def mesh(sizes=MESHES[0]):
  return parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))


@functools.cache
def state(seed, sizes=MESHES[0]):
  """Every dtype that a train state has, cut over the mesh where it can be."""
  draw = np.random.default_rng(seed)
  pools = draw.normal(size=(2, 8, 16, 8)).astype(np.float32)
  tree = {
    'trunk': {'body': {'pools': {'up_ExDxF': pools}}},
    'moment': draw.normal(size=(16, 8)).astype(jnp.bfloat16),
    'count_E': draw.integers(0, 9, 8).astype(np.int32),
    'step': np.int32(seed),
  }
  return jax.device_put(tree, parallel.shardings(tree, mesh(sizes)))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))


@pytest.fixture
def interruptible():
  """A process in the background of a shell has SIGINT ignored."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures('interruptible')
def test_a_signal_waits_until_it_is_saved(tmp_path, monkeypatch):
  """Else threads would go on in a folder that is being deleted."""
  with (
    pytest.raises(KeyboardInterrupt),
    checkpoint.Checkpoints(tmp_path, keep=1) as saved,
  ):
    for name in ('save', 'close'):
      act = getattr(saved._manager, name)
      monkeypatch.setattr(saved._manager, name, functools.partial(_struck, act))
    saved.save(1, state(1), {})
  assert checkpoint.steps(tmp_path) == [1]
  same(checkpoint.read(tmp_path, 1, state(2)), state(1))


def _struck(act, *args, **options):
  signal.raise_signal(signal.SIGINT)
  return act(*args, **options)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of the steps 1, 2 and 3."""
  workdir = tmp_path_factory.mktemp('saved')
  checkpoints = checkpoint.Checkpoints(workdir, keep=3)
  for step in (1, 2, 3):
    checkpoints.save(step, state(step), {'place': step * 10})
  checkpoints.close()
  return workdir


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run'


def files(workdir, step):
  """Those of a checkpoint, the largest first."""
  folder = workdir / 'checkpoints' / str(step)
  found = [p for p in sorted(folder.rglob('*')) if p.is_file()]
  return sorted(found, key=lambda p: -p.stat().st_size)


def flip(path, place, mask=1):
  content = bytearray(path.read_bytes())
  content[place % len(content)] ^= mask
  path.write_bytes(content)


def restored(workdir):
  checkpoints = checkpoint.Checkpoints(workdir, keep=3)
  found = checkpoints.restore(state(0))
  if found is not None:
    checkpoints.set_aside(found.damaged)
  checkpoints.close()
  return found


def test_the_newest_is_restored(copy):
  found = restored(copy)
  assert (found.step, found.data, found.damaged) == (3, {'place': 30}, {})
  same(found.state, state(3))


def test_none_is_no_damage(tmp_path):
  assert restored(tmp_path) is None


def test_some_are_kept_for_ever(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, every=2)
  for step in range(1, 8):
    checkpoints.save(step, state(step), {})
  checkpoints.close()
  names = sorted(p.name for p in (tmp_path / 'checkpoints').glob('[0-9]*'))
  assert names == ['2', '4', '6', '7']


@pytest.mark.parametrize('writer', MESHES)
def test_checkpoints_do_not_know_the_mesh(tmp_path, writer):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(5, state(5, writer), {})
  for reader in MESHES:
    found = checkpoints.restore(state(0, reader))
    same(found.state, state(5))
    assert found.state['moment'].sharding.mesh == mesh(reader)
  checkpoints.close()


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _data(workdir):
  (path,) = (workdir / 'checkpoints' / '3' / 'data').glob('metadata')
  return path


def _other_number(workdir):
  """The JSON stays JSON: only its checksum knows."""
  path = _data(workdir)
  assert '30' in path.read_text()
  path.write_text(path.read_text().replace('30', '31'))


DAMAGE = {
  'the largest file cut': lambda w: _truncate(files(w, 3)[0]),
  'the largest file empty': lambda w: files(w, 3)[0].write_bytes(b''),
  'the largest file gone': lambda w: files(w, 3)[0].unlink(),
  'a bit of the largest': lambda w: flip(files(w, 3)[0], 777),
  'its first bit': lambda w: flip(files(w, 3)[0], 0),
  'the largest as zeros': lambda w: files(w, 3)[0].write_bytes(
    bytes(files(w, 3)[0].stat().st_size)
  ),
  'the data cut': lambda w: _truncate(_data(w)),
  'another number in the data': _other_number,
  'no data': lambda w: shutil.rmtree(w / 'checkpoints/3/data'),
  'no state': lambda w: shutil.rmtree(w / 'checkpoints/3/state'),
  'nothing in it': lambda w: [p.unlink() for p in files(w, 3)],
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_told_and_the_one_before_is_used(copy, damage):
  DAMAGE[damage](copy)
  found = restored(copy)
  assert (found.step, found.data) == (2, {'place': 20})
  assert list(found.damaged) == [3] and found.damaged[3]
  assert '\n' not in found.damaged[3]
  same(found.state, state(2))
  assert (copy / 'damaged/3.0').is_dir()


def test_a_damaged_step_can_come_again(copy):
  _truncate(files(copy, 3)[0])
  restored(copy)
  assert (copy / 'damaged/3.0').is_dir()  # what is left of it stays
  checkpoints = checkpoint.Checkpoints(copy, keep=3)
  checkpoints.save(3, state(3), {'place': 33})
  assert checkpoints.restore(state(0)).data == {'place': 33}
  checkpoints.close()


def test_a_changed_value_is_named(saved, monkeypatch):
  """What a file system cannot know: the values are whole, but others."""
  monkeypatch.setattr(checkpoint, '_sums', lambda state: {'moment': 1})
  found = checkpoint.Checkpoints(saved, keep=3)
  with pytest.raises(OSError, match='step 3: moment differs from its checksum'):
    found.restore(state(0))


# With the digests of small files, and as if none were small.
@pytest.mark.parametrize('small', [checkpoint.SMALL, -1])
def test_no_flipped_bit_changes_a_value(saved, tmp_path, monkeypatch, small):
  """Wherever it is: it is found out, or nothing that is read has changed."""
  monkeypatch.setattr(checkpoint, 'SMALL', small)
  if small < 0:
    monkeypatch.setattr(checkpoint, '_check_digests', lambda *_: None)
  draw = np.random.default_rng(0)
  names = [p.relative_to(saved) for p in files(saved, 3)]
  found_out = 0
  for i, name in enumerate(names * 2):
    run = tmp_path / str(i)
    shutil.copytree(saved, run)
    path = run / name
    if path.name in ('_CHECKPOINT_METADATA', 'commit_success.txt'):
      continue
    flip(path, int(draw.integers(path.stat().st_size)), 1 << draw.integers(8))
    found = restored(run)
    same(found.state, state(found.step))
    assert found.data == {'place': 10 * found.step}
    found_out += found.step == 2
    assert small < 0 or found.step == 2, name
    shutil.rmtree(run)
  assert found_out > 5


def test_if_none_is_whole_nothing_changes(copy):
  for step in (1, 2, 3):
    _truncate(files(copy, step)[0])
  before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
  checkpoints = checkpoint.Checkpoints(copy, keep=3)
  with pytest.raises(
    OSError, match=r'no whole checkpoint: step 3: .*; step 1: '
  ):
    checkpoints.restore(state(0))
  checkpoints.close()
  after = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
  assert after == before


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'float64'])
def test_any_one_bit_changes_the_sum(dtype):
  with jax.enable_x64(dtype == 'float64'):
    a = np.arange(1, 25, dtype=jnp.dtype(dtype)).reshape(2, 3, 4)
    others = []
    for byte in range(a.nbytes):
      for bit in range(8):
        raw = bytearray(a.tobytes())
        raw[byte] ^= 1 << bit
        others.append(np.frombuffer(bytes(raw), a.dtype).reshape(a.shape))
    swapped = a.copy()
    swapped[0, 0, 0], swapped[1, 2, 3] = a[1, 2, 3], a[0, 0, 0]
    sums = jax.jit(jax.vmap(checkpoint._sum))(np.stack([*others, swapped, a]))
    *others, whole = np.asarray(sums).tolist()
    assert len(others) == 8 * a.nbytes + 1 and whole not in others


def test_an_interrupted_save_leaves_nothing(copy):
  torn = copy / 'checkpoints' / '4.orbax-checkpoint-tmp'
  shutil.copytree(copy / 'checkpoints' / '3', torn)
  assert restored(copy).step == 3
  # orbax clears it away in a thread, which only a save waits for.
  left = lambda: list(pathlib.Path(copy / 'checkpoints').glob('4*'))
  for _ in range(300):
    if not left():
      break
    time.sleep(0.1)
  assert not left()
