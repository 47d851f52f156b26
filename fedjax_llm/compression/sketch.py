"""Count sketches: messages that can be added up before they are read.

Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", 2002.
Each row of a table adds every entry, with a random sign, to one of its columns.
To read an entry is to take the median of what the rows say. As the sketch of a
sum is the sum of the sketches, many can be added up and read once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from fedjax_llm.compression import base, quantize, sparse, wire


@wire.message(tag=23)
class Sketch:
  """A table of `rows` rows, of a vector of `size`; `seed` draws its hashes."""

  values: Any
  rows: int
  seed: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the values are not rows of one length."""
    count = self.values.size
    if not (self.size > 0 and 0 < self.rows <= count) or count % self.rows:
      raise ValueError(
        f"The message has {count} values in {self.rows} rows, of a vector of"
        f" {self.size}."
      )


def count_sketch(
  rows: int, columns: int, *, density: float | None = None, seed: int = 0
) -> base.Compressor:
  """Sends a table of sums of entries with random signs.

  Encoding is linear, so that whoever has the sketches of several vectors has
  that of their sum. In every row the estimate of an entry is unbiased with a
  variance of at most the squared norm over `columns`; the chance that the
  median is off by more than sqrt(8 / columns) norms is at most 2^(-rows / 2).
  What is well above that is found, the rest drowns.

  Args:
    rows: of the table, positive; odd ones have a median of their own.
    columns: of the table, positive.
    density: of the Top-K that is taken of the estimates, in (0, 1]; None for
      all of them, of which most are errors if there are more entries than
      columns.
    seed: of the hashes, in [0, 2**31), the same for all that is added up.

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
  largest = base.identity() if density is None else sparse.top_k(density)

  def encode(vector, key):
    del key  # Deterministic: the hashes are common to all senders.
    vector = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    # One row after the other, which takes the memory of one.
    table = jax.lax.map(
      lambda row: _add(
        vector, columns, *_draw(seed, row, vector.size, columns)
      ),
      jnp.arange(rows),
    )
    return Sketch(table.ravel(), rows, seed, vector.size)

  def decode(payload):
    estimate = _median(estimates(payload))
    return base.transmit(
      largest, estimate, largest.init(estimate), jax.random.key(0)
    ).received

  return base.stateless(encode, decode)


def estimates(payload: Sketch) -> Float[Array, "rows n"]:
  """What each row of a sketch takes the vector for, without bias."""
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

  Two entries share a column with a chance of at most one in `columns`, and
  their signs are independent: this is all that the laws of the sketch ask for.
  """
  starts, signs = _draw(seed, row, size, columns)
  entry = jnp.arange(size)
  return (entry % columns + starts[entry // columns]) % columns, signs


def _draw(seed, row, size, columns):
  """Where in the row each block of `columns` entries starts, and all signs.

  A block is turned as a whole: its entries never meet, those of two blocks do
  with a chance of one in `columns`. Adding up then scatters nothing, and is the
  same to the bit wherever it is done again.
  """
  # Named and fixed, so that it is not a setting of either end.
  key = jax.random.key(seed, impl="threefry2x32")
  with jax.threefry_partitionable(True):
    start_key, sign_key = jax.random.split(jax.random.fold_in(key, row))
    starts = jax.random.bits(start_key, (-(-size // columns),), jnp.uint32)
    words = jax.random.bits(sign_key, (-(-size // 32),), jnp.uint32)
  bits = words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
  signs = 1 - 2 * bits.ravel()[:size].astype(jnp.int8)
  return (starts % columns).astype(jnp.int32), signs


def _add(vector, columns, starts, signs):
  """A row of the table: the sum of all blocks, turned, with their signs."""
  blocks = quantize.in_rows(vector * signs.astype(vector.dtype), columns)
  source = (jnp.arange(columns)[None] - starts[:, None]) % columns
  return jnp.take_along_axis(blocks, source, axis=1).sum(axis=0)


def _median(rows: Float[Array, "rows n"]) -> Float[Array, " n"]:
  # By bubbling, which is element by element: sorting along a short axis is not.
  ordered = list(rows)
  for last in range(len(ordered) - 1, 0, -1):
    for i in range(last):
      low, high = ordered[i : i + 2]
      ordered[i : i + 2] = jnp.minimum(low, high), jnp.maximum(low, high)
  return ordered[(len(ordered) - 1) // 2] / 2 + ordered[len(ordered) // 2] / 2
