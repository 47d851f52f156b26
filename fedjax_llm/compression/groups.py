"""Groups: messages of some groups of entries, each group whole or not at all.

Such as the ranks of an adapter, where a column of one factor is worth nothing
without its row of the other. Naming groups takes far less than naming entries.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fedjax_llm.compression import base, segments, sparse, supports, wire


@wire.message(tag=12)
class Grouped:
  """Entries of a vector of `size`: of `chosen` of `groups`, and of none.

  `support` packs which groups they are.
  """

  values: Any
  support: Any
  groups: int
  chosen: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the support does not name `chosen` groups."""
    supports.check(self.support, self.groups, self.chosen)
    if not self.chosen <= self.values.size <= self.size:
      raise ValueError(
        f"The message has {self.values.size} values, of {self.chosen} groups"
        f" of a vector of {self.size}."
      )


def top_k_groups(
  owners: Int[np.ndarray, " n"], sizes: Sequence[int], counts: Sequence[int]
) -> base.Compressor:
  """Keeps the groups that are largest in norm, a number of each row of groups.

  Entries of no group are always sent.

  Args:
    owners: the group of each entry, counted from 0, or -1 for none. Both ends
      know them.
    sizes: how many groups are in each row; those of a row are of one size,
      because that of a message must not depend on data.
    counts: how many groups of each row are sent, at least one.

  Returns:
    A `Compressor` whose payload is a `Grouped`.

  Raises:
    ValueError: if owners, sizes and counts do not fit each other.
  """
  groups, chosen = sum(sizes), sum(counts)
  owners = np.asarray(owners, np.int32)
  entries = np.bincount(owners[owners >= 0], minlength=groups)
  rows = np.split(entries, np.cumsum(sizes)[:-1])
  is_whole = len(entries) == groups and len(sizes) == len(counts)
  if not is_whole or any(np.ptp(row) for row in rows):
    raise ValueError(
      "expected the groups of a row to have one number of entries each, got"
      f" {[row.tolist() for row in rows]} for {len(counts)} counts."
    )
  if not all(1 <= x <= size for x, size in zip(counts, sizes, strict=True)):
    raise ValueError(
      f"expected from 1 to all groups of each row, got {counts=} of {sizes=}."
    )
  sent = [x * row[0] for x, row in zip(counts, rows, strict=True)]
  count = int(sum(sent) + np.count_nonzero(owners < 0))

  def encode(vector, key):
    squares = jax.ops.segment_sum(
      vector**2,
      _at_the_end(owners, groups),
      groups + 1,
      mode="promise_in_bounds",
    )
    kept = segments.largest_of_each(squares[:groups], sizes, counts)
    (indices,) = jnp.nonzero(kept, size=chosen)
    entries = sparse.select(_members(kept, owners), count)
    values = entries.encode(vector, (), key)[0].values
    packed = supports.pack(indices, groups)
    return Grouped(values, packed, groups, chosen, vector.size)

  def decode(payload):
    entries = sparse.select(support(payload, owners), count)
    return entries.decode(base.Dense(jnp.asarray(payload.values)))

  return base.stateless(encode, decode)


def support(
  payload: Grouped, owners: Int[np.ndarray, " n"]
) -> Bool[Array, " n"]:
  """Which entries of the vector a payload of `top_k_groups` holds."""
  chosen = supports.unpack(payload.support, payload.groups, payload.chosen)
  kept = jnp.zeros(payload.groups, bool).at[chosen].set(True, mode="drop")
  return _members(kept, owners)


def _members(kept, owners):
  owners = _at_the_end(owners, kept.size)
  # Checked when the compressor was made.
  return jnp.append(kept, True).at[owners].get(mode="promise_in_bounds")


def _at_the_end(owners, groups):
  """The owners, those of no group in one behind the others."""
  return np.where(owners < 0, groups, owners)
