"""LoRA factors: their products, stacks and truncations, wherever in a tree.

A pair is `a` [..., inputs, rank] and `b` [..., rank, outputs] of one module;
leading axes, such as stacked layers, agree. What else is trained, such as a
head, is in no pair.
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
  """All pairs of a tree, by the paths of their modules.

  Raises:
    ValueError: if there is none.
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
  """The tree with other pairs in it."""
  flat: Any = flax.traverse_util.flatten_dict(dict(tree))
  for path, pair in new.items():
    flat |= {(*path, "a"): pair.a, (*path, "b"): pair.b}
  return flax.traverse_util.unflatten_dict(flat)


def rank(tree: Mapping[str, Any]) -> int:
  """The largest rank of the pairs of a tree."""
  return max(pair.a.shape[-1] for pair in pairs(tree).values())


def entry_ranks(tree: Mapping[str, Any]) -> Any:
  """Which rank each entry of the flat vector belongs to, counted from 0.

  A rank is a column of `a` and a row of `b`.

  Returns:
    NumPy int [n]; -1 for what is in no pair.
  """
  none = jax.tree.map(lambda x: np.full(np.shape(x), -1), tree)

  def of(pair):
    number = np.arange(pair.a.shape[-1])
    in_b = np.broadcast_to(number[:, None], pair.b.shape)
    return Pair(np.broadcast_to(number, pair.a.shape), in_b)

  numbered = put(none, {path: of(x) for path, x in pairs(tree).items()})
  return np.concatenate([x.ravel() for x in jax.tree.leaves(numbered)])


def tiers(
  tree: Mapping[str, Any],
  ranks: Sequence[int],
  of_client: Callable[[Any], Any] | None = None,
  upload: base.Compressor | None = None,
) -> channels.Tiers:
  """Clients that receive and send the first ranks of all pairs, zeros above.

  What is in no pair travels whole. Ranks above need no freezing: where a column
  of `a` and a row of `b` are both zero, so are both gradients.

  Args:
    tree: what is trained, of which only shapes count.
    ranks: of each tier, in [1, rank of the pairs].
    of_client: numbers of clients -> numbers of their tiers; None for their
      remainders, as in the code of FLASC's authors.
    upload: what compresses the entries that are sent up; None for nothing.

  Raises:
    ValueError: if a rank is out of range, or there is none.
  """
  largest, owners, count = rank(tree), entry_ranks(tree), len(ranks)
  if not ranks or not all(1 <= x <= largest for x in ranks):
    raise ValueError(
      f"expected ranks of tiers in [1, {largest}], the rank of the adapter, got"
      f" {tuple(ranks)}."
    )

  def channel(number):
    kept = sparse.select(owners < number)
    return channels.Channel(kept, base.chain(kept, upload) if upload else kept)

  return channels.Tiers(
    tuple(channel(x) for x in ranks), of_client or (lambda x: x % count)
  )


def products(pairs: Mapping[Path, Pair], scale: float = 1.0) -> dict[str, Any]:
  """The tree of `{"delta": scale * a @ b}`, each [..., inputs, outputs]."""
  return flax.traverse_util.unflatten_dict(
    {(*path, "delta"): scale * x.a @ x.b for path, x in pairs.items()}
  )


def stack(pair: Pair, weights: Float[Array, " clients"]) -> Pair:
  """A pair whose product is the weighted sum of the clients' products.

  Args:
    pair: of all clients, a leading axis.
    weights: of each.

  Returns:
    Factors side by side, of the sum of the ranks.
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
  """The `stack` of every pair of trees [clients, ...]."""
  return {path: stack(x, weights) for path, x in pairs(trees).items()}


def truncate(pair: Pair, rank: int, *, balanced: bool = False) -> Pair:
  """The pair of `rank` whose product is nearest: a truncated SVD.

  The product itself, [inputs, outputs], is not formed: two QRs leave a core no
  larger than the pair's rank. Singular vectors have the sign with which the
  largest entry of a column of `a` is positive, so that the result does not hang
  on rounding.

  Args:
    pair: of any rank.
    rank: of the result, whose factors are zero beyond the rank of the product.
    balanced: split singular values evenly, `a = U sqrt(S)`, `b = sqrt(S) V'`;
      else `a = U`, `b = S V'`.
  """
  if pair.a.ndim > 2:
    # One by one. A QR of many, on a CPU, waits for threads of the pool that it
    # runs in: two of them at once, on two cores, wait for ever (jaxlib 0.10).
    return jax.lax.map(lambda x: truncate(x, rank, balanced=balanced), pair)
  left, upper = jnp.linalg.qr(pair.a)
  right, lower = jnp.linalg.qr(pair.b.T)
  u, s, v = jnp.linalg.svd(upper @ lower.T, full_matrices=False)
  u, s, v = (left @ u)[:, :rank], s[:rank], (v @ right.T)[:rank]
  largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(u, largest, axis=0))
  u, v = u * sign, v * sign.T
  if balanced:
    u, s = u * jnp.sqrt(s)[None], jnp.sqrt(s)
  missing = (0, rank - s.size)
  return Pair(
    jnp.pad(u, [(0, 0), missing]),
    jnp.pad(s[:, None] * v, [missing, (0, 0)]),
  )


def redraw(pair: Pair, key: PRNGKeyArray) -> Pair:
  """A pair of a product of zero: `a` random as at LoRA's start, `b` zero."""
  bound = 1 / math.sqrt(pair.a.shape[-2])
  a = jax.random.uniform(
    key, pair.a.shape, pair.a.dtype, minval=-bound, maxval=bound
  )
  return Pair(a, jnp.zeros_like(pair.b))


def squared_norm(pair: Pair) -> Float[Array, ""]:
  """The squared Frobenius norm of a product, which is not formed."""
  turn = lambda x: jnp.swapaxes(x, -1, -2)
  # tr((a b)' (a b)) = tr(a' a  b b').
  return jnp.sum((turn(pair.a) @ pair.a) * (pair.b @ turn(pair.b)))
