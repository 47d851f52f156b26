"""Divides the records of a data set among clients, and holds some of them out.

The held-out records of a client depend only on the seed, its name and its own
records. They do not depend on other clients or on the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

import numpy as np

from fedjax_llm.data import partition
from fedjax_llm.federated import draws

if TYPE_CHECKING:
  import datasets

HeldOut = Union[float, Literal["left_out"], "datasets.Dataset"]


class Side(NamedTuple):
  """The training side or the held-out side of a division.

  Attributes:
    data: the data set.
    clients: the numbers of the records that each client owns.
    labels: the labels of all records, or None.
  """

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
  """Divides a data set among clients, and holds records out.

  Args:
    data: the records of all clients.
    partitioner: function that divides the records among clients. It gets the
      values of `client_column`; without one, the labels; without single labels,
      zeros.
    client_column: name of a column with the ids of natural clients, or None.
    label_column: name of a column with labels or lists of labels, or None.
    held_out: what is held out: a fraction in (0, 1) of each client's records;
      another data set; or "left_out", the records without a client.
    seed: seed of the held-out records.

  Returns:
    The training side, the held-out side, and the names of the labels.

  Raises:
    ValueError: if a column is missing, or `held_out` is none of these.
  """
  import datasets

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
    purpose = draws.Purpose.HELD_OUT
    parts = {
      name: split(name, own, held_out, seed=seed, purpose=purpose)
      for name, own in owned.items()
    }
    owned = {name: train for name, (_, train) in parts.items()}
    rest = Side(data, {name: part for name, (part, _) in parts.items()}, labels)
  else:
    raise ValueError(
      "expected held_out as a fraction in (0, 1), a datasets.Dataset or"
      f" 'left_out', got {held_out!r}."
    )
  return Side(data, owned, labels), rest, names


def split(
  name: str,
  owned: np.ndarray,
  share: float,
  *,
  seed: int,
  purpose: draws.Purpose,
) -> tuple[np.ndarray, np.ndarray]:
  """Splits the records or rows of one client at random.

  Args:
    name: the name of the client.
    owned: the numbers of the client's records or rows.
    share: the fraction in the first part. It is rounded to whole records, with
      at least one in each part. A single record goes to the second part.
    seed: seed of the split.
    purpose: the purpose of the split, which sets its random stream.

  Returns:
    The numbers in the two parts, each in ascending order.
  """
  client = int.from_bytes(hashlib.sha256(name.encode()).digest())
  order = draws.generator(seed, purpose, client).permutation(owned)
  count = min(max(1, round(share * owned.size)), owned.size - 1)
  return np.sort(order[:count]), np.sort(order[count:])


def labels_of(
  data: datasets.Dataset,
  column: str | None,
  names: tuple[str, ...] | None = None,
) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """Returns the labels in a column as numbers, and their names.

  Args:
    data: the data set.
    column: name of the column, which has single labels or lists of them; None
      for no labels.
    names: names of the labels in the order of their numbers; None to take them
      from the column: the names of a `ClassLabel`, or the sorted values.

  Returns:
    The labels: int32 [records], or float32 [records, labels] of ones and zeros
    if the column has lists; and the names of the labels.

  Raises:
    ValueError: if the column is missing, or has a label that is not in `names`.
  """
  import datasets

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
      f"expected labels of the training data, got {sorted(unknown)} in column"
      f" {column!r} of the held-out data. Leave these records out."
    )
  if not several:
    return np.array([codes[str(value)] for (value,) in rows], np.int32), names
  labels = np.zeros((len(rows), len(names)), np.float32)
  for row, held in zip(labels, rows, strict=True):
    row[[codes[str(value)] for value in held]] = 1
  return labels, names


def column_of(data: datasets.Dataset, column: str) -> list[Any]:
  """Returns the values of a column.

  Raises:
    ValueError: if the column is missing, is empty, or has a missing value.
  """
  if column not in data.column_names:
    raise ValueError(
      f"expected a column {column!r}, got"
      f" {', '.join(map(repr, data.column_names))}. Name one of these."
    )
  values = data[column][:]
  if not values or None in values:
    raise ValueError(
      f"expected a value in every row of column {column!r}, got no rows or rows"
      " without a value. Remove these with data.filter(...)."
    )
  return values
