"""A store of recorded updates, which a codec is fitted to.

A store is a folder with three files. `snapshots.bin` has the vectors one after
the other, as little-endian float32. `index.jsonl` has a line for each vector:
its round, client and weight. `store.json` describes the vectors. A vector is
written before its line, and only vectors with a line count, so a killed process
leaves no half-written snapshot.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from fedjax_llm.federated import parameters

_FLOAT = np.dtype("<f4")


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
    folder: the folder.
    about: `signature`, the hash of the tree that vectors are raveled from;
      `size`, the number of entries of a vector; and further facts, such as the
      `representation`.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a store.

    Raises:
      ValueError: if there is no store.
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
    """Makes a store for updates of a tree, or opens an existing one.

    Args:
      folder: folder of the store; made if absent.
      trainable: tree of arrays, or their shapes.
      **about: further facts about the vectors.

    Raises:
      ValueError: if the folder has a store with another tree or other facts.
    """
    folder = pathlib.Path(folder)
    expected = {
      "signature": parameters.signature(trainable),
      "size": sum(x.size for x in jax.tree.leaves(trainable)),
      **about,
    }
    if not (folder / "store.json").exists():
      folder.mkdir(parents=True, exist_ok=True)
      _replace(folder / "store.json", json.dumps(expected, indent=2) + "\n")
    store = cls(folder)
    if store.about != expected:
      raise ValueError(
        f"the store in {folder} has {store.about}, expected {expected}."
        " Record into another folder."
      )
    return store

  def append(
    self, round_number: int, *, clients: Any, weights: Any, vectors: Any
  ) -> None:
    """Adds the snapshots of a round.

    Snapshots of this round and of later ones are replaced, because a killed run
    computes the rounds after its last checkpoint again.

    Args:
      round_number: number of the round, from 0.
      clients: numbers of the clients.
      weights: weights of the clients in the mean.
      vectors: their updates [clients, n].

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
      raise ValueError(
        "append expected finite vectors, but a vector of round"
        f" {round_number} is not finite."
      )
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
    """The number of snapshots."""
    return len(self._lines)

  @property
  def snapshots(self) -> np.ndarray:
    """The vectors, float32 [count, n], memory-mapped.

    Raises:
      ValueError: if no update is recorded yet.
    """
    if not self._lines:
      raise ValueError(f"no update is recorded yet in {self.folder}.")
    shape = len(self._lines), self.about["size"]
    return np.memmap(self._vectors, _FLOAT, mode="r", shape=shape)

  @property
  def rounds(self) -> np.ndarray:
    """The round of each snapshot, int [count]."""
    return np.array([x["round"] for x in self._lines], np.int64)

  @property
  def clients(self) -> np.ndarray:
    """The client of each snapshot, int [count]."""
    return np.array([x["client"] for x in self._lines], np.int64)

  @property
  def weights(self) -> np.ndarray:
    """The weight of each snapshot's client in the mean, float [count]."""
    return np.array([x["weight"] for x in self._lines])

  def _read(self):
    """Returns the complete lines whose snapshots are complete too."""
    if not self._index.exists():
      return []
    lines = self._index.read_text().splitlines(keepends=True)
    whole = [json.loads(x) for x in lines if x.endswith("\n")]
    count = self._vectors.stat().st_size // (
      self.about["size"] * _FLOAT.itemsize
    )
    if len(whole) < len(lines) or count < len(whole):
      # Rewritten, so that the next line is not appended to half a line.
      whole = whole[:count]
      _replace(self._index, "".join(json.dumps(x) + "\n" for x in whole))
    return whole


def _replace(path: pathlib.Path, text: str) -> None:
  """Replaces a file; a killed process leaves the old file or the new one."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)
