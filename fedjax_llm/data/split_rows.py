"""Splits the rows of every client into two parts: D1 and D2 of CG-FedLLM.

A codec is fitted on updates from D1. The model is then fine-tuned on D2 through
the codec. The paper splits 3 : 7 (arXiv 2405.13746). No row is in both parts.
"""

import hashlib

import numpy as np

from fedjax_llm.data import batches
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
  chosen, rest = [], []
  ends = zip(population.starts[:-1], population.starts[1:], strict=True)
  for name, (start, end) in zip(population.names, ends, strict=True):
    if end - start < 2:
      raise ValueError(
        "divide expected two rows or more of every client, got"
        f" {end - start} of {name!r}. Leave this client out, or take shorter"
        " rows."
      )
    number = int.from_bytes(hashlib.sha256(name.encode()).digest())
    rng = draws.generator(seed, draws.Purpose.SPLIT_ROWS, number)
    order = start + rng.permutation(end - start)
    count = min(max(1, round(share * order.size)), order.size - 1)
    chosen.append(np.sort(order[:count]))
    rest.append(np.sort(order[count:]))
  return _part(population, chosen), _part(population, rest)


def _part(population, rows):
  """Returns the population with only these rows of each client."""
  kept = np.concatenate(rows)
  take = lambda leaf: None if leaf is None else leaf[kept]
  examples = type(population.examples)(*map(take, population.examples))
  return population._replace(
    examples=examples,
    starts=np.cumsum([0, *map(len, rows)]),
    labels=take(population.labels),
  )
