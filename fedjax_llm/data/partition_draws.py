"""The type `Partition`, and the random draws of `data.partition`.

Most functions here take `members`, the examples of each class, and `rng`, a
random generator. They return the examples of each client.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# After so many draws that each gave some client too little, an error is raised.
_DRAWS = 1000
# The constants of Shepherd's `client_data_allocation.py`.
SHEPHERD_ALPHA, SHEPHERD_HELD_OUT, SHEPHERD_MINIMUM = 0.5, 10, 40
# A RandomState reproduces published draws; everything else uses a Generator.
Rng = np.random.Generator | np.random.RandomState


class Partition(NamedTuple):
  """The examples of each client.

  Attributes:
    names: the names of the clients, sorted.
    indices: int64, the examples of each client, ascending. Every client has an
      example, and no example has two clients.
    left_out: int64, the examples without a client, ascending.
  """

  names: tuple[str, ...]
  indices: tuple[np.ndarray, ...]
  left_out: np.ndarray


def checked(values: np.ndarray, clients: int = 1, each: int = 1) -> np.ndarray:
  """Returns `values` as an array.

  Raises:
    ValueError: if `values` is not a vector of `clients * each` entries or more.
  """
  values = np.asarray(values)
  if values.ndim != 1 or values.size < clients * each:
    share = f", {each} for each of {clients} clients" if clients > 1 else ""
    raise ValueError(
      f"expected a 1-D array of at least {clients * each} values{share}, got"
      f" shape {values.shape}. Take fewer clients, or more data."
    )
  return values


def gather(
  indices: Sequence[np.ndarray],
  examples: int,
  names: Sequence[str] = (),
) -> Partition:
  """Makes a partition from the examples of each client.

  Args:
    indices: the examples of each client, in any order.
    examples: the number of all examples.
    names: the names of the clients; if empty, their numbers.

  Raises:
    ValueError: if a client has no example.
  """
  empty = [i for i, own in enumerate(indices) if not own.size]
  if empty:
    raise ValueError(
      f"expected an example for each of {len(indices)} clients, got none for"
      f" {len(empty)} of them; the first is number {empty[0]}. Take fewer"
      " clients, more examples or another seed."
    )
  width = len(str(len(indices) - 1))  # Sorted names are then sorted numbers.
  names = names or [f"{i:0{width}}" for i in range(len(indices))]
  own = tuple(np.sort(x).astype(np.int64) for x in indices)
  left_out = np.ones(examples, bool)
  left_out[np.concatenate(own)] = False
  left_out = np.flatnonzero(left_out).astype(np.int64)
  return Partition(tuple(names), own, left_out)


def members_of(values: np.ndarray) -> list[np.ndarray]:
  """Returns the examples of each distinct value, for values in ascending order.

  Raises:
    ValueError: if the values cannot be sorted.
  """
  try:
    _, codes = np.unique(values, return_inverse=True)
  except TypeError as error:
    raise ValueError(
      f"expected values of one sortable type, got others: {error}. Are some"
      " missing?"
    ) from error
  order = np.argsort(codes, kind="stable")
  return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def in_shares(
  logarithms: np.ndarray, rng: Rng, *, examples: int
) -> list[np.ndarray]:
  """Gives each client one example, and divides the others in shares.

  Args:
    logarithms: the logarithms of the clients' shares, up to a constant.
    rng: the random generator.
    examples: the number of examples.
  """
  shares = np.exp(logarithms - logarithms.max())
  ends = np.cumsum(shares / shares.sum()) * (examples - shares.size)
  ends = np.rint(ends).astype(np.int64) + np.arange(1, shares.size + 1)
  return np.split(rng.permutation(examples), ends[:-1])


def shards(
  members: Sequence[np.ndarray], rng: Rng, *, shape: tuple[int, int]
) -> list[np.ndarray]:
  """Cuts the classes, one after the other, into shards and deals the shards.

  Args:
    members: the examples of each class.
    rng: the random generator.
    shape: the number of clients, and the number of shards per client.
  """
  order = np.concatenate([rng.permutation(examples) for examples in members])
  pieces = np.array_split(order, shape[0] * shape[1])
  dealt = rng.permutation(len(pieces)).reshape(shape)
  return [np.concatenate([pieces[i] for i in row]) for row in dealt]


def mix(
  indices: Sequence[np.ndarray], rng: Rng, *, p: float
) -> list[np.ndarray]:
  """Pools a fraction of each client's examples and deals the pool again.

  Args:
    indices: the examples of each client.
    rng: the random generator.
    p: the fraction, in [0, 1].
  """
  orders = [rng.permutation(own) for own in indices]
  given = [int(np.rint(p * own.size)) for own in indices]
  kept = [own[n:] for own, n in zip(orders, given, strict=True)]
  pool = [own[:n] for own, n in zip(orders, given, strict=True)]
  pool = rng.permutation(np.concatenate(pool))
  return join([kept, np.split(pool, np.cumsum(given)[:-1])])


def dirichlet_by_class(
  members: Sequence[np.ndarray],
  rng: Rng,
  *,
  clients: int,
  alpha: float,
  minimum_examples: int,
  limit: float = np.inf,
) -> list[np.ndarray]:
  """Draws the clients' shares of each class until every client has the minimum.

  Args:
    members: the examples of each class.
    rng: the random generator.
    clients: the number of clients.
    alpha: the concentration of the shares.
    minimum_examples: the smallest number of examples of a client.
    limit: a client with so many examples or more gets no further classes.

  Raises:
    ValueError: if none of a thousand draws gave every client the minimum.
  """
  for _ in range(_DRAWS):
    classes, owned = [], np.zeros(clients, np.int64)
    for examples in members:
      order = rng.permutation(examples)
      shares = rng.dirichlet(np.full(clients, alpha)) * (owned < limit)
      ends = np.cumsum(shares / shares.sum()) * order.size
      classes.append(np.split(order, ends[:-1].astype(np.int64)))
      owned += [part.size for part in classes[-1]]
    if owned.min() >= minimum_examples:
      return join(classes)
  raise ValueError(
    f"none of {_DRAWS} draws with {alpha=} gave each of {clients} clients"
    f" {minimum_examples} or more of the {sum(map(len, members))} examples."
    " Take fewer clients, or raise alpha."
  )


def dirichlet_by_client(
  members: Sequence[np.ndarray],
  rng: Rng,
  *,
  clients: int,
  alpha: float,
) -> list[np.ndarray]:
  """Draws the mix of classes of each client; rounding may leave examples over.

  Args:
    members: the examples of each class.
    rng: the random generator.
    clients: the number of clients.
    alpha: the concentration of the mixes.

  Raises:
    ValueError: if `alpha` is so small that a class has a share of zero in every
      client's mix.
  """
  shares = rng.dirichlet(np.full(len(members), alpha), clients)
  wanted = shares.sum(axis=0)
  if not (wanted > 0).all():  # Draws that underflow are NaN.
    raise ValueError(
      f"with {alpha=} one of the {len(members)} classes has a share of zero at"
      " every client. Raise alpha."
    )
  counts = np.array([examples.size for examples in members])
  ends = np.rint(shares / wanted * counts).astype(np.int64).cumsum(axis=0)
  # The last piece of a class is what rounding left over.
  return join(map(np.split, members, ends.T))[:clients]


def shepherd(values: np.ndarray, rng: Rng, *, clients: int) -> list[np.ndarray]:
  """Holds out examples of each category, and divides the rest among clients.

  Args:
    values: the category of each example.
    rng: the random generator.
    clients: the number of clients.

  Raises:
    ValueError: if a category has too few examples, or a client gets too few.
  """
  members = members_of(values)
  smallest = min(members, key=len)
  if len(smallest) <= SHEPHERD_HELD_OUT:
    raise ValueError(
      f"expected more than {SHEPHERD_HELD_OUT} examples of every category, got"
      f" {len(smallest)} of {str(values[smallest[0]])!r}. Leave this category"
      " out."
    )
  held_out = [rng.permutation(x)[:SHEPHERD_HELD_OUT] for x in members]
  rest = list(map(np.setdiff1d, members, held_out))
  return dirichlet_by_class(
    rest,
    rng,
    clients=clients,
    alpha=SHEPHERD_ALPHA,
    minimum_examples=SHEPHERD_MINIMUM,
    limit=sum(map(len, rest)) / clients,
  )


def join(pieces: Iterable[Iterable[np.ndarray]]) -> list[np.ndarray]:
  """Joins each client's pieces, one from every class, into one array."""
  return [np.concatenate(own) for own in zip(*pieces, strict=True)]
