"""Two parts of every client's rows: CG-FedLLM's D1 and D2.

On D1 updates are recorded that a codec is fitted on, with D2 the model is tuned
through it (arXiv 2405.13746, 3 : 7). No row is in both.
"""

import hashlib

import numpy as np

from fedjax_llm.data import batches
from fedjax_llm.federated import draws


def divide(
  population: batches.Population, share: float = 0.3, *, seed: int
) -> tuple[batches.Population, batches.Population]:
  """Divides the rows of every client at random, whatever the others have.

  Args:
    population: clients of two rows or more.
    share: of a client's rows that are in the first part, in (0, 1); rounded,
      but both parts have one row at least.
    seed: of the division.

  Returns:
    The two parts, with the same clients; rows keep their order. (Rows cut from
    one text may overlap by the token at which it was cut.)

  Raises:
    ValueError: if `share` is out of range, or a client has one row alone.
  """
  if not 0 < share < 1:
    raise ValueError(f"divide expected share in (0, 1), got {share=}.")
  chosen, rest = [], []
  ends = zip(population.starts[:-1], population.starts[1:], strict=True)
  for name, (start, end) in zip(population.names, ends, strict=True):
    if end - start < 2:
      raise ValueError(
        "divide expected two rows or more of every client, got"
        f" {end - start} of {name!r}. Leave it out, or take shorter rows."
      )
    number = int.from_bytes(hashlib.sha256(name.encode()).digest())
    rng = draws.generator(seed, draws.Purpose.SPLIT_ROWS, number)
    order = start + rng.permutation(end - start)
    count = min(max(1, round(share * order.size)), order.size - 1)
    chosen.append(np.sort(order[:count]))
    rest.append(np.sort(order[count:]))
  return _part(population, chosen), _part(population, rest)


def _part(population, rows):
  """The population of these rows of each client."""
  kept = np.concatenate(rows)
  take = lambda leaf: None if leaf is None else leaf[kept]
  examples = type(population.examples)(*map(take, population.examples))
  return population._replace(
    examples=examples,
    starts=np.cumsum([0, *map(len, rows)]),
    labels=take(population.labels),
  )
