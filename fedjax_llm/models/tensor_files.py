"""Reads parts of parameters from safetensors files, and writes shards."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fedjax_llm.models import layout

_SHARD_BYTES = 5_000_000_000  # The largest size of a shard.
# The number of rows to read at once: few enough that they stay in the
# processor's cache while they are transposed.
_ROWS = 32


def open_tensors(
  folder: pathlib.Path, names: layout.Layout, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Opens the weights of a folder without reading them.

  Args:
    folder: a folder with `model.safetensors`, or with shards and their index.
    names: the layout of the family, which maps older names to current ones.
    stack: the exit stack that closes the files.

  Returns:
    The tensors as lazy safetensors slices, by their current names.

  Raises:
    ValueError: if a file is missing or not in the safetensors format.
  """
  files = ["model.safetensors"]
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  if missing := [name for name in files if not (folder / name).is_file()]:
    raise ValueError(
      f"expected the weights of {folder} in {files}, missing {missing}. Only"
      " safetensors are read. Write them with transformers' save_pretrained."
    )
  tensors = {}
  for path in (folder / name for name in files):
    try:
      file = stack.enter_context(safetensors.safe_open(path, "np"))
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"expected a safetensors file at {path}, got an error: {error}."
        " Download it again."
      ) from error
    for name in file.keys():
      tensors[names.current(name)] = file.get_slice(name)
  return tensors


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter in a checkpoint; indexing it with slices reads that part."""

  tensors: list[Any]  # Slices of safetensors.
  names: layout.Layout
  path: layout.Path
  shape: tuple[int, ...]
  dtype: Any

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the part of the parameter at `index`, in `dtype`."""
    shape = np.broadcast_to(0, self.shape)[index].shape
    parts, tensors = np.empty((1, *shape), self.dtype), self.tensors
    if self.path[0] == "layers":
      parts, tensors, index = parts[0], tensors[index[0]], index[1:]
    into = parts
    if self.names.is_transposed(self.path):
      into = parts.swapaxes(-1, -2)
      index = (*index[:-2], index[-1], index[-2])
    rows = range(tensors[0].get_shape()[0])[index[0]]
    for tensor, part in zip(tensors, into, strict=True):
      for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        block = tensor[(slice(some.start, some.stop), *index[1:])]
        part[start : start + _ROWS] = block
    return parts.reshape(shape)


def shards(
  tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
  """Groups tensors into shards of at most `_SHARD_BYTES`.

  A larger tensor gets a shard of its own.
  """
  shard, size = {}, 0
  for name, array in tensors:
    if shard and size + array.nbytes > _SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
  yield shard


def write(
  folder: pathlib.Path, shards: Iterable[dict[str, np.ndarray]]
) -> None:
  """Writes the shards: one file, or several files with an index."""
  files, weight_map, total = [], {}, 0
  for shard in shards:
    files.append(folder / f"model-{len(files)}.safetensors")
    safetensors.numpy.save_file(shard, files[-1], metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, len(files))
    total += sum(array.nbytes for array in shard.values())
  if len(files) == 1:
    files[0].rename(folder / "model.safetensors")
    return
  name = lambda number: f"model-{number:05d}-of-{len(files):05d}.safetensors"
  for number, path in enumerate(files, 1):
    path.rename(folder / name(number))
  index = {
    "metadata": {"total_size": total},
    "weight_map": {tensor: name(x) for tensor, x in weight_map.items()},
  }
  (folder / "model.safetensors.index.json").write_text(
    json.dumps(index, indent=2) + "\n"
  )
