"""Partitioners: functions that divide a centralised data set among clients.

A partitioner is a function from an array with one value per example (a label, a
category or a natural id) to a `Partition`. Partitioners that skew labels use
values only to group and order the examples. Partitioners that skew sizes ignore
the values.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from fedjax_llm.data import partition_draws
from fedjax_llm.federated import draws

Partition = partition_draws.Partition
Partitioner = Callable[[np.ndarray], Partition]


def natural(*, minimum_examples: int = 1) -> Partitioner:
  """Makes one client for each distinct value, such as a user or a speaker.

  Args:
    minimum_examples: smallest number of examples of a client. Clients with
      fewer are left out, as in LEAF (Caldas et al., 2018, arXiv 1812.01097).

  Returns:
    A partitioner. It raises a `ValueError` if no client is left.
  """
  _expect(minimum_examples >= 1, ">= 1", minimum_examples=minimum_examples)

  def partition(values):
    values = partition_draws.checked(values)
    groups = partition_draws.members_of(values)
    clients = {
      str(values[examples[0]]): examples
      for examples in groups
      if examples.size >= minimum_examples
    }
    if not clients:
      raise ValueError(
        f"expected a client with {minimum_examples=} or more, but none of the"
        f" {len(groups)} clients has that many. Lower the minimum."
      )
    names = sorted(clients)
    return partition_draws.gather(
      [clients[name] for name in names], values.size, names
    )

  return partition


def iid(*, clients: int, seed: int) -> Partitioner:
  """Shuffles the examples and deals them; sizes differ by at most one.

  The IID partition of McMahan et al. (2017, arXiv 1602.05629).

  Args:
    clients: number of clients.
    seed: seed of the draws, in [0, 2**32), as in all functions of this module.

  Returns:
    A partitioner. It raises a `ValueError` if there are fewer examples than
    clients. All partitioners with an argument `clients` do.
  """

  def draw(values, rng):
    return np.array_split(rng.permutation(values.size), clients)

  return _seeded(draw, clients, seed)


def dirichlet_by_class(
  *, clients: int, alpha: float, seed: int, minimum_examples: int = 1
) -> Partitioner:
  """Splits each class over the clients in shares drawn from Dir(alpha).

  Labels and sizes are both skewed (Yurochkin et al., 2019, arXiv 1905.12022).
  As in NIID-Bench (Li et al., 2022, arXiv 2102.02079), the draw is repeated
  until every client has the minimum.

  Args:
    clients: number of clients.
    alpha: concentration, positive. A low value gives each class to few clients.
    seed: seed of the draws.
    minimum_examples: smallest number of examples of a client.

  Returns:
    A partitioner. It raises a `ValueError` if none of a thousand draws gives
    every client the minimum.
  """
  _expect(minimum_examples >= 1, ">= 1", minimum_examples=minimum_examples)
  _expect(0 < alpha < np.inf, "in (0, inf)", alpha=alpha)

  draw = functools.partial(
    partition_draws.dirichlet_by_class,
    clients=clients,
    alpha=alpha,
    minimum_examples=minimum_examples,
  )
  return _by_class(draw, clients, seed, each=minimum_examples)


def dirichlet_by_client(
  *, clients: int, alpha: float, seed: int
) -> Partitioner:
  """Draws the mix of classes of each client from Dir(alpha).

  Sizes are nearly equal. This is FLASC's partition (Kuo et al., 2024, arXiv
  2406.05233), with the same draws as its
  `scipy.stats.dirichlet.rvs(random_state=seed)`. The clients' shares of a class
  are scaled to sum to one and rounded to whole examples. Rounding may leave a
  few examples without a client.

  Args:
    clients: number of clients.
    alpha: concentration, positive. A low value gives each client few classes.
    seed: seed of the draws.

  Returns:
    A partitioner. It raises a `ValueError` if a client gets no example.
  """
  _expect(0 < alpha < np.inf, "in (0, inf)", alpha=alpha)

  def draw(members, _):
    rng = np.random.RandomState(seed)  # The generator that scipy uses.
    return partition_draws.dirichlet_by_client(
      members, rng, clients=clients, alpha=alpha
    )

  return _by_class(draw, clients, seed)


def shards(*, clients: int, shards_per_client: int, seed: int) -> Partitioner:
  """Sorts by label, cuts into equal shards and deals the shards to clients.

  This is the pathological partition of McMahan et al. (2017, arXiv 1602.05629).
  In the paper each client has two shards, so most clients have two labels.

  Args:
    clients: number of clients.
    shards_per_client: number of shards that each client gets.
    seed: seed of the order of examples within a label, and of the dealing.
  """
  _expect(shards_per_client >= 1, ">= 1", shards_per_client=shards_per_client)

  shape = (clients, shards_per_client)
  draw = functools.partial(partition_draws.shards, shape=shape)
  return _by_class(draw, clients, seed, each=shards_per_client)


def log_normal_sizes(*, clients: int, sigma: float, seed: int) -> Partitioner:
  """Draws sizes from a log-normal distribution; labels are IID.

  This is the unbalanced partition of FedDyn (Acar et al., 2021, arXiv
  2111.04263). Every client gets one example. The other examples are divided in
  shares proportional to exp(sigma * z), with z standard normal.

  Args:
    clients: number of clients.
    sigma: standard deviation of the logarithm of a share; 0 is IID.
    seed: seed of the shares and of the dealing.
  """
  _expect(0 <= sigma < np.inf, "in [0, inf)", sigma=sigma)

  def draw(values, rng):
    logarithms = sigma * rng.standard_normal(clients)
    return partition_draws.in_shares(logarithms, rng, examples=values.size)

  return _seeded(draw, clients, seed)


def zipf_sizes(*, clients: int, exponent: float, seed: int) -> Partitioner:
  """Makes sizes that follow a power law; labels are IID.

  This follows FedProx (Li et al., 2020, arXiv 1812.06127). Every client gets
  one example. The other examples are divided in shares: the share of client k,
  counted from 1, is proportional to k**-exponent.

  Args:
    clients: number of clients.
    exponent: exponent of the power law, 0 or more; 0 is IID.
    seed: seed of the dealing.
  """
  _expect(0 <= exponent < np.inf, "in [0, inf)", exponent=exponent)

  def draw(values, rng):
    logarithms = -exponent * np.log(np.arange(1, clients + 1))
    return partition_draws.in_shares(logarithms, rng, examples=values.size)

  return _seeded(draw, clients, seed)


def iid_mix(partitioner: Partitioner, *, p: float, seed: int) -> Partitioner:
  """Pools a fraction of every client's examples and deals the pool again.

  This is FLASC's `iid-alpha` (Kuo et al., 2024, arXiv 2406.05233). Clients keep
  their sizes, and left-out examples stay left out. The examples that a client
  gives to the pool are random; in FLASC they are its last ones.

  Args:
    partitioner: the partitioner to mix.
    p: fraction of each client's examples that is pooled, in [0, 1]. 0 changes
      nothing. 1 makes the clients IID; they keep their sizes.
    seed: seed of the draws.
  """
  _expect(0 <= p <= 1, "in [0, 1]", p=p)
  draws.check_seed(seed)

  def partition(values):
    names, indices, _ = partitioner(values)
    rng = draws.generator(seed, draws.Purpose.MIX)
    return partition_draws.gather(
      partition_draws.mix(indices, rng, p=p), len(values), names
    )

  return partition


def shepherd(*, clients: int, seed: int) -> Partitioner:
  """Splits by category as Shepherd splits Dolly.

  Ten examples of every category are left out for testing. Each category is
  split over the clients in shares from Dir(0.5). A client that already has its
  equal part of all examples gets none of the further categories. The draw is
  repeated until every client has 40 examples (Zhang et al., 2023, arXiv
  2305.05644; `client_data_allocation.py`).

  With the reference's seed, 42, a client gets as many examples of each category
  as in the reference, but not the same examples. The reference sorts by
  category with an unstable sort; this function keeps the order of the data.

  Args:
    clients: number of clients.
    seed: seed of the draws.

  Returns:
    A partitioner. It raises a `ValueError` if a category has 10 examples or
    fewer, or none of a thousand draws gives every client 40.
  """

  def draw(values, _):
    rng = np.random.RandomState(seed)  # The generator of the reference.
    return partition_draws.shepherd(values, rng, clients=clients)

  return _seeded(draw, clients, seed, each=partition_draws.SHEPHERD_MINIMUM)


def _by_class(draw, clients, seed, each=1) -> Partitioner:
  """Makes a partitioner; `draw` gets the examples of each class."""
  by_value = lambda values, rng: draw(partition_draws.members_of(values), rng)
  return _seeded(by_value, clients, seed, each)


def _seeded(
  draw: Callable[[np.ndarray, np.random.Generator], Sequence[np.ndarray]],
  clients: int,
  seed: int,
  each: int = 1,
) -> Partitioner:
  """Makes a partitioner; `draw` gets the values."""
  _expect(clients >= 1, ">= 1", clients=clients)
  draws.check_seed(seed)

  def partition(values):
    values = partition_draws.checked(values, clients, each)
    rng = draws.generator(seed, draws.Purpose.PARTITION)
    return partition_draws.gather(draw(values, rng), values.size)

  return partition


def _expect(holds: bool, range: str, **value: float) -> None:
  if not holds:
    ((name, got),) = value.items()
    raise ValueError(f"expected {name} {range}, got {name}={got}.")
