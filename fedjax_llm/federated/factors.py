"""LoRA factors: their products, stacks and truncations, anywhere in a tree.

A pair is `a` [..., inputs, rank] and `b` [..., rank, outputs] of one module,
with the same leading axes, such as stacked layers. Other trainable parameters,
such as a head, are in no pair.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fedjax_llm.compression import base, sparse
from fedjax_llm.federated import channels

Path = tuple[str, ...]


class Pair(NamedTuple):
  """The two factors of a module.

  Attributes:
    a: [..., inputs, rank].
    b: [..., rank, outputs].
  """

  a: Any
  b: Any


def pairs(tree: Mapping[str, Any]) -> dict[Path, Pair]:
  """Returns all pairs of a tree, by the paths of their modules.

  Raises:
    ValueError: if the tree has no pair.
  """
  flat: Any = flax.traverse_util.flatten_dict(dict(tree))
  found = {
    path[:-1]: Pair(leaf, flat[*path[:-1], "b"])
    for path, leaf in flat.items()
    if path[-1] == "a" and (*path[:-1], "b") in flat
  }
  if not found:
    names = ", ".join("/".join(path) for path in flat)
    raise ValueError(f"expected LoRA factors a and b, got only: {names}.")
  return found


def put(tree: Mapping[str, Any], new: Mapping[Path, Pair]) -> Any:
  """Returns the tree with these pairs replaced."""
  flat: Any = flax.traverse_util.flatten_dict(dict(tree))
  for path, pair in new.items():
    flat |= {(*path, "a"): pair.a, (*path, "b"): pair.b}
  return flax.traverse_util.unflatten_dict(flat)


def rank(tree: Mapping[str, Any]) -> int:
  """Returns the largest rank of a tree's pairs."""
  return max(pair.a.shape[-1] for pair in pairs(tree).values())


def entry_ranks(tree: Mapping[str, Any]) -> Any:
  """Returns the number of each entry's rank in the flat vector, from 0 on.

  A rank is a column of `a` and a row of `b`.

  Returns:
    NumPy int [n]; -1 for entries in no pair.
  """
  owners, ranks = rank_owners(tree)
  within = np.concatenate([np.arange(x) for x in ranks])
  return np.where(owners < 0, -1, within[owners])


def rank_owners(tree: Mapping[str, Any]) -> tuple[Any, list[int]]:
  """Finds the layer and the rank of each entry of the flat vector.

  Returns:
    NumPy int [n], the number of each entry's rank, counted over all layers; -1
    for entries in no pair. And the number of ranks in each layer.
  """
  owners = jax.tree.map(lambda x: np.full(np.shape(x), -1), tree)
  numbered, ranks, count = {}, [], 0
  for path, pair in pairs(tree).items():
    *layers, _, rank = pair.a.shape
    number = count + np.arange(math.prod(layers) * rank)
    number = number.reshape(*layers, rank)
    numbered[path] = Pair(
      np.broadcast_to(number[..., None, :], pair.a.shape),
      np.broadcast_to(number[..., :, None], pair.b.shape),
    )
    ranks += [rank] * math.prod(layers)
    count += number.size
  leaves = jax.tree.leaves(put(owners, numbered))
  return np.concatenate([x.ravel() for x in leaves]), ranks


def tiers(
  tree: Mapping[str, Any],
  ranks: Sequence[int],
  of_client: Callable[[Any], Any] | None = None,
  upload: base.Compressor | None = None,
) -> channels.Tiers:
  """Makes tiers that receive and send only the first ranks of all pairs.

  Parameters in no pair travel whole. Ranks that are not sent need no freezing:
  if a column of `a` and its row of `b` are zero, their gradients are zero too.

  Args:
    tree: the trainable parameters; only their shapes are used.
    ranks: the rank of each tier, in [1, rank of the pairs].
    of_client: a function from client numbers to tier numbers. If not given,
      client i is in tier i modulo tiers, as in the code of FLASC's authors.
    upload: compresses the entries that are uploaded; None for no compression.

  Raises:
    ValueError: if a rank is out of range, or there is no tier.
  """
  largest, owners = rank(tree), entry_ranks(tree)
  if not ranks or not all(1 <= x <= largest for x in ranks):
    raise ValueError(
      f"expected ranks of tiers in [1, {largest}], the rank of the adapter, got"
      f" {tuple(ranks)}."
    )

  def channel(number):
    kept = sparse.select(owners < number)
    return channels.Channel(kept, base.chain(kept, upload) if upload else kept)

  return channels.Tiers([channel(x) for x in ranks], of_client)


def products(pairs: Mapping[Path, Pair], scale: float = 1.0) -> dict[str, Any]:
  """Returns a tree of `{"delta": scale * a @ b}`, [..., inputs, outputs]."""
  return flax.traverse_util.unflatten_dict(
    {(*path, "delta"): scale * x.a @ x.b for path, x in pairs.items()}
  )


def stack(pair: Pair, weights: Float[Array, " clients"]) -> Pair:
  """Returns a pair whose product is the weighted sum of the clients' products.

  Args:
    pair: the factors of all clients, with a leading axis.
    weights: the weight of each client.

  Returns:
    The clients' factors side by side, of rank clients times rank.
  """
  clients = weights.shape[0]
  weights = weights.reshape(clients, *(1,) * (pair.b.ndim - 1))
  a = jnp.moveaxis(pair.a, 0, -2)
  b = jnp.moveaxis(pair.b * weights, 0, -3)
  return Pair(
    a.reshape(*a.shape[:-2], clients * a.shape[-1]),
    b.reshape(*b.shape[:-3], clients * b.shape[-2], b.shape[-1]),
  )


def stacks(
  trees: Mapping[str, Any], weights: Float[Array, " clients"]
) -> dict[Path, Pair]:
  """Returns the `stack` of every pair of trees [clients, ...]."""
  return {path: stack(x, weights) for path, x in pairs(trees).items()}


def truncate(pair: Pair, rank: int) -> Pair:
  """Returns the pair of rank `rank` whose product is nearest to the pair's.

  A truncated SVD gives `a = U`, `b = S V'`. The product, [inputs, outputs], is
  not formed: two QRs leave a core no larger than the pair's rank. The signs of
  singular vectors are chosen so that the entry of largest magnitude in each
  column of `a` is positive; otherwise they would depend on rounding.

  Args:
    pair: factors of any rank.
    rank: the rank of the result; factors are zero beyond the product's rank.
  """
  return one_by_one(lambda x: _truncate(x, rank), pair)


def _truncate(pair, rank):
  left, upper = jnp.linalg.qr(pair.a)
  right, lower = jnp.linalg.qr(pair.b.T)
  u, s, v = jnp.linalg.svd(upper @ lower.T, full_matrices=False)
  u, s, v = (left @ u)[:, :rank], s[:rank], (v @ right.T)[:rank]
  largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(u, largest, axis=0))
  u, v = u * sign, v * sign.T
  missing = (0, rank - s.size)
  return Pair(
    jnp.pad(u, [(0, 0), missing]),
    jnp.pad(s[:, None] * v, [missing, (0, 0)]),
  )


def one_by_one(fn: Callable[[Any], Any], stack: Any) -> Any:
  """Applies `fn` to the matrices of a stack, one after the other.

  On a CPU, a batched QR or SVD runs in a thread pool and waits for threads of
  the same pool. Two at once on two cores deadlock (jaxlib 0.10).

  Args:
    fn: a function of a tree of matrices.
    stack: a tree of arrays [..., m, n] with the same leading axes.
  """
  if jax.tree.leaves(stack)[0].ndim == 2:
    return fn(stack)
  return jax.lax.map(lambda x: one_by_one(fn, x), stack)


def redraw(pair: Pair, key: PRNGKeyArray) -> Pair:
  """Returns a pair of product zero: a new random `a`, and `b` of zeros."""
  bound = 1 / math.sqrt(pair.a.shape[-2])
  a = jax.random.uniform(
    key, pair.a.shape, pair.a.dtype, minval=-bound, maxval=bound
  )
  return Pair(a, jnp.zeros_like(pair.b))


def squared_norm(pair: Pair) -> Float[Array, ""]:
  """Returns the squared Frobenius norm of a product without forming it."""
  turn = lambda x: jnp.swapaxes(x, -1, -2)
  # tr((a b)' (a b)) = tr(a' a  b b').
  return jnp.sum((turn(pair.a) @ pair.a) * (pair.b @ turn(pair.b)))
