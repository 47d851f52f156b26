"""Count sketches: messages that can be added up before they are decoded.

Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", 2002.
Each row of a table adds every entry, with a random sign, to one of its columns.
Every row gives an estimate of an entry, and decoding takes their median. The
sketch of a sum is the sum of the sketches, so a sum needs one decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from fedjax_llm.compression import base, quantize, sparse, wire


@wire.message(tag=23)
class Sketch:
  """A table of `rows` rows for a vector of `size`; `seed` draws its hashes."""

  values: Any
  rows: int
  seed: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the rows differ in length."""
    count = self.values.size
    if not (self.size > 0 and 0 < self.rows <= count) or count % self.rows:
      raise ValueError(
        f"The message has {count} values in {self.rows} rows, for a vector of"
        f" {self.size}."
      )


def count_sketch(
  rows: int, columns: int, *, density: float | None = None, seed: int = 0
) -> base.Compressor:
  """Sends a table of sums of entries with random signs.

  Encoding is linear: the sketch of a sum is the sum of the sketches. In every
  row the estimate of an entry is unbiased, with a variance of at most the
  squared norm over `columns`. The median is off by more than sqrt(8 / columns)
  norms with probability at most 2^(-rows / 2). Entries well above that are
  found; the others are lost in the noise.

  Args:
    rows: the number of rows of the table, positive. For an odd number the
      median is one of the estimates.
    columns: the number of columns of the table, positive.
    density: fraction of the estimates to keep, the largest ones, in (0, 1].
      None for all of them; most are noise if there are more entries than
      columns.
    seed: the seed of the hashes, in [0, 2**31). Sketches that are added up have
      one seed.

  Returns:
    A `Compressor` whose payload is a `Sketch`.

  Raises:
    ValueError: if an argument is out of range.
  """
  if not (rows > 0 and columns > 0 and 0 <= seed < 2**31):
    raise ValueError(
      "count_sketch expected rows > 0, columns > 0 and seed in [0, 2**31), got"
      f" {rows=}, {columns=}, {seed=}."
    )
  if density is not None:
    sparse.require_density("count_sketch", density)

  def encode(vector, key):
    del key  # Deterministic: the hashes are common to all senders.
    vector = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    # One row after the other, to need the memory of one.
    table = jax.lax.map(
      lambda row: _add(
        vector, columns, *_draw(seed, row, vector.size, columns)
      ),
      jnp.arange(rows),
    )
    return Sketch(table.ravel(), rows, seed, vector.size)

  def decode(payload):
    estimate = _median(estimates(payload))
    if density is None:
      return estimate
    count = sparse.count_kept(estimate.size, density)
    return jnp.where(sparse.top_k_mask(estimate, count), estimate, 0)

  return base.stateless(encode, decode)


def estimates(payload: Sketch) -> Float[Array, "rows n"]:
  """The unbiased estimate of the vector by each row of a sketch."""
  table = jnp.asarray(payload.values).reshape(payload.rows, -1)

  def look_up(row):
    number, cells = row
    places, signs = hashes(payload.seed, number, payload.size, cells.size)
    return cells[places] * signs.astype(cells.dtype)

  return jax.lax.map(look_up, (jnp.arange(payload.rows), table))


def hashes(
  seed: int, row: int | Int[Array, ""], size: int, columns: int
) -> tuple[Int[Array, " n"], Int8[Array, " n"]]:
  """The column and the sign of every entry in a row of the table.

  Two entries share a column with probability at most 1 / columns, and their
  signs are independent. The bounds of `count_sketch` need no more.
  """
  starts, signs = _draw(seed, row, size, columns)
  entry = jnp.arange(size)
  return (entry % columns + starts[entry // columns]) % columns, signs


def _draw(seed, row, size, columns):
  """The column where each block of `columns` entries starts, and all signs.

  A block is rotated as a whole, so its own entries never share a column. Two
  entries of different blocks do with probability 1 / columns. The sum then
  needs no scatter, and has the same bits everywhere.
  """
  # Fixed here, so that neither end's settings matter.
  key = jax.random.key(seed, impl="threefry2x32")
  with jax.threefry_partitionable(True):
    start_key, sign_key = jax.random.split(jax.random.fold_in(key, row))
    starts = jax.random.bits(start_key, (-(-size // columns),), jnp.uint32)
    words = jax.random.bits(sign_key, (-(-size // 32),), jnp.uint32)
  bits = words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
  signs = 1 - 2 * bits.ravel()[:size].astype(jnp.int8)
  return (starts % columns).astype(jnp.int32), signs


def _add(vector, columns, starts, signs):
  """A row of the table: the sum of all rotated blocks, with their signs."""
  blocks = quantize.in_rows(vector * signs.astype(vector.dtype), columns)
  source = (jnp.arange(columns)[None] - starts[:, None]) % columns
  return jnp.take_along_axis(blocks, source, axis=1).sum(axis=0)


def _median(rows: Float[Array, "rows n"]) -> Float[Array, " n"]:
  # Bubble sort works element by element, unlike a sort along a short axis.
  ordered = list(rows)
  for last in range(len(ordered) - 1, 0, -1):
    for i in range(last):
      low, high = ordered[i : i + 2]
      ordered[i : i + 2] = jnp.minimum(low, high), jnp.maximum(low, high)
  return ordered[(len(ordered) - 1) // 2] / 2 + ordered[len(ordered) // 2] / 2
