"""Which clients meet in a round, and in which order they see their examples.

Every draw has its own stream, seeded by (seed, purpose, round, client): a round
is the same whatever was sampled before it, so a resumed run meets the cohorts
that the uninterrupted one would have met.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from fedjax_llm.data import batches
from fedjax_llm.federated import clients

_CLIENTS, _EXAMPLES = 0, 1  # The purposes.


def cohort_sampler(
  population: batches.Population,
  *,
  clients_per_round: int,
  batch_size: int,
  local_epochs: int = 1,
  local_steps: int | None = None,
  weighting: Literal["uniform", "examples"] = "uniform",
  seed: int,
) -> Callable[[int], clients.Cohort]:
  """Samples clients uniformly without replacement, and shuffles their examples.

  A client takes its examples in a new order every epoch and every round. The
  last batch of an epoch is kept, with the missing examples masked. A cohort's
  shapes fit the largest client of the population, so they never change.

  Args:
    population: the clients and their examples.
    clients_per_round: how many meet.
    batch_size: examples in a local step.
    local_epochs: passes of a client over its examples in a round.
    local_steps: at most so many steps in a round; None for all of the epochs.
    weighting: of the clients in the aggregate: "uniform" weighs each 1,
      "examples" by the number of examples it owns, seen within `local_steps`
      or not.
    seed: of all draws.

  Returns:
    A function from the number of a round to its cohort.

  Raises:
    ValueError: if a number is not positive, more clients are to meet than there
      are, or `weighting` is neither of the two.
  """
  owned = np.diff(population.starts)
  _check_positive(
    clients_per_round=clients_per_round,
    batch_size=batch_size,
    local_epochs=local_epochs,
    local_steps=1 if local_steps is None else local_steps,
  )
  if clients_per_round > owned.size:
    raise ValueError(
      f"expected clients_per_round <= {owned.size}, the clients there are, got "
      f"{clients_per_round=}. Let fewer meet: they do not come twice."
    )
  if weighting not in ("uniform", "examples"):
    raise ValueError(
      f"expected weighting 'uniform' or 'examples', got {weighting=}."
    )
  steps_of_epoch = -(-owned // batch_size)
  steps = local_epochs * int(steps_of_epoch.max())
  steps = min(steps, local_steps or steps)
  weights = np.ones_like(owned) if weighting == "uniform" else owned

  def sample(round_number: int) -> clients.Cohort:
    rng = np.random.default_rng([seed, _CLIENTS, round_number])
    chosen = rng.choice(owned.size, clients_per_round, replace=False)
    rows = np.full((chosen.size, steps * batch_size), -1, np.int32)
    for row, client in zip(rows, chosen, strict=True):
      rng = np.random.default_rng([seed, _EXAMPLES, round_number, client])
      for epoch in range(local_epochs):
        start = epoch * steps_of_epoch[client] * batch_size
        free = row[start : start + owned[client]]
        order = population.starts[client] + rng.permutation(owned[client])
        free[:] = order[: free.size]
    rows = rows.reshape(-1, steps, batch_size)
    return clients.Cohort(
      clients=chosen.astype(np.int32),
      indices=np.maximum(rows, 0),
      mask=rows >= 0,
      weights=weights[chosen].astype(np.float32),
    )

  return sample


def _check_positive(**values: int) -> None:
  for name, value in values.items():
    if value < 1:
      raise ValueError(f"expected {name} >= 1, got {name}={value}.")
