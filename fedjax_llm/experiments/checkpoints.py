"""Checkpoints of a run: asynchronous, atomic, the last few kept (Orbax)."""

import logging
import pathlib
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

# Orbax tells of every step it takes; a run has its own progress bar.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
  """The checkpoints in one folder; a context manager that waits for writes."""

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    """Opens or makes `folder`, dropping what a killed process left half done.

    Args:
      folder: where the checkpoints are.
      keep: how many of the latest to keep.
    """
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=options,
      # Named, for else a new manager cannot tell what was saved.
      item_handlers=ocp.StandardCheckpointHandler(),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def save(self, round_number: int, state: Any) -> None:
    """Saves `state`, a tree of arrays, in the background."""
    self._manager.save(round_number, args=ocp.args.StandardSave(state))

  def restore(self, like: Any) -> tuple[int, Any]:
    """The latest round saved and its state; (0, `like`) if there is none.

    Args:
      like: a state of the same structure, shapes and dtypes.

    Raises:
      ValueError: if what was saved has another structure, shape or dtype.
    """
    latest = self._manager.latest_step()
    if latest is None:
      return 0, like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    saved = self._manager.item_metadata(latest)
    # Orbax would cast another dtype without a word.
    if _shapes(saved) != _shapes(abstract):
      raise ValueError(
        f"the checkpoint of round {latest} in {self._manager.directory} does"
        " not fit this experiment. Use another folder."
      )
    return latest, self._manager.restore(
      latest, args=ocp.args.StandardRestore(abstract)
    )


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype by path: Orbax knows a NamedTuple as a dictionary."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      tuple(leaf.shape),
      np.dtype(leaf.dtype),
    )
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
