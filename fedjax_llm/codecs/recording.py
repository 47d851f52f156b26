"""A store of recorded updates: what a codec is fitted on.

A folder with `snapshots.bin`, the vectors one after the other as little-endian
float32, `index.jsonl`, a line for each that says of which round and client it
is, and `store.json`, what they are of. The vectors are written before their
lines, and only those with a line count: a killed process leaves whole ones.
"""

import hashlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from fedjax_llm.federated import parameters

_FLOAT = np.dtype("<f4")


def layout(trainable: Any) -> str:
  """A hash of the names and shapes of the leaves of a tree."""
  leaves = zip(
    parameters.paths(trainable), jax.tree.leaves(trainable), strict=True
  )
  described = [f"{path} {tuple(leaf.shape)}" for path, leaf in leaves]
  return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


class Store:
  """Snapshots in a folder.

  >>> import tempfile
  >>> import numpy as np
  >>> folder = tempfile.mkdtemp()
  >>> store = Store.create(folder, {"a": np.zeros((2, 2))})
  >>> store.append(0, clients=[3, 8], weights=[1, 2], vectors=np.ones((2, 4)))
  >>> store.append(1, clients=[3], weights=[1], vectors=np.zeros((1, 4)))
  >>> print(store.snapshots.shape, store.rounds, store.clients, store.weights)
  (3, 4) [0 0 1] [3 8 3] [1. 2. 1.]

  Attributes:
    folder: where it is.
    about: `layout`, the hash of the tree; `size`, of its vectors; and what else
      they are, such as their `representation`.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a store.

    Raises:
      ValueError: if there is none.
    """
    self.folder = pathlib.Path(folder)
    path = self.folder / "store.json"
    if not path.is_file():
      raise ValueError(
        f"expected recorded updates in {self.folder}, found no store.json."
        " `fedjax-llm run tgap` records some."
      )
    self.about: dict[str, Any] = json.loads(path.read_text())
    self._index = self.folder / "index.jsonl"
    self._vectors = self.folder / "snapshots.bin"
    self._lines = self._read()

  @classmethod
  def create(
    cls, folder: str | os.PathLike, trainable: Any, **about: str
  ) -> "Store":
    """Makes a store of updates of a tree, or opens it to go on.

    Args:
      folder: where; made if absent.
      trainable: tree of arrays, or their shapes.
      **about: what else is said of the vectors.

    Raises:
      ValueError: if the store there is of something else.
    """
    folder = pathlib.Path(folder)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))
    expected = {"layout": layout(trainable), "size": size, **about}
    if not (folder / "store.json").exists():
      folder.mkdir(parents=True, exist_ok=True)
      _replace(folder / "store.json", json.dumps(expected, indent=2) + "\n")
    store = cls(folder)
    if store.about != expected:
      raise ValueError(
        f"the updates in {folder} are of {store.about}, expected {expected}."
        " Record into another folder."
      )
    return store

  def append(
    self, round_number: int, *, clients: Any, weights: Any, vectors: Any
  ) -> None:
    """Adds the snapshots of a round.

    What there is of this round and later ones is dropped: a killed run computes
    the rounds after its last checkpoint again.

    Args:
      round_number: of the round, from 0.
      clients: their numbers.
      weights: of them in a mean.
      vectors: [clients, n].

    Raises:
      ValueError: if shapes do not fit, or a vector is not finite.
    """
    vectors = np.asarray(vectors, _FLOAT)
    if vectors.shape != (len(clients), self.about["size"]):
      raise ValueError(
        f"append expected vectors [{len(clients)}, {self.about['size']}], got"
        f" {vectors.shape}."
      )
    if not np.isfinite(vectors).all():
      raise ValueError(f"a vector of round {round_number} is not finite.")
    kept = [x for x in self._lines if x["round"] < round_number]
    if len(kept) < len(self._lines):
      _replace(self._index, "".join(json.dumps(x) + "\n" for x in kept))
    mode = "r+b" if self._vectors.exists() else "w+b"
    with self._vectors.open(mode) as file:
      file.seek(len(kept) * self.about["size"] * _FLOAT.itemsize)
      file.write(vectors.tobytes())
      file.truncate()
      file.flush()
      os.fsync(file.fileno())
    new = [
      {"round": int(round_number), "client": int(x), "weight": float(y)}
      for x, y in zip(clients, weights, strict=True)
    ]
    with self._index.open("a") as file:
      file.write("".join(json.dumps(x) + "\n" for x in new))
    self._lines = kept + new

  def __len__(self) -> int:
    """How many snapshots there are."""
    return len(self._lines)

  @property
  def snapshots(self) -> np.ndarray:
    """The vectors, [count, n], mapped into memory as they are read.

    Raises:
      ValueError: if there is none.
    """
    if not self._lines:
      raise ValueError(f"no update is recorded yet in {self.folder}.")
    shape = len(self._lines), self.about["size"]
    return np.memmap(self._vectors, _FLOAT, mode="r", shape=shape)

  @property
  def rounds(self) -> np.ndarray:
    """Int [count], which round each snapshot is of."""
    return np.array([x["round"] for x in self._lines], np.int64)

  @property
  def clients(self) -> np.ndarray:
    """Int [count], which client each snapshot is of."""
    return np.array([x["client"] for x in self._lines], np.int64)

  @property
  def weights(self) -> np.ndarray:
    """Float [count], the weight of each snapshot's client in the mean."""
    return np.array([x["weight"] for x in self._lines])

  def _read(self):
    """Whole lines of whole snapshots."""
    if not self._index.exists():
      return []
    lines = self._index.read_text().splitlines(keepends=True)
    whole = [json.loads(x) for x in lines if x.endswith("\n")]
    count = self._vectors.stat().st_size // (
      self.about["size"] * _FLOAT.itemsize
    )
    if len(whole) < len(lines) or count < len(whole):
      # So that what is appended begins a line.
      whole = whole[:count]
      _replace(self._index, "".join(json.dumps(x) + "\n" for x in whole))
    return whole


def _replace(path: pathlib.Path, text: str) -> None:
  """Replaces a file; a killed process leaves the old one or the new."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)
