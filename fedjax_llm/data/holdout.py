"""Who owns which record of a data set, and which of them is held out.

What a client holds out depends on its name and its own records alone, so it is
the same whatever the other clients and the model are.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from fedjax_llm.data import partition
from fedjax_llm.federated import draws

HeldOut = float | Literal["left_out"] | datasets.Dataset


class Side(NamedTuple):
  """A data set, who owns which of its records, and their labels."""

  data: datasets.Dataset
  clients: Mapping[str, np.ndarray]
  labels: np.ndarray | None


def divide(
  data: datasets.Dataset,
  partitioner: partition.Partitioner,
  client_column: str | None,
  label_column: str | None,
  held_out: HeldOut,
  seed: int,
) -> tuple[Side, Side, tuple[str, ...]]:
  """What is trained on, what is held out, and the names of the labels."""
  labels, names = labels_of(data, label_column)
  if client_column is not None:
    values = np.array(column_of(data, client_column))
  elif labels is not None and labels.ndim == 1:
    values = labels
  else:
    values = np.zeros(len(data), np.int32)
  clients, indices, left_out = partitioner(values)
  owned = dict(zip(clients, indices, strict=True))
  if isinstance(held_out, datasets.Dataset):
    everything = {"held_out": np.arange(len(held_out))}
    labels_there, _ = labels_of(held_out, label_column, names)
    rest = Side(held_out, everything, labels_there)
  elif held_out == "left_out":
    rest = Side(data, {"held_out": left_out}, labels)
  elif isinstance(held_out, float) and 0 < held_out < 1:
    parts = {
      name: _hold_out(name, own, held_out, seed) for name, own in owned.items()
    }
    owned = {name: train for name, (train, _) in parts.items()}
    rest = Side(data, {name: part for name, (_, part) in parts.items()}, labels)
  else:
    raise ValueError(
      "expected held_out to be a fraction in (0, 1), a datasets.Dataset or"
      f" 'left_out', got {held_out!r}."
    )
  return Side(data, owned, labels), rest, names


def _hold_out(
  name: str, owned: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Divides a client's records, whatever the other clients are."""
  number = int.from_bytes(hashlib.sha256(name.encode()).digest())
  order = draws.generator(seed, draws.Purpose.HELD_OUT, number).permutation(
    owned
  )
  count = min(max(1, round(share * owned.size)), owned.size - 1)
  return np.sort(order[count:]), np.sort(order[:count])


def labels_of(
  data: datasets.Dataset,
  column: str | None,
  names: tuple[str, ...] | None = None,
) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """A column as int32 [records] or float32 [records, labels], and the names.

  Numbers are those of `names`, by default of all that there are, in order.
  """
  if column is None:
    return None, ()
  values = column_of(data, column)
  several = isinstance(values[0], list)
  rows = values if several else [[value] for value in values]
  feature: Any = data.features[column]
  feature = feature.feature if several else feature
  if isinstance(feature, datasets.ClassLabel):
    rows = [feature.int2str(row) for row in rows]
    names = names or tuple(feature.names)
  elif names is None:
    names = tuple(map(str, sorted({value for row in rows for value in row})))
  codes = {name: code for code, name in enumerate(names)}
  unknown = {str(value) for row in rows for value in row} - set(codes)
  if unknown:
    raise ValueError(
      f"expected labels that the training data have, got {sorted(unknown)} in"
      f" column {column!r} of what is held out."
    )
  if not several:
    return np.array([codes[str(value)] for (value,) in rows], np.int32), names
  labels = np.zeros((len(rows), len(names)), np.float32)
  for row, held in zip(labels, rows, strict=True):
    row[[codes[str(value)] for value in held]] = 1
  return labels, names


def column_of(data: datasets.Dataset, column: str) -> list[Any]:
  """The values of a column."""
  if column not in data.column_names:
    raise ValueError(
      f"expected a column {column!r}, got"
      f" {', '.join(map(repr, data.column_names))}."
    )
  values = data[column][:]
  if not values or None in values:
    raise ValueError(
      f"expected a value in every row of column {column!r}, got rows without."
      " Leave them out: data.filter(...)."
    )
  return values
