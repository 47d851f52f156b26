"""Draws of `data.partition`: what each client gets of the examples of a class.

`members` are the examples of each class, `rng` is what is drawn from; the
result is the examples of each client.
"""

from collections.abc import Iterable, Sequence

import numpy as np

# Draws that may leave a client with too little, before that is an error.
_DRAWS = 1000
# Of Shepherd's `client_data_allocation.py`.
SHEPHERD_ALPHA, SHEPHERD_HELD_OUT, SHEPHERD_MINIMUM = 0.5, 10, 40
# Generators have a better law, the old state has the published draws.
Rng = np.random.Generator | np.random.RandomState


def members_of(values: np.ndarray) -> list[np.ndarray]:
  """The examples of each distinct value, the values ascending.

  Raises:
    ValueError: if the values are not of one kind.
  """
  try:
    _, codes = np.unique(values, return_inverse=True)
  except TypeError as error:
    raise ValueError(
      f"expected values that can be sorted, but {error}. Are some missing?"
    ) from error
  order = np.argsort(codes, kind="stable")
  return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def in_shares(
  logarithms: np.ndarray, rng: Rng, *, examples: int
) -> list[np.ndarray]:
  """An example for each client, the others in shares given by logarithm."""
  shares = np.exp(logarithms - logarithms.max())
  ends = np.cumsum(shares / shares.sum()) * (examples - shares.size)
  ends = np.rint(ends).astype(np.int64) + np.arange(1, shares.size + 1)
  return np.split(rng.permutation(examples), ends[:-1])


def shards(
  members: Sequence[np.ndarray], rng: Rng, *, shape: tuple[int, int]
) -> list[np.ndarray]:
  """Cuts the classes, one after the other, into [clients, shards]."""
  order = np.concatenate([rng.permutation(examples) for examples in members])
  pieces = np.array_split(order, shape[0] * shape[1])
  dealt = rng.permutation(len(pieces)).reshape(shape)
  return [np.concatenate([pieces[i] for i in row]) for row in dealt]


def mix(
  indices: Sequence[np.ndarray], rng: Rng, *, p: float
) -> list[np.ndarray]:
  """Pools a fraction `p` of each client's examples and deals the pool again."""
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
  """Draws the clients' shares of each class, until all have the minimum.

  Args:
    members: the examples of each class.
    rng: what is drawn from.
    clients: how many.
    alpha: concentration of the shares.
    minimum_examples: of every client.
    limit: clients that have so many get none of the classes that follow.

  Raises:
    ValueError: if no draw of a thousand gave every client the minimum.
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
    f"none of {_DRAWS} draws gave every one of {clients} clients"
    f" {minimum_examples} examples or more of {sum(map(len, members))}, with"
    f" {alpha=}. Take fewer clients, or raise alpha."
  )


def dirichlet_by_client(
  members: Sequence[np.ndarray],
  rng: Rng,
  *,
  clients: int,
  alpha: float,
) -> list[np.ndarray]:
  """Draws each client's mix of classes; rounding may leave examples over.

  Arguments are those of `dirichlet_by_class`.

  Raises:
    ValueError: if `alpha` is so small that no client wants some class.
  """
  shares = rng.dirichlet(np.full(len(members), alpha), clients)
  wanted = shares.sum(axis=0)
  if not (wanted > 0).all():  # Draws that underflow are NaN.
    raise ValueError(
      f"no client wants some of the {len(members)} classes: {alpha=} is too"
      " small to draw from. Raise it."
    )
  counts = np.array([examples.size for examples in members])
  ends = np.rint(shares / wanted * counts).astype(np.int64).cumsum(axis=0)
  # The last piece of a class is what nobody wanted.
  return join(map(np.split, members, ends.T))[:clients]


def shepherd(
  members: Sequence[np.ndarray], rng: Rng, *, clients: int
) -> list[np.ndarray]:
  """Holds examples of each class out and draws the clients' shares of the rest.

  Raises:
    ValueError: if nothing is left of a class, or a client gets too little.
  """
  least = min(map(len, members))
  if least <= SHEPHERD_HELD_OUT:
    raise ValueError(
      f"expected more than {SHEPHERD_HELD_OUT} examples of every category, got"
      f" {least} of one. Leave it out of the data."
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
  """Each client's pieces, one of every class, in one array."""
  return [np.concatenate(own) for own in zip(*pieces, strict=True)]
