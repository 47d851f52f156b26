"""Samples the clients of a round and the order of their examples.

Every draw has its own stream, seeded by (seed, purpose, round, client). So a
round does not depend on the rounds before it, and a resumed run samples the
cohorts that the uninterrupted run would have sampled.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from fedjax_llm.data import batches
from fedjax_llm.federated import clients, draws


def cohort_sampler(
  population: batches.Population,
  *,
  clients_per_round: int,
  batch_size: int,
  local_epochs: int = 1,
  local_steps: int | None = None,
  sampling: Literal["fixed", "poisson"] = "fixed",
  seed: int,
) -> Callable[[int], clients.Cohort]:
  """Makes the function that samples the cohort of a round.

  A client takes its examples in a new order every epoch and every round. The
  last batch of an epoch is kept, with the missing examples masked. The shapes
  of a cohort fit the largest client of the population, so they never change.

  Poisson cohorts differ in size and may be empty. Their arrays have a fixed
  number of places. A cohort needs more places with probability below 1e-9. The
  round is then compiled again. Free places are filled with other clients, which
  have weight zero and no examples. So no client has two places.

  Args:
    population: the clients and their examples.
    clients_per_round: size of a cohort; with "poisson", the expected size.
    batch_size: number of examples in a local step.
    local_epochs: number of passes of a client over its examples in a round.
    local_steps: largest number of steps in a round; None for all steps of the
      epochs.
    sampling: the kind of sampling. "fixed" draws `clients_per_round` clients
      without replacement. "poisson" draws each client independently with
      probability clients_per_round / population, as most privacy accountants
      assume.
    seed: seed of all draws.

  Returns:
    A function from the number of a round to its cohort. The weight of a client
    is the number of examples it owns, even if `local_steps` leaves some out.
    The aggregator decides what weights mean.

  Raises:
    ValueError: if a number is not positive, there are fewer clients than
      `clients_per_round`, or `sampling` is unknown.
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
      f"expected clients_per_round <= {owned.size}, the number of clients, got"
      f" {clients_per_round=}. Lower it: a cohort has each client at most once."
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
    weights = owned[chosen].astype(np.float32)
    weights[count:] = 0
    # Masked examples point to the client's own first row, never to another's.
    first = population.starts[chosen][:, None, None]
    return clients.Cohort(
      clients=chosen.astype(np.int32),
      indices=np.where(rows < 0, first, rows).astype(np.int32),
      mask=rows >= 0,
      weights=weights,
    )

  return sample


def _fixed(population, clients_per_round):
  """Makes the function that draws a cohort of a fixed size.

  The function takes `rng`. It returns clients, and the number of them, counted
  from the first, that take part.
  """
  return lambda rng: (
    rng.choice(population, clients_per_round, replace=False),
    clients_per_round,
  )


def _poisson(population, clients_per_round):
  """Makes the function that draws a Poisson cohort; see `_fixed`.

  Clients that do not take part fill the free places.
  """
  from scipy import special

  probability = clients_per_round / population
  sizes = np.arange(population + 1)
  is_rare = special.bdtrc(sizes, population, probability) < 1e-9
  room = int(np.argmax(is_rare))

  def draw(rng):
    is_drawn = rng.random(population) < probability
    drawn, others = np.flatnonzero(is_drawn), np.flatnonzero(~is_drawn)
    return np.append(drawn, others[: max(0, room - drawn.size)]), drawn.size

  return draw


def _check_positive(**values: int) -> None:
  for name, value in values.items():
    if value < 1:
      raise ValueError(f"expected {name} >= 1, got {name}={value}.")
