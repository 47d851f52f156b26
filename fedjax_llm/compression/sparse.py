"""Sparse messages: some entries of a vector, and their positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from fedjax_llm.compression import base, supports, wire


@wire.message(tag=1)
class Sparse:
  """Some entries of a vector of `size`, in order, and the packed support."""

  values: Any
  support: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if values and support differ in length."""
    supports.check(self.support, self.size, self.values.size)


@wire.message(tag=2)
class Seeded:
  """Some entries of a vector of `size`, at indices drawn from `seed`."""

  values: Any
  seed: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if there are more values than entries."""
    wire.require(self.seed, np.uint32, 2, "seed")
    if not 0 < self.values.size <= self.size:
      raise ValueError(
        f"The message has {self.values.size} values of a vector of {self.size}."
      )


@wire.message(tag=24)
class Masked(base.Dense):
  """The entries in a mask that both ends know; it may change every time."""


# A function from a density to the compressor that keeps that fraction.
TopK = Callable[[float], base.Compressor]


def top_k(density: float) -> base.Compressor:
  """Keeps the `int(density * n)` entries that are largest in magnitude.

  At least one entry is sent. Of equal magnitudes, the first is kept. A NaN
  counts as the largest magnitude, so it is kept and not hidden.

  Args:
    density: fraction of the entries to keep, in (0, 1].

  Returns:
    A `Compressor` whose payload is a `Sparse`.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  require_density("top_k", density)

  def encode(vector, key):
    del key  # Deterministic.
    count = count_kept(vector.size, density)
    return gather(vector, top_k_mask(vector, count), count)

  return base.stateless(encode, scatter)


def random_k(density: float, *, unbiased: bool = True) -> base.Compressor:
  """Keeps `int(density * n)` random entries, whatever their magnitude.

  Only the support's seed is sent, in eight bytes.

  Args:
    density: fraction of the entries to keep, in (0, 1]; at least one is kept.
    unbiased: whether to scale the values, so that the expectation of what
      arrives is the vector. Set it to False with `error_feedback`, where the
      scale would make the residual grow without bound.

  Returns:
    A `Compressor` whose payload is a `Seeded`.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  require_density("random_k", density)

  def encode(vector, key):
    count = count_kept(vector.size, density)
    scale = vector.size / count if unbiased else 1
    seed = jax.random.bits(key, (2,), jnp.uint32)
    indices = _draw(seed, count, vector.size)
    return Seeded(_take(vector, indices) * scale, seed, vector.size)

  def decode(payload):
    indices = _draw(payload.seed, payload.values.size, payload.size)
    return _put(payload.values, indices, payload.size)

  return base.stateless(encode, decode)


def select(
  mask: Bool[Array, " n"], count: int | None = None
) -> base.Compressor:
  """Sends the entries in `mask`; both ends know it, so it is not sent.

  Args:
    mask: the entries to send. The decoded vector is zero elsewhere.
    count: the number of values to send, at least the number of entries in
      `mask`. Needed only if `mask` is traced.

  Returns:
    A `Compressor` whose payload has `count` values. It is a `Dense`, or a
    `Masked` if `mask` is traced, because it may then change between messages.

  Raises:
    ValueError: if `count` is missing or too small.
  """
  is_traced = isinstance(mask, jax.core.Tracer)
  if is_traced:
    if count is None:
      raise ValueError(
        "select needs `count`, the number of entries to send, because `mask` is"
        " traced and the size of a message must not depend on data."
      )
    indices = _where(mask, count)
  else:
    held = np.flatnonzero(mask)
    count = held.size if count is None else count
    if count < held.size:
      raise ValueError(
        f"select expected a count of at least {held.size}, the entries in its"
        f" mask, got {count=}."
      )
    # On the host, because XLA takes long to fold this constant.
    indices = np.pad(held, (0, count - held.size), constant_values=mask.size)

  def encode(vector, key):
    del key  # Deterministic.
    base.require_size("select", vector, mask.size, "Its mask has this size.")
    values = _take(vector, indices)
    return Masked(values) if is_traced else base.Dense(values)

  def decode(payload):
    return _put(payload.values, indices, mask.size)

  return base.stateless(encode, decode)


def gather(
  vector: Float[Array, " n"], mask: Bool[Array, " n"], count: int
) -> Sparse:
  """Packs the `count` entries of `vector` that are in `mask`."""
  indices = _where(mask, count)
  support = supports.pack(indices, vector.size)
  return Sparse(_take(vector, indices), support, vector.size)


def scatter(payload: Sparse) -> Float[Array, " n"]:
  """Returns the vector with the payload's values, and zeros elsewhere."""
  return _put(payload.values, _indices(payload), payload.size)


def support(payload: Sparse) -> Bool[Array, " n"]:
  """Returns a mask of the entries that a payload of `top_k` holds."""
  indices = _indices(payload)
  return jnp.zeros(payload.size, bool).at[indices].set(True, mode="drop")


def _indices(payload: Sparse) -> Int[Array, " count"]:
  return supports.unpack(payload.support, payload.size, payload.values.size)


def count_kept(size: int, density: float) -> int:
  """The number of entries that a Top-K of `density` keeps: at least one."""
  return max(1, int(size * density))


def top_k_mask(
  vector: Float[Array, " n"], k: int | Int[Array, ""]
) -> Bool[Array, " n"]:
  """Marks the `k` entries largest in magnitude, the same ones as `lax.top_k`.

  On a CPU it is several times faster than `lax.top_k` (`benchmarks/top_k.py`).

  Args:
    vector: a vector of any floating type.
    k: the number of entries, in [0, n]; it may be traced.

  Returns:
    A mask with `k` entries set. Of equal magnitudes, the first are chosen.
  """
  return _largest(_magnitudes(vector), k)


def _magnitudes(vector: Float[Array, " n"]) -> UInt[Array, " n"]:
  """Returns unsigned integers that sort like the magnitudes."""
  width = 8 * vector.dtype.itemsize
  bits = lax.bitcast_convert_type(vector, jnp.dtype(f"uint{width}"))
  # Without the sign bit, floats sort like their bit patterns: -0 equals 0,
  # denormals are not flushed to 0, and NaN is larger than infinity.
  return bits << 1


def _largest(
  keys: UInt[Array, " n"], k: int | Int[Array, ""]
) -> Bool[Array, " n"]:
  """Marks the `k` largest keys. Of equal keys, the first are chosen."""
  width = 8 * keys.dtype.itemsize
  rows = max(1, min(64, keys.size // 64))
  columns = -(-keys.size // rows)
  # Zeros at the end change nothing: `refine` tests no threshold of zero, and
  # the last of equal keys are the last to be chosen.
  grid = jnp.pad(keys, (0, rows * columns - keys.size)).reshape(rows, columns)

  def refine(i, threshold):
    shift = jnp.asarray(width - 2 - 2 * i, keys.dtype)
    steps = [jnp.asarray(step, keys.dtype) << shift for step in (1, 2, 3)]
    counts = _count_rows(*(grid >= threshold + step for step in steps))
    fits = sum((jnp.sum(count) >= k).astype(keys.dtype) for count in counts)
    return threshold + (fits << shift)

  # Finds the largest threshold that k keys reach, two bits in each pass.
  zero = jnp.zeros((), keys.dtype)
  threshold = lax.fori_loop(0, width // 2, refine, zero)

  # Only the first few of the keys that equal the threshold are chosen. The last
  # of these is searched in its row only: a cumsum of all keys would be slow.
  above, ties = _count_rows(grid > threshold, grid == threshold)
  missing = k - jnp.sum(above)
  total = jnp.cumsum(ties)
  row = jnp.sum(total < missing)
  missing_in_row = missing - (total[row] - ties[row])
  in_row = jnp.cumsum(grid[row] == threshold)
  last = row * columns + jnp.sum(in_row < missing_in_row)
  is_chosen_tie = (keys == threshold) & (jnp.arange(keys.size) <= last)
  return (keys > threshold) | is_chosen_tie


def _count_rows(*masks: Bool[Array, "r c"]) -> tuple[Int[Array, " r"], ...]:
  """Counts the entries set in each row, for all masks in one pass.

  XLA:CPU is slow at large reductions of one operand, but it fuses this one.
  """
  return lax.reduce(
    tuple(mask.astype(jnp.int32) for mask in masks),
    (jnp.int32(0),) * len(masks),
    lambda total, row: tuple(a + b for a, b in zip(total, row, strict=True)),
    dimensions=(1,),
  )


def _draw(seed: UInt[Array, " 2"], count: int, size: int) -> Int[Array, " k"]:
  """Draws `count` of `size` indices, sorted, the same ones at both ends."""
  # Fixed here, so that JAX settings do not matter.
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  # Takes the largest of random keys: a permutation would need a sort. Equal
  # keys favour the first, but their probability is only about size / 2**32.
  with jax.threefry_partitionable(True):
    keys = jax.random.bits(key, (size,), jnp.uint32)
  return _where(_largest(keys, count), count)


def _where(mask: Bool[Array, " n"], count: int) -> Int[Array, " count"]:
  return jnp.nonzero(mask, size=count, fill_value=mask.size)[0]


def _take(vector, indices):
  return jnp.asarray(vector).at[indices].get(mode="fill", fill_value=0)


def _put(values, indices, size):
  return (
    jnp.zeros(size, values.dtype)
    .at[indices]
    .set(values, mode="drop", unique_indices=True, indices_are_sorted=True)
  )


def require_density(name: str, density: float) -> None:
  """Raises a ValueError unless `density` is in (0, 1]."""
  if not 0 < density <= 1:
    raise ValueError(f"{name} expected density in (0, 1], got {density=}.")
