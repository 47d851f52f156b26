"""Populations of clients from arrays, for examples that are not text."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from fedjax_llm.data import batches


def population(
  examples: Any,
  starts: Sequence[int] | np.ndarray,
  names: Sequence[str] | None = None,
) -> batches.Population:
  """Makes a population of clients that own consecutive rows.

  Args:
    examples: a tree of arrays [rows, ...]. The rows of a client are
      consecutive.
    starts: the first row of each client, and the number of rows at the end:
      client `i` owns the rows `starts[i]:starts[i + 1]`.
    names: the names of the clients; numbers if not given.

  Raises:
    ValueError: if the arrays have different numbers of rows, or `starts` or
      `names` do not fit.
  """
  leaves = jax.tree.leaves_with_path(examples)
  rows = {jax.tree_util.keystr(path): np.shape(x)[:1] for path, x in leaves}
  if len(set(rows.values())) != 1 or () in rows.values():
    got = ", ".join(f"{path} {list(rows[path])}" for path in list(rows)[:4])
    raise ValueError(
      "expected examples to be a tree of arrays [rows, ...] with one number of"
      f" rows, got {len(rows)} leaves: {got or 'none'}"
      f"{', ...' if len(rows) > 4 else ''}. A list is a tree, not an array: use"
      " np.array."
    )
  ((count,),) = set(rows.values())
  starts = np.asarray(starts)
  if (
    starts.ndim != 1
    or starts.size < 2
    or not np.issubdtype(starts.dtype, np.integer)
    or starts[0] != 0
    or starts[-1] != count
    or np.diff(starts).min() < 1
  ):
    raise ValueError(
      "expected starts to be the first row of each client and the number of"
      f" rows at the end: integers that increase from 0 to {count}, got"
      f" {starts}."
    )
  clients = starts.size - 1
  names = tuple(map(str, range(clients))) if names is None else tuple(names)
  if len(names) != clients:
    raise ValueError(
      f"expected a name for each of {clients} clients, got {len(names)} names."
    )
  return batches.Population(names, examples, starts.astype(np.int64))


def save(tree: Any, folder: pathlib.Path) -> None:
  """Writes arrays to `trainable.safetensors`, named by their tree paths."""
  folder.mkdir(parents=True, exist_ok=True)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
  named = {name: np.array(leaf, order="C") for name, leaf in named.items()}
  safetensors.numpy.save_file(named, folder / "trainable.safetensors")
