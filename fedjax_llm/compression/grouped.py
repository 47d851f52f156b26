"""Top-K by group: sparse messages in which each part has its own budget.

A Top-K of a whole vector spends most of its budget on the parts with the
largest entries. Here each part, such as one matrix or one LoRA factor, has its
own number of entries to keep. `top_k_groups` instead sends whole groups of
entries, such as the ranks of an adapter. The support then names groups, which
takes far fewer bytes than naming entries.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedjax_llm.compression import base, quantize, sparse, supports, wire


@wire.message(tag=12)
class Grouped:
  """The entries of `chosen` out of `groups`, and all entries without a group.

  `support` holds the numbers of the chosen groups. `size` is the vector's
  length.
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
        f"The message has {self.values.size} values for {self.chosen} groups"
        f" of a vector of {self.size}."
      )


def top_k_per_group(
  owners: Int[np.ndarray, " n"], density: float
) -> base.Compressor:
  """Keeps the entries of each group that are largest in magnitude.

  Use it for vectors whose parts differ in scale. LoRA's `b` starts at zero, so
  a single Top-K of `a` and `b` would at first keep almost none of its entries.

  Args:
    owners: the group of each entry.
    density: fraction of each group's entries to keep, in (0, 1]; at least one
      entry is kept.

  Returns:
    A `Compressor` whose payload is a `Sparse`.

  Raises:
    ValueError: if `density` is not in (0, 1]; from `encode`, if the vector and
      `owners` differ in length.
  """
  # Sorted by group, so that each group is a segment.
  order = np.argsort(owners, kind="stable")
  places = np.argsort(order)
  sizes = np.unique(owners, return_counts=True)[1].tolist()
  counts = counts_of_each(sizes, [density] * len(sizes))

  def mask_of(vector):
    hint = "That is the length of `owners`."
    base.require_size("top_k_per_group", vector, order.size, hint)
    return largest_of_each(jnp.asarray(vector)[order], sizes, counts)[places]

  return _sending(mask_of, sum(counts))


def top_k_per_segment(
  sizes: Sequence[int], densities: Sequence[float]
) -> base.Compressor:
  """Keeps the entries of each segment that are largest in magnitude.

  Args:
    sizes: the lengths of the segments, in order. Segments of length zero are
      skipped.
    densities: for each segment, the fraction of its entries to keep, in (0, 1];
      at least one entry is kept.

  Returns:
    A `Compressor` whose payload is a `Sparse`.

  Raises:
    ValueError: unless there is one density in (0, 1] for each segment; from
      `encode`, if the vector's length is not the sum of `sizes`.
  """
  counts = counts_of_each(sizes, densities)
  return _sending(lambda x: largest_of_each(x, sizes, counts), sum(counts))


def send_mask(mask: Bool[Array, " n"], count: int) -> base.Compressor:
  """Sends the entries in `mask`, and their positions.

  Args:
    mask: the entries to send; only the sender knows it.
    count: the number of entries in `mask`, at least one.

  Returns:
    A `Compressor` whose payload is a `Sparse`.
  """
  return _sending(lambda vector: mask, count)


def _sending(mask_of, count):
  """Sends the `count` entries of a vector that are in `mask_of(vector)`."""
  return base.stateless(
    encode=lambda vector, key: sparse.gather(vector, mask_of(vector), count),
    decode=sparse.scatter,
  )


def top_k_groups(
  owners: Int[np.ndarray, " n"], sizes: Sequence[int], counts: Sequence[int]
) -> base.Compressor:
  """Sends the groups with the largest norms, each group as a whole.

  A group competes only with the groups of its row, such as the ranks of one
  matrix. Entries without a group are always sent.

  Args:
    owners: the group of each entry, counted from 0, or -1 for none; known to
      both ends.
    sizes: the number of groups in each row. All groups of a row have the same
      number of entries, because the size of a message must not depend on data.
    counts: the number of groups to send from each row, at least one.

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
      "top_k_groups expected one count for each row, and groups of equal size"
      f" in each row, got sizes {[row.tolist() for row in rows]} and"
      f" {len(counts)} counts."
    )
  if not all(1 <= x <= size for x, size in zip(counts, sizes, strict=True)):
    raise ValueError(
      "top_k_groups expected from 1 to all groups of each row, got"
      f" {counts=} of {sizes=}."
    )
  sent = [x * row[0] for x, row in zip(counts, rows, strict=True)]
  count = int(sum(sent) + np.count_nonzero(owners < 0))

  def encode(vector, key):
    # Leaves out entries without a group.
    squares = jax.ops.segment_sum(vector**2, owners, groups)
    kept = largest_of_each(squares, sizes, counts)
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
  """Returns a mask of the entries that a payload of `top_k_groups` holds."""
  chosen = supports.unpack(payload.support, payload.groups, payload.chosen)
  kept = jnp.zeros(payload.groups, bool).at[chosen].set(True, mode="drop")
  return _members(kept, owners)


def counts_of_each(
  sizes: Sequence[int], densities: Sequence[float]
) -> tuple[int, ...]:
  """Returns the number of entries to keep from each segment.

  Raises:
    ValueError: unless there is one density in (0, 1] for each segment.
  """
  if len(sizes) != len(densities) or not all(0 < x <= 1 for x in densities):
    raise ValueError(
      "expected a density in (0, 1] for each segment, got"
      f" {len(sizes)} segments and {densities=}."
    )
  return tuple(
    min(size, sparse.count_kept(size, density))
    for size, density in zip(sizes, densities, strict=True)
  )


def largest_of_each(
  scores: Float[Array, " n"], sizes: Sequence[int], counts: Sequence[int]
) -> Bool[Array, " n"]:
  """Returns a mask of the entries largest in magnitude in each segment.

  Args:
    scores: the scores of all segments, one after the other.
    sizes: the lengths of the segments.
    counts: the number of entries to choose from each segment.

  Raises:
    ValueError: if the number of scores is not the sum of `sizes`.
  """
  hint = "That is the sum of the segments' lengths."
  base.require_size("Top-K by segment", scores, sum(sizes), hint)
  number = jnp.asarray(counts, jnp.int32)
  masks = [
    jax.vmap(sparse.top_k_mask)(grid, number[rows]).ravel()
    for rows, (grid,) in _runs(sizes, scores)
  ]
  return jnp.concatenate(masks)


def rescale_each(
  kept: Float[Array, " n"], whole: Float[Array, " n"], sizes: Sequence[int]
) -> Float[Array, " n"]:
  """Scales each segment of `kept` to the L1 norm of the same one in `whole`.

  Args:
    kept: the vector to scale. A segment of zeros stays as it is.
    whole: the vector whose segments have the wanted L1 norms.
    sizes: the lengths of the segments.
  """

  def scaled(kept, whole):
    left, total = (
      jnp.sum(jnp.abs(x), axis=1, keepdims=True) for x in (kept, whole)
    )
    return kept * jnp.where(left > 0, total / quantize.divisor(left), 1)

  runs = _runs(sizes, kept, whole)
  return jnp.concatenate([scaled(*grids).ravel() for _, grids in runs])


def _runs(sizes, *vectors):
  """Yields each run of segments of equal length, such as stacked layers.

  Yields the slice of the run's segments, and for each vector a grid with one
  row for each of these segments.
  """
  row = start = 0
  for size, run in itertools.groupby(sizes):
    rows = len(list(run))
    end = start + rows * size
    if size:
      grids = [x[start:end].reshape(rows, size) for x in vectors]
      yield slice(row, row + rows), grids
    row, start = row + rows, end


def _members(kept, owners):
  # Entries without a group form an extra last group, which is kept.
  owners = np.where(owners < 0, kept.size, owners)
  # The bounds were checked when the compressor was made.
  return jnp.append(kept, True).at[owners].get(mode="promise_in_bounds")
