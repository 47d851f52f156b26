"""Supports: the positions of a sparse message's values, in few bytes.

A support is one uint8 array in the shortest of three forms: empty, if all
entries are sent; a bitmap of `size` bits; or Elias-Fano (Elias, 1974), about
`count * (2 + log2(size / count))` bits. Both ends compute the form from `size`
and `count`, which are static: this choice is part of the format.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from fedjax_llm.compression import packing, wire


def nbytes(size: int, count: int) -> int:
  """Returns the length in bytes of a support of `count` of `size` entries."""
  if count == size:
    return 0
  return min(-(-size // 8), sum(_elias_fano_nbytes(size, count)))


def pack(indices: Int[Array, " count"], size: int) -> UInt8[Array, " nbytes"]:
  """Packs the indices of some entries of a vector.

  Args:
    indices: at least one index, in increasing order, without repetition.
    size: the length of the vector, below 2**31.

  Returns:
    `nbytes(size, len(indices))` bytes.
  """
  (count,) = indices.shape
  if count == size:
    return jnp.zeros(0, jnp.uint8)
  if _is_bitmap(size, count):
    return packing.pack_bits(_mark(indices, size), 1)
  # The high parts of sorted indices grow slowly, so they are sent in unary: the
  # i-th index sets bit high + i. The low parts are sent as they are.
  low_bits = _low_bits(size, count)
  high = (indices >> low_bits) + jnp.arange(count, dtype=indices.dtype)
  high = packing.pack_bits(_mark(high, _high_size(size, count)), 1)
  return jnp.concatenate([high, packing.pack_bits(indices, low_bits)])


def unpack(
  packed: UInt8[Array, " nbytes"], size: int, count: int
) -> Int[Array, " count"]:
  """Returns the indices that `pack` packed."""
  if count == size:
    return jnp.arange(size, dtype=jnp.int32)
  if _is_bitmap(size, count):
    return _marked(packing.unpack_bits(packed, size, 1), count)
  low_bits, high_size = _low_bits(size, count), _high_size(size, count)
  split, _ = _elias_fano_nbytes(size, count)
  high = _marked(packing.unpack_bits(packed[:split], high_size, 1), count)
  high = high - jnp.arange(count, dtype=jnp.int32)
  low = packing.unpack_bits(packed[split:], count, low_bits).astype(jnp.int32)
  return (high << low_bits) | low


def check(packed: np.ndarray, size: int, count: int) -> None:
  """Raises a ValueError unless `packed` names `count` of `size` entries."""
  if not 0 < count <= size:
    raise ValueError(f"The message has {count} values of a vector of {size}.")
  wire.require(packed, np.uint8, nbytes(size, count), "support")
  if count == size:
    return
  marks = np.unpackbits(packed, bitorder="little")
  split = 8 * _elias_fano_nbytes(size, count)[0]
  indices = np.flatnonzero(marks if _is_bitmap(size, count) else marks[:split])
  if indices.size == count and not _is_bitmap(size, count):
    low_bits = _low_bits(size, count)
    low = marks[split:][: count * low_bits].reshape(count, low_bits)
    high = indices - np.arange(count)
    indices = (high << low_bits) + low @ (1 << np.arange(low_bits))
  if (
    indices.size != count
    or indices[-1] >= size
    or np.any(indices[1:] <= indices[:-1])
  ):
    raise ValueError(
      f"The message's support does not name {count} of {size} entries."
    )


def _is_bitmap(size: int, count: int) -> bool:
  return nbytes(size, count) == -(-size // 8)


def _low_bits(size: int, count: int) -> int:
  """Returns log2(size / count), rounded down."""
  return (size // count).bit_length() - 1


def _high_size(size: int, count: int) -> int:
  return count + ((size - 1) >> _low_bits(size, count))


def _elias_fano_nbytes(size: int, count: int) -> tuple[int, int]:
  low_size = count * _low_bits(size, count)
  return -(-_high_size(size, count) // 8), -(-low_size // 8)


def _mark(indices: Int[Array, " count"], size: int) -> UInt8[Array, " size"]:
  marks = jnp.zeros(size, jnp.uint8)
  return marks.at[indices].set(1, unique_indices=True, indices_are_sorted=True)


def _marked(marks: Array, count: int) -> Int[Array, " count"]:
  # A forged message may have too few marks; `check` refuses it.
  indices = jnp.nonzero(marks, size=count, fill_value=marks.size)[0]
  return indices.astype(jnp.int32)
