"""Which clients meet in a round, and in which order they see their examples.

Every draw has its own stream, seeded by (seed, purpose, round, client): a round
is the same whatever was sampled before it, so a resumed run meets the cohorts
that the uninterrupted one would have met.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy import special

from fedjax_llm.data import batches
from fedjax_llm.federated import clients, draws


def cohort_sampler(
  population: batches.Population,
  *,
  clients_per_round: int,
  batch_size: int,
  local_epochs: int = 1,
  local_steps: int | None = None,
  weighting: Literal["uniform", "examples"] = "uniform",
  sampling: Literal["fixed", "poisson"] = "fixed",
  seed: int,
) -> Callable[[int], clients.Cohort]:
  """Samples clients at random, and shuffles their examples.

  A client takes its examples in a new order every epoch and every round. The
  last batch of an epoch is kept, with the missing examples masked. A cohort's
  shapes fit the largest client of the population, so they never change.

  Poisson cohorts differ in size, and may be empty. Their shapes have room for
  so many that a larger one comes less than once in 1e9 rounds; it gets the room
  it needs, and the round is compiled again. What is left is filled with other
  clients, of weight zero and without examples: nobody comes twice.

  Args:
    population: the clients and their examples.
    clients_per_round: how many meet; with "poisson", how many are expected.
    batch_size: examples in a local step.
    local_epochs: passes of a client over its examples in a round.
    local_steps: at most so many steps in a round; None for all of the epochs.
    weighting: of the clients in the aggregate: "uniform" weighs each 1,
      "examples" by the number of examples it owns, seen within `local_steps`
      or not.
    sampling: "fixed" draws `clients_per_round` without replacement; "poisson"
      draws each client by itself with probability clients_per_round /
      population, which is what most accountants of privacy assume.
    seed: of all draws.

  Returns:
    A function from the number of a round to its cohort.

  Raises:
    ValueError: if a number is not positive, more clients are to meet than there
      are, or `weighting` or `sampling` is none of its two.
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
  if sampling not in ("fixed", "poisson"):
    raise ValueError(
      f"expected sampling 'fixed' or 'poisson', got {sampling=}."
    )
  sampler = _fixed if sampling == "fixed" else _poisson
  draw = sampler(owned.size, clients_per_round)
  steps_of_epoch = -(-owned // batch_size)
  steps = local_epochs * int(steps_of_epoch.max())
  steps = min(steps, local_steps or steps)
  weights = np.ones_like(owned) if weighting == "uniform" else owned

  def sample(round_number: int) -> clients.Cohort:
    rng = draws.generator(seed, draws.Purpose.COHORT, round_number)
    chosen, count = draw(rng)
    rows = np.full((chosen.size, steps * batch_size), -1, np.int32)
    for row, client in zip(rows[:count], chosen[:count], strict=True):
      rng = draws.generator(seed, draws.Purpose.EXAMPLES, round_number, client)
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
      weights=np.where(
        np.arange(chosen.size) < count, weights[chosen], 0
      ).astype(np.float32),
    )

  return sample


def _fixed(population, clients_per_round):
  """Makes `rng -> (clients, how many of them are there: the first ones)`."""
  return lambda rng: (
    rng.choice(population, clients_per_round, replace=False),
    clients_per_round,
  )


def _poisson(population, clients_per_round):
  """As `_fixed`, of which those that are not there fill the cohort up."""
  probability = clients_per_round / population
  sizes = np.arange(population + 1)
  is_rare = special.bdtrc(sizes, population, probability) < 1e-9
  room = int(np.argmax(is_rare))

  def draw(rng):
    is_there = rng.random(population) < probability
    there, others = np.flatnonzero(is_there), np.flatnonzero(~is_there)
    return np.append(there, others[: max(0, room - there.size)]), there.size

  return draw


def _check_positive(**values: int) -> None:
  for name, value in values.items():
    if value < 1:
      raise ValueError(f"expected {name} >= 1, got {name}={value}.")
