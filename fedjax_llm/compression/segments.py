"""Segments: sparse messages that keep a share of each part of a vector.

A Top-K of the whole vector gives most of its budget to the parts that are
largest; here each part, such as one matrix of a model, has a budget of its own.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedjax_llm.compression import base, sparse, supports


def top_k_per_segment(
  sizes: Sequence[int], densities: Sequence[float]
) -> base.Compressor:
  """Keeps of each segment the entries that are largest in magnitude.

  Args:
    sizes: of the segments, which lie one after the other; one without entries
      takes no part.
    densities: of a segment of n entries `int(density * n)` are sent, but at
      least one.

  Returns:
    A `Compressor` whose payload is a `Sparse` of the whole vector.

  Raises:
    ValueError: if a density is not in (0, 1] or there are more of one than of
      the other; from `encode`, if the vector is not as long as its segments.
  """
  counts = counts_of_each(sizes, densities)

  def encode(vector, key):
    mask = largest_of_each(vector, sizes, counts)
    return send_mask(mask, sum(counts)).encode(vector, (), key)[0]

  return base.stateless(encode, sparse.top_k(1.0).decode)


def send_mask(mask: Bool[Array, " n"], count: int) -> base.Compressor:
  """Sends the entries in `mask`, and which they are.

  Args:
    mask: which entries to send, known to the sender alone.
    count: how many they are, at least one.

  Returns:
    A `Compressor` whose payload is a `Sparse`.
  """

  def encode(vector, key):
    del key  # Deterministic.
    indices = jnp.nonzero(mask, size=count, fill_value=mask.size)[0]
    values = jnp.asarray(vector).at[indices].get(mode="fill", fill_value=0)
    return sparse.Sparse(values, supports.pack(indices, mask.size), mask.size)

  return base.stateless(encode, sparse.top_k(1.0).decode)


def counts_of_each(
  sizes: Sequence[int], densities: Sequence[float]
) -> tuple[int, ...]:
  """How many entries of each segment are kept.

  Raises:
    ValueError: as `top_k_per_segment`.
  """
  if len(sizes) != len(densities) or not all(0 < x <= 1 for x in densities):
    raise ValueError(
      "expected a density in (0, 1] for each segment, got"
      f" {len(sizes)} segments and {densities=}."
    )
  return tuple(
    min(size, max(1, int(density * size)))
    for size, density in zip(sizes, densities, strict=True)
  )


def largest_of_each(
  scores: Float[Array, " n"], sizes: Sequence[int], counts: Sequence[int]
) -> Bool[Array, " n"]:
  """Which entries of each segment have the largest magnitudes.

  Args:
    scores: of all segments, one after the other.
    sizes: of the segments.
    counts: how many entries to choose of each.

  Raises:
    ValueError: if there are more or fewer scores than the segments have.
  """
  if scores.shape != (sum(sizes),):
    raise ValueError(
      f"expected {sum(sizes)} scores, as many as the segments have entries,"
      f" got {scores.shape}."
    )
  number = jnp.asarray(counts, jnp.int32)
  masks = [
    jax.vmap(sparse.top_k_mask)(grid, number[rows]).ravel()
    for rows, (grid,) in _runs(sizes, scores)
  ]
  return jnp.concatenate(masks)


def rescale_each(
  kept: Float[Array, " n"], whole: Float[Array, " n"], sizes: Sequence[int]
) -> Float[Array, " n"]:
  """Scales each segment to the sum of magnitudes that it has in `whole`.

  Args:
    kept: what is scaled; a segment of zeros stays as it is.
    whole: what it is scaled to.
    sizes: of the segments.
  """

  def scaled(kept, whole):
    left, total = (
      jnp.sum(jnp.abs(x), axis=1, keepdims=True) for x in (kept, whole)
    )
    return kept * jnp.where(left > 0, total / jnp.where(left > 0, left, 1), 1)

  runs = _runs(sizes, kept, whole)
  return jnp.concatenate([scaled(*grids).ravel() for _, grids in runs])


def _runs(sizes, *vectors):
  """Equal segments that follow each other, such as stacked layers, as rows.

  Yields which segments they are, and of each vector the grid of their entries.
  """
  row = start = 0
  for size, run in itertools.groupby(sizes):
    rows = len(list(run))
    end = start + rows * size
    if size:
      grids = [x[start:end].reshape(rows, size) for x in vectors]
      yield slice(row, row + rows), grids
    row, start = row + rows, end
