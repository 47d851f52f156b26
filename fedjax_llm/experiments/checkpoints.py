"""Checkpoints of a run, written by Orbax, atomically and in the background."""

import logging
import pathlib
from typing import Any, Self

import jax
import numpy as np


class Checkpoints:
  """The checkpoints in one folder; a context manager that waits for writes."""

  def __init__(self, folder: pathlib.Path):
    """Opens or makes `folder`, and deletes unfinished checkpoints in it.

    The folder keeps the last two checkpoints.
    """
    import orbax.checkpoint as ocp

    # Orbax logs every step; a run has its own progress bar.
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2,
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=options,
      # Without it a new manager does not know what was saved.
      item_handlers=ocp.StandardCheckpointHandler(),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def save(self, round_number: int, state: Any) -> None:
    """Saves `state`, a tree of arrays, in the background."""
    import orbax.checkpoint as ocp

    self._manager.save(round_number, args=ocp.args.StandardSave(state))

  def restore(self, like: Any) -> tuple[int, Any]:
    """Returns the last round that was saved, and its state.

    Args:
      like: a state of the same structure, shapes and dtypes. It is returned as
        the state of round 0 if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint has another structure, shape or dtype.
    """
    import orbax.checkpoint as ocp

    latest = self._manager.latest_step()
    if latest is None:
      return 0, like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    saved = self._manager.item_metadata(latest)
    # Orbax would cast to another dtype silently.
    if _shapes(saved) != _shapes(abstract):
      raise ValueError(
        f"the checkpoint of round {latest} in {self._manager.directory} has"
        " other arrays than this experiment. Use another folder."
      )
    return latest, self._manager.restore(
      latest, args=ocp.args.StandardRestore(abstract)
    )


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Returns shapes and dtypes by path, the same for NamedTuple and dictionary.

  Orbax restores the metadata of a NamedTuple as a dictionary.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      tuple(leaf.shape),
      np.dtype(leaf.dtype),
    )
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
