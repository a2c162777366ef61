"""Checkpoints by orbax: the train state, and where the data iterator stands.

A checkpoint that storage has changed is found out. Beside each array stands a
sum over the bits of its values, which devices that hold it compute whatever
their mesh; and beside the files stand digests of the small ones, which describe
the arrays.
"""

import contextlib
import hashlib
import itertools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax.training import distributed, preemption

ASIDE = 'published'  # there: small files beside published weights
DAMAGED = 'damaged'  # where damaged checkpoints go, in the work directory
DIGESTS = 'digests.json'  # in a checkpoint
# What is written after them: at what time the checkpoint was begun and ended.
_LATER = (DIGESTS, '_CHECKPOINT_METADATA')
SMALL = 2**24  # bytes; larger files hold values, which have their sums


class Restored(NamedTuple):
  """What the newest whole checkpoint holds, and those that were passed over."""

  step: int
  state: Any
  data: dict[str, Any]
  damaged: dict[int, str]  # step -> what is wrong with it


class Checkpoints:
  """Saves and restores (state, data) under workdir/checkpoints.

  Leaves are stored by name and do not know the mesh. A context: whatever ends
  it, what it began to save is saved first, for a notebook's user who interrupts
  a run may start it again in the same process.

  Args:
    keep: so many of the newest are kept.
    every: those of steps that it divides are kept for ever; 0: none.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, every: int = 0):
    self._workdir = workdir.absolute()
    self._folder = self._workdir / 'checkpoints'
    kept = [policies.LatestN(n=keep)]
    if every:
      kept.append(policies.EveryNSteps(interval_steps=every))
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # Called by one process when all is written but not yet committed.
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_digests
        ),
        create=True,
        cleanup_tmp_directories=True,  # of a save that a kill interrupted
      ),
    )

  def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
    """Starts to save; training goes on meanwhile.

    Raises OSError if it, or the one before, cannot be saved.
    """
    text = json.dumps({'data': data, 'sums': _sums(state)})
    sealed = {'text': text, 'sha256': _sha256(text)}
    with self._failing(), preemption.later():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(sealed)
        ),
      )

  def restore(self, like: Any, before: int | None = None) -> Restored | None:
    """The newest whole checkpoint, or None if there is none at all.

    Args:
      like: the state has the shapes, types and shardings of this one.
      before: only checkpoints of earlier steps.

    Raises:
      OSError: there are checkpoints, and none is whole; nothing was changed.
    """
    self.wait()
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      if before is not None and step >= before:
        continue
      found = _read(self._folder / str(step), like, part=False)
      if not isinstance(found, str):
        return Restored(step, *found, damaged)
      damaged[step] = found
    if not damaged:
      return None
    told = '; '.join(f'step {step}: {what}' for step, what in damaged.items())
    raise OSError(f'{self._folder} has no whole checkpoint: {told}')

  def set_aside(self, damaged: dict[int, str]) -> None:
    """Moves damaged checkpoints away, for their steps come again."""
    if not damaged:
      return
    if jax.process_index() == 0:
      for step in damaged:
        names = (f'{step}.{i}' for i in itertools.count())
        places = (self._workdir / DAMAGED / name for name in names)
        place = next(p for p in places if not p.exists())
        place.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(place)
    distributed.gather('')
    self._manager.reload()

  def forget(self, after: int) -> None:
    """Deletes the checkpoints of later steps."""
    for step in self._manager.all_steps():
      if step > after:
        self._manager.delete(step)

  def wait(self) -> None:
    """Until all is saved; OSError if it cannot be."""
    with self._failing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all is saved."""
    with preemption.later():
      self.wait()
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      self.close()
    except OSError:
      if kind is None:  # else what came first is told
        raise

  def _write_digests(self):
    for folder in self._folder.glob('*.orbax-checkpoint-tmp*'):
      text = json.dumps(_digests(folder))
      (folder / DIGESTS).write_text(text, encoding='utf-8')

  @contextlib.contextmanager
  def _failing(self):
    """Whatever goes wrong when saving becomes an OSError of one line."""
    try:
      yield
    except Exception as error:
      told = ' '.join(str(error).split())[:200]
      whole = sorted(
        int(p.name) for p in self._folder.glob('[0-9]*') if p.name.isdigit()
      )
      raise OSError(
        f'{self._folder}: cannot save: {told}; checkpoints of steps'
        f' {whole} are there'
      ) from error


def steps(workdir: pathlib.Path) -> list[int]:
  """Of the checkpoints in a work directory, in order."""
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit())


def shapes(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """{name: what has .shape and .dtype} of the leaves of a state.

  Raises:
    OSError: they cannot be read; one line.
  """
  folder = _folder(workdir, step) / 'state'
  try:
    tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
  except Exception as error:
    told = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise OSError(f'{folder} cannot be read: {told}') from error
  return {name(path): a for path, a in jax.tree.leaves_with_path(tree)}


def read(workdir: pathlib.Path, step: int, like: Any) -> Any:
  """The leaves of a state that `like` has, as it has them, and no others.

  The work directory is not changed, and a run that saves there not disturbed.

  Raises:
    OSError: the checkpoint is gone or damaged; one line.
  """
  folder = _folder(workdir, step)
  if not folder.exists():  # the run has deleted it in the meantime
    raise OSError(f'{folder} is gone')
  found = _read(folder, like, part=True)
  if isinstance(found, str):
    raise OSError(
      f'{folder.parent} has no whole checkpoint: step {step}: {found}'
    )
  return found[0]


def _folder(workdir, step):
  return workdir.absolute() / 'checkpoints' / str(step)


def _read(folder, like, part):
  """(state, data), or a line that says what is wrong with them.

  Args:
    part: the state may have more leaves than `like`.
  """
  saved, kept, wrong = {}, {}, ''
  try:
    if jax.process_index() == 0:
      _check_digests(folder)
    like = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      saved = reader.restore(
        folder,
        args=ocp.args.Composite(
          state=_some_of(like) if part else ocp.args.StandardRestore(like),
          data=ocp.args.JsonRestore(),
        ),
      )
    sealed = saved['data']
    if _sha256(sealed['text']) != sealed['sha256']:
      raise ValueError('the data beside the state differ from their checksum')
    kept = json.loads(sealed['text'])
  except Exception as error:  # pylint: disable=broad-exception-caught
    wrong = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
  wrong = next(filter(None, distributed.gather(wrong)), '')
  if wrong:
    return wrong
  for name, found in _sums(saved['state']).items():
    if found != kept['sums'].get(name):
      return f'{name} differs from its checksum'
  return saved['state'], kept['data']


def _check_digests(folder):
  found = _digests(folder)
  for name, digest in json.loads((folder / DIGESTS).read_text()).items():
    if found.get(name) != digest:
      what = 'differs from its checksum' if name in found else 'is missing'
      raise ValueError(f'{name} {what}')


def _some_of(shapes):
  """What restores these leaves of a state and no others."""
  return ocp.args.PyTreeRestore(
    shapes,
    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
    partial_restore=True,
  )


def _digests(folder):
  """{path: digest} of the small files in it."""
  files = (p for p in folder.rglob('*') if p.is_file() and p.name not in _LATER)
  return {
    p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in files
    if p.stat().st_size <= SMALL
  }


def _sums(state):
  """{name: a sum that changes with any one bit of the array}.

  Bits count modulo 2^32, each word times an odd number of its place: integers,
  so that no mesh and no order of adding makes another sum.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  whole = jax.NamedSharding(leaves[0][1].sharding.mesh, jax.P())
  arrays = [a for _, a in leaves]
  found = jax.jit(_add_up, out_shardings=whole)(arrays)
  names = (name(path) for path, _ in leaves)
  return dict(zip(names, jax.device_get(found).tolist(), strict=True))


def name(path: Any) -> str:
  """'params.embed_VxD': of a leaf of a state, by its path."""
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _add_up(arrays):
  return jnp.stack([_sum(a) for a in arrays])


def _sum(a):
  words = jax.lax.bitcast_convert_type(a, _WORDS[a.dtype.itemsize])
  words = words.astype(jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  for axis in range(words.ndim):
    stride = math.prod(words.shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place + along * jnp.uint32(stride)
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


# Words of an array's elements; of float64 two each.
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _sha256(text):
  return hashlib.sha256(text.encode()).hexdigest()
