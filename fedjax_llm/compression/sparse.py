"""Sparse messages: some entries of a vector, and which they are."""

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
  """Entries of a vector of `size`, in order, and the packed support."""

  values: Any
  support: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if values and support are not of one length."""
    supports.check(self.support, self.size, self.values.size)


@wire.message(tag=2)
class Seeded:
  """Entries of a vector of `size`, at the indices that `seed` draws."""

  values: Any
  seed: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if the vector has fewer entries than were sent."""
    wire.require(self.seed, np.uint32, 2, "seed")
    if not 0 < self.values.size <= self.size:
      raise ValueError(
        f"The message has {self.values.size} values of a vector of {self.size}."
      )


# What makes a compressor of some entries, from the density of these.
TopK = Callable[[float], base.Compressor]


def top_k(density: float) -> base.Compressor:
  """Keeps the `int(density * n)` entries that are largest in magnitude.

  Of equal magnitudes the first is kept, at least one entry is sent, and a NaN
  counts as the largest of all: it is sent, never hidden.

  Args:
    density: fraction of the entries to keep, in (0, 1].

  Returns:
    A `Compressor` whose payload is a `Sparse`.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  _require_density("top_k", density)

  def encode(vector, key):
    del key  # Deterministic.
    count = _count(density, vector.size)
    indices = _where(top_k_mask(vector, count), count)
    support = supports.pack(indices, vector.size)
    return Sparse(_gather(vector, indices), support, vector.size)

  def decode(payload):
    size, count = payload.size, payload.values.size
    indices = supports.unpack(payload.support, size, count)
    return _scatter(payload.values, indices, size)

  return base.stateless(encode, decode)


def top_k_per_group(
  owners: Int[np.ndarray, " n"], density: float
) -> base.Compressor:
  """Keeps the largest entries of every group, its own `int(density * size)`.

  For vectors of parts that are not of one scale: LoRA's `b`, which starts at
  zero, has no place in one Top-K with `a` for long.

  Args:
    owners: the group of each entry, from 0; both ends know them.
    density: fraction of the entries of each group to keep, in (0, 1]; at least
      one.

  Returns:
    A `Compressor` whose payload is a `Sparse`.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  _require_density("top_k_per_group", density)
  owners = np.asarray(owners)
  groups = [owners == group for group in np.unique(owners)]
  counts = [_count(density, int(group.sum())) for group in groups]

  def encode(vector, key):
    del key  # Deterministic.
    masks = [
      _largest(jnp.where(group, _magnitudes(vector) + 1, 0), count)
      for group, count in zip(groups, counts, strict=True)
    ]
    indices = _where(jnp.stack(masks).any(axis=0), sum(counts))
    support = supports.pack(indices, vector.size)
    return Sparse(_gather(vector, indices), support, vector.size)

  return base.stateless(encode, top_k(density).decode)


def random_k(density: float, *, unbiased: bool = True) -> base.Compressor:
  """Keeps `int(density * n)` entries at random, the same for every magnitude.

  The support travels as the eight bytes of its seed.

  Args:
    density: fraction of the entries to keep, in (0, 1]; at least one is kept.
    unbiased: scale what is kept, so that the expectation of what arrives is the
      vector. Under `error_feedback` set this to False: there the scale would
      make the residual grow without bound.

  Returns:
    A `Compressor` whose payload is a `Seeded`.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  _require_density("random_k", density)

  def encode(vector, key):
    count = _count(density, vector.size)
    scale = vector.size / count if unbiased else 1
    seed = jax.random.bits(key, (2,), jnp.uint32)
    indices = _draw(seed, count, vector.size)
    return Seeded(_gather(vector, indices) * scale, seed, vector.size)

  def decode(payload):
    indices = _draw(payload.seed, payload.values.size, payload.size)
    return _scatter(payload.values, indices, payload.size)

  return base.stateless(encode, decode)


def select(
  mask: Bool[Array, " n"], count: int | None = None
) -> base.Compressor:
  """Sends the entries in `mask`, which both ends know and nobody sends.

  Args:
    mask: which entries to send; the decoded vector is zero elsewhere.
    count: how many entries to send, at least as many as `mask` holds. Needed
      only if `mask` is traced.

  Returns:
    A `Compressor` whose payload is a `Dense` of `count` values.

  Raises:
    ValueError: if `count` is missing or too small.
  """
  if isinstance(mask, jax.core.Tracer):
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
      raise ValueError(f"select got {count=} for {held.size} in its mask.")
    # Not left to XLA, which would be long at folding it.
    indices = np.pad(held, (0, count - held.size), constant_values=mask.size)

  def encode(vector, key):
    del key  # Deterministic.
    if vector.shape != mask.shape:
      raise ValueError(
        f"select expected a vector of shape {mask.shape}, as its mask has, got"
        f" {vector.shape}."
      )
    return base.Dense(_gather(vector, indices))

  def decode(payload):
    return _scatter(payload.values, indices, mask.size)

  return base.stateless(encode, decode)


def support(payload: Sparse) -> Bool[Array, " n"]:
  """Which entries of the vector a payload of `top_k` holds."""
  count = payload.values.size
  indices = supports.unpack(payload.support, payload.size, count)
  return jnp.zeros(payload.size, bool).at[indices].set(True, mode="drop")


def top_k_mask(
  vector: Float[Array, " n"], k: int | Int[Array, ""]
) -> Bool[Array, " n"]:
  """Which `k` entries are largest in magnitude, exactly as `lax.top_k` chooses.

  Several times faster than `lax.top_k` on a CPU (`benchmarks/top_k.py`), and
  `k` may be traced.

  Args:
    vector: of any floating type.
    k: how many entries, in [0, n].

  Returns:
    A mask with `k` entries set; of equal magnitudes the first ones.
  """
  return _largest(_magnitudes(vector), k)


def _magnitudes(vector: Float[Array, " n"]) -> UInt[Array, " n"]:
  """Even keys in the order of the magnitudes."""
  width = 8 * vector.dtype.itemsize
  bits = lax.bitcast_convert_type(vector, jnp.dtype(f"uint{width}"))
  # Without the sign bit, floats are in the order of their bit patterns: -0 is
  # 0, denormals are not flushed to it, and NaN is larger than infinity.
  return bits << 1


def _largest(
  keys: UInt[Array, " n"], k: int | Int[Array, ""]
) -> Bool[Array, " n"]:
  """Which `k` keys are largest; of equal keys the first ones."""
  width = 8 * keys.dtype.itemsize
  rows = max(1, min(64, keys.size // 64))
  columns = -(-keys.size // rows)
  # Zeros at the end change nothing: no threshold below is zero, and of keys
  # that are equal the last ones are the last to be chosen.
  grid = jnp.pad(keys, (0, rows * columns - keys.size)).reshape(rows, columns)

  def refine(i, threshold):
    shift = jnp.asarray(width - 2 - 2 * i, keys.dtype)
    steps = [jnp.asarray(step, keys.dtype) << shift for step in (1, 2, 3)]
    counts = _count_rows(*(grid >= threshold + step for step in steps))
    fits = sum((jnp.sum(count) >= k).astype(keys.dtype) for count in counts)
    return threshold + (fits << shift)

  # The largest key that k keys reach, two of its bits a pass.
  zero = jnp.zeros((), keys.dtype)
  threshold = lax.fori_loop(0, width // 2, refine, zero)

  # Of the keys that equal the threshold, only the first few are chosen. The
  # last of them is found in its row alone: a cumsum of all keys would be slow.
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
  """How many entries of each row are set, for all masks in one pass.

  XLA:CPU turns a large reduction of one operand into a slow cascade over a
  materialised operand. One of several operands, as here, becomes a fused loop.
  """
  return lax.reduce(
    tuple(mask.astype(jnp.int32) for mask in masks),
    (jnp.int32(0),) * len(masks),
    lambda total, row: tuple(a + b for a, b in zip(total, row, strict=True)),
    dimensions=(1,),
  )


def _draw(seed: UInt[Array, " 2"], count: int, size: int) -> Int[Array, " k"]:
  """The same `count` of `size` indices at both ends, in increasing order."""
  # Named and fixed, so that it is not a setting of either end.
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  # The largest of random keys, because a permutation would sort: equal keys,
  # and with them a preference, are as rare as size / 2**32.
  with jax.threefry_partitionable(True):
    keys = jax.random.bits(key, (size,), jnp.uint32)
  return _where(_largest(keys, count), count)


def _where(mask: Bool[Array, " n"], count: int) -> Int[Array, " count"]:
  return jnp.nonzero(mask, size=count, fill_value=mask.size)[0]


def _gather(
  vector: Float[Array, " n"], indices: Int[Array | np.ndarray, " count"]
) -> Float[Array, " count"]:
  return jnp.asarray(vector).at[indices].get(mode="fill", fill_value=0)


def _scatter(
  values: Float[Array, " count"],
  indices: Int[Array | np.ndarray, " count"],
  size: int,
) -> Float[Array, " n"]:
  return (
    jnp.zeros(size, values.dtype)
    .at[indices]
    .set(values, mode="drop", unique_indices=True, indices_are_sorted=True)
  )


def _count(density: float, size: int) -> int:
  return max(1, int(size * density))


def _require_density(name: str, density: float) -> None:
  if not 0 < density <= 1:
    raise ValueError(f"{name} expected density in (0, 1], got {density=}.")
