"""Checkpoints by orbax: the train state, and where the data iterator stands."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """Saves and restores (state, data) under workdir/checkpoints.

  Leaves are stored by name and do not know the mesh.
  """

  def __init__(self, workdir: pathlib.Path, keep: int):
    self._manager = ocp.CheckpointManager(
      (workdir / 'checkpoints').absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest(self) -> int | None:
    """The newest step that was saved whole, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
    """Starts to save; training goes on meanwhile."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
      ),
    )

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """The state, in the shapes, types and shardings of `like`, and the data."""
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    saved = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        data=ocp.args.JsonRestore(),
      ),
    )
    return saved['state'], saved['data']

  def close(self) -> None:
    """Waits until all is saved."""
    self._manager.wait_until_finished()
    self._manager.close()
