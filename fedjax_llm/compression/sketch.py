"""Count sketches: messages that can be added up before they are decoded.

Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", 2002.
In each row of a table, every entry is added, with a random sign, to one column.
Each row gives an estimate of every entry; decoding takes the median over rows.
The sketch of a sum is the sum of the sketches, so a sum is decoded only once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from fedjax_llm.compression import base, quantize, sparse, wire


@wire.message(tag=23)
class Sketch:
  """A table of `rows` rows for `size` entries; `seed` determines the hashes."""

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

  Encoding is linear: the sketch of a sum is the sum of the sketches. Each row's
  estimate of an entry is unbiased, and its variance is at most the squared norm
  divided by `columns`. The median's error exceeds sqrt(8 / columns) norms with
  probability at most 2^(-rows / 2). Entries well above this error are found;
  the others are lost in the noise.

  Args:
    rows: the number of rows of the table, positive. For an odd number the
      median is one of the estimates.
    columns: the number of columns of the table, positive.
    density: fraction of the estimates to keep, in (0, 1]; the largest are kept.
      None keeps all; most are noise if there are more entries than columns.
    seed: the seed of the hashes, in [0, 2**31). Sketches can be added up only
      if they have the same seed.

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
    del key  # Deterministic: all senders use the same hashes.
    vector = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    # One row at a time, to save memory.
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
  """Returns each row's unbiased estimate of the vector."""
  table = jnp.asarray(payload.values).reshape(payload.rows, -1)

  def look_up(row):
    number, cells = row
    places, signs = hashes(payload.seed, number, payload.size, cells.size)
    return cells[places] * signs.astype(cells.dtype)

  return jax.lax.map(look_up, (jnp.arange(payload.rows), table))


def hashes(
  seed: int, row: int | Int[Array, ""], size: int, columns: int
) -> tuple[Int[Array, " n"], Int8[Array, " n"]]:
  """Returns the column and the sign of every entry in a row of the table.

  Two entries share a column with probability at most 1 / columns, and their
  signs are independent. The bounds of `count_sketch` need no more.
  """
  starts, signs = _draw(seed, row, size, columns)
  entry = jnp.arange(size)
  return (entry % columns + starts[entry // columns]) % columns, signs


def _draw(seed, row, size, columns):
  """Draws the column where each block of `columns` entries starts, and signs.

  A block is rotated as a whole, so its own entries never share a column. Two
  entries of different blocks share one with probability 1 / columns. The sum
  then needs no scatter, and has the same bits on every device.
  """
  # Fixed here, so that both ends draw the same whatever their JAX settings.
  key = jax.random.key(seed, impl="threefry2x32")
  with jax.threefry_partitionable(True):
    start_key, sign_key = jax.random.split(jax.random.fold_in(key, row))
    starts = jax.random.bits(start_key, (-(-size // columns),), jnp.uint32)
    words = jax.random.bits(sign_key, (-(-size // 32),), jnp.uint32)
  bits = words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
  signs = 1 - 2 * bits.ravel()[:size].astype(jnp.int8)
  return (starts % columns).astype(jnp.int32), signs


def _add(vector, columns, starts, signs):
  """Computes a row of the table: the sum of all signed, rotated blocks."""
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
