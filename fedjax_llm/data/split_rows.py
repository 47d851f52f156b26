"""Splits the rows of every client into two parts: D1 and D2 of CG-FedLLM.

A codec is fitted on updates from D1. The model is then fine-tuned on D2 through
the codec. The paper splits 3 : 7 (arXiv 2405.13746). No row is in both parts.
"""

import jax
import numpy as np

from fedjax_llm.data import batches, holdout
from fedjax_llm.federated import draws


def divide(
  population: batches.Population, share: float = 0.3, *, seed: int
) -> tuple[batches.Population, batches.Population]:
  """Splits the rows of every client at random.

  The split of a client does not depend on other clients.

  Args:
    population: the clients, with two or more rows each.
    share: fraction of a client's rows in the first part, in (0, 1). It is
      rounded to whole rows, at least one in each part.
    seed: seed of the split.

  Returns:
    The two parts, with the same clients. Rows keep their order. Rows that were
    cut from one text may share the token at the cut.

  Raises:
    ValueError: if `share` is out of range, or a client has only one row.
  """
  if not 0 < share < 1:
    raise ValueError(f"divide expected share in (0, 1), got {share=}.")
  parts = []
  ends = zip(population.starts[:-1], population.starts[1:], strict=True)
  for name, (start, end) in zip(population.names, ends, strict=True):
    if end - start < 2:
      raise ValueError(
        "divide expected two rows or more for every client, got"
        f" {end - start} of {name!r}. Leave this client out, or take shorter"
        " rows."
      )
    rows, purpose = np.arange(start, end), draws.Purpose.SPLIT_ROWS
    parts.append(holdout.split(name, rows, share, seed=seed, purpose=purpose))
  first, second = zip(*parts, strict=True)
  return _part(population, first), _part(population, second)


def _part(population, rows):
  """Returns the population with only these rows of each client."""
  kept = np.concatenate(rows)
  owned = (population.examples, population.labels)
  examples, labels = jax.tree.map(lambda leaf: leaf[kept], owned)
  starts = np.cumsum([0, *map(len, rows)])
  return population._replace(examples=examples, starts=starts, labels=labels)
