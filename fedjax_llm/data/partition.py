"""Partitioners: who owns which example of a centralised data set.

A partitioner is a function from one value per example, its label, category or
natural id, to a `Partition`. The factories carry the literature's names. Those
that skew labels go through the distinct values in ascending order, so renaming
them in the same order changes nothing; those that skew sizes ignore them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.data import partition_draws
from fedjax_llm.federated import draws

# The purposes of a seed; those of `data.cohorts` are 0 and 1.


class Partition(NamedTuple):
  """Which example is whose.

  Attributes:
    names: of the clients, sorted.
    indices: int64, the numbers of each client's examples, ascending; no client
      is empty and no example is in two.
    left_out: int64, ascending, the examples that no client got.
  """

  names: tuple[str, ...]
  indices: tuple[np.ndarray, ...]
  left_out: np.ndarray


Partitioner = Callable[[np.ndarray], Partition]


def natural(*, minimum_examples: int = 1) -> Partitioner:
  """A client per distinct value, such as a user or a speaker.

  Args:
    minimum_examples: clients with fewer are left out, as in LEAF (Caldas et
      al., 2018, arXiv 1812.01097).

  Returns:
    A partitioner. It raises a `ValueError` if no client is left.
  """
  _expect(minimum_examples >= 1, ">= 1", minimum_examples=minimum_examples)

  def partition(values):
    values = _checked(values)
    clients = {
      str(values[examples[0]]): examples
      for examples in partition_draws.members_of(values)
      if examples.size >= minimum_examples
    }
    if not clients:
      raise ValueError(
        f"expected a client of {minimum_examples=} or more, got none among"
        f" {values.size} examples. Lower the minimum."
      )
    names = sorted(clients)
    return _partition([clients[name] for name in names], values.size, names)

  return partition


def iid(*, clients: int, seed: int) -> Partitioner:
  """Shuffles and deals; sizes are equal up to one (McMahan et al., 2017).

  Args:
    clients: how many.
    seed: of the draws, as in all factories in [0, 2**32).

  Returns:
    A partitioner. As all that take a number of clients, it raises a
    `ValueError` if there are fewer examples than that.
  """

  def draw(values, rng):
    return np.array_split(rng.permutation(values.size), clients)

  return _seeded(draw, clients, seed)


def dirichlet_by_class(
  *, clients: int, alpha: float, seed: int, minimum_examples: int = 1
) -> Partitioner:
  """Splits each class over the clients in shares drawn from Dir(alpha).

  Labels and sizes are both skewed (Yurochkin et al., 2019, arXiv 1905.12022).
  As in NIID-Bench (Li et al., 2022, arXiv 2102.02079), all is drawn again until
  every client has the minimum.

  Args:
    clients: how many.
    alpha: concentration, positive; the lower, the fewer clients share a class.
    seed: of the draws.
    minimum_examples: of every client.

  Returns:
    A partitioner. It raises a `ValueError` if no draw of a thousand gives
    every client the minimum.
  """
  _expect(minimum_examples >= 1, ">= 1", minimum_examples=minimum_examples)
  _expect(0 < alpha < np.inf, "in (0, inf)", alpha=alpha)

  def draw(values, rng):
    return partition_draws.dirichlet_by_class(
      partition_draws.members_of(values),
      rng,
      clients=clients,
      alpha=alpha,
      minimum_examples=minimum_examples,
    )

  return _seeded(draw, clients, seed, each=minimum_examples)


def dirichlet_by_client(
  *, clients: int, alpha: float, seed: int
) -> Partitioner:
  """Draws each client's mix of classes from Dir(alpha): nearly equal sizes.

  FLASC's partition (Kuo et al., 2024, arXiv 2406.05233), with the draws of its
  `scipy.stats.dirichlet.rvs(random_state=seed)`. The clients' shares of a class
  are scaled to sum to one and rounded to examples, which they take in order.
  Rounding may leave a few examples over.

  Args:
    clients: how many.
    alpha: concentration, positive; the lower, the fewer classes a client has.
    seed: of the draws.

  Returns:
    A partitioner. It raises a `ValueError` if a client gets nothing.
  """
  _expect(0 < alpha < np.inf, "in (0, inf)", alpha=alpha)

  def draw(values, _):
    rng = np.random.RandomState(
      draws.check_seed(seed)
    )  # The stream that scipy draws from.
    return partition_draws.dirichlet_by_client(
      partition_draws.members_of(values), rng, clients=clients, alpha=alpha
    )

  return _seeded(draw, clients, seed)


def shards(*, clients: int, shards_per_client: int, seed: int) -> Partitioner:
  """Sorts by label, cuts into equal shards and gives each client some.

  The pathological partition of McMahan et al. (2017, arXiv 1602.05629), whose
  clients hold two shards, so most of them two labels.

  Args:
    clients: how many.
    shards_per_client: shards that each client gets.
    seed: of the order within a label, and of who gets which shard.
  """
  _expect(shards_per_client >= 1, ">= 1", shards_per_client=shards_per_client)

  def draw(values, rng):
    members = partition_draws.members_of(values)
    return partition_draws.shards(
      members, rng, shape=(clients, shards_per_client)
    )

  return _seeded(draw, clients, seed, each=shards_per_client)


def log_normal_sizes(*, clients: int, sigma: float, seed: int) -> Partitioner:
  """Sizes follow a log-normal law; labels are IID.

  The unbalanced partition of FedDyn (Acar et al., 2021, arXiv 2111.04263).
  Every client gets one example, and of the others a share proportional to
  exp(sigma * z) with z standard normal.

  Args:
    clients: how many.
    sigma: of the logarithm of a share, 0 or more; 0 is IID.
    seed: of the shares and of who gets which example.
  """
  _expect(0 <= sigma < np.inf, "in [0, inf)", sigma=sigma)

  def draw(values, rng):
    logarithms = sigma * rng.standard_normal(clients)
    return partition_draws.in_shares(logarithms, rng, examples=values.size)

  return _seeded(draw, clients, seed)


def zipf_sizes(*, clients: int, exponent: float, seed: int) -> Partitioner:
  """Sizes follow a power law; labels are IID.

  As in FedProx (Li et al., 2020, arXiv 1812.06127). Every client gets one
  example, and of the others the k-th client, k from 1, gets a share
  proportional to k**-exponent.

  Args:
    clients: how many.
    exponent: 0 or more; 0 is IID.
    seed: of who gets which example.
  """
  _expect(0 <= exponent < np.inf, "in [0, inf)", exponent=exponent)

  def draw(values, rng):
    logarithms = -exponent * np.log(np.arange(1, clients + 1))
    return partition_draws.in_shares(logarithms, rng, examples=values.size)

  return _seeded(draw, clients, seed)


def iid_mix(partitioner: Partitioner, *, p: float, seed: int) -> Partitioner:
  """Pools a fraction of every client's examples and deals the pool again.

  FLASC's `iid-alpha` (Kuo et al., 2024, arXiv 2406.05233). Clients keep their
  sizes, and what was left out stays so. Which examples a client gives is drawn
  at random, where FLASC takes its last ones.

  Args:
    partitioner: what is mixed.
    p: fraction in [0, 1], rounded to whole examples of each client: 0 leaves
      everything as it is, 1 makes clients of the same sizes IID.
    seed: of the draws.
  """
  _expect(0 <= p <= 1, "in [0, 1]", p=p)
  _expect(0 <= seed < 2**32, "in [0, 2**32)", seed=seed)

  def partition(values):
    names, indices, _ = partitioner(values)
    rng = draws.generator(seed, draws.Purpose.MIX)
    return _partition(
      partition_draws.mix(indices, rng, p=p), len(values), names
    )

  return partition


def shepherd(*, clients: int, seed: int) -> Partitioner:
  """The split of Dolly by category that comes with Shepherd.

  Ten examples of every category are left out, for tests. Each category is split
  over the clients in shares from Dir(0.5), of which clients that have their
  part of all examples already get none. All is drawn again until every client
  has 40 (Zhang et al., 2023, arXiv 2305.05644; `client_data_allocation.py`).

  With the reference's seed, 42, so are its draws, hence the number of examples
  of each category that a client gets. Which ones they are differs: the
  reference sorts by category with pandas' unstable sort, which orders each
  category as the version at hand does; here it keeps the order of the data.

  Args:
    clients: how many.
    seed: of the draws.

  Returns:
    A partitioner. It raises a `ValueError` if a category has 10 examples or
    fewer, or no draw of a thousand gives every client 40.
  """

  def draw(values, _):
    rng = np.random.RandomState(draws.check_seed(seed))
    return partition_draws.shepherd(
      partition_draws.members_of(values), rng, clients=clients
    )

  return _seeded(draw, clients, seed, each=partition_draws.SHEPHERD_MINIMUM)


def _seeded(
  draw: Callable[[np.ndarray, np.random.Generator], Sequence[np.ndarray]],
  clients: int,
  seed: int,
  each: int = 1,
) -> Partitioner:
  """A partitioner of what `draw` gives to each client, `each` or more."""
  _expect(clients >= 1, ">= 1", clients=clients)
  _expect(0 <= seed < 2**32, "in [0, 2**32)", seed=seed)

  def partition(values):
    values = _checked(values, clients, each)
    rng = draws.generator(seed, draws.Purpose.PARTITION)
    return _partition(draw(values, rng), values.size)

  return partition


def _partition(
  indices: Sequence[np.ndarray],
  examples: int,
  names: Sequence[str] = (),
) -> Partition:
  """Checks and sorts; clients without names get their numbers."""
  empty = [i for i, own in enumerate(indices) if not own.size]
  if empty:
    raise ValueError(
      f"{len(empty)} of {len(indices)} clients got no example, the first is"
      f" number {empty[0]}. Take fewer clients, more examples or another seed."
    )
  width = len(str(len(indices) - 1))  # Names in order are numbers in order.
  names = names or [f"{i:0{width}}" for i in range(len(indices))]
  own = tuple(np.sort(x).astype(np.int64) for x in indices)
  left_out = np.ones(examples, bool)
  left_out[np.concatenate(own)] = False
  left_out = np.flatnonzero(left_out).astype(np.int64)
  return Partition(tuple(names), own, left_out)


def _checked(values: np.ndarray, clients: int = 1, each: int = 1) -> np.ndarray:
  values = np.asarray(values)
  if values.ndim != 1 or values.size < clients * each:
    raise ValueError(
      f"expected one value for each of {clients * each} or more examples,"
      f" {each} a client, got an array of shape {values.shape}. Take fewer"
      " clients, or more data."
    )
  return values


def _expect(holds: bool, range: str, **value: float) -> None:
  if not holds:
    ((name, got),) = value.items()
    raise ValueError(f"expected {name} {range}, got {name}={got}.")
