"""Packs codes of a few bits into bytes, without gaps."""

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8, UInt32


def pack_bits(
  codes: Integer[Array, " n"], bits: int
) -> UInt8[Array, " nbytes"]:
  """Packs the low `bits` bits of every code, low bits first."""
  shifts = jnp.arange(bits, dtype=jnp.uint32)
  stream = (codes.astype(jnp.uint32)[:, None] >> shifts[None]) & 1
  return jnp.packbits(stream.ravel(), bitorder="little")


def unpack_bits(
  packed: UInt8[Array, " nbytes"], count: int, bits: int
) -> UInt32[Array, " count"]:
  """Returns the `count` codes of `bits` bits that `pack_bits` packed."""
  stream = jnp.unpackbits(packed, count=count * bits, bitorder="little")
  shifts = jnp.arange(bits, dtype=jnp.uint32)
  codes = stream.reshape(count, bits).astype(jnp.uint32) << shifts[None]
  return jnp.sum(codes, axis=1, dtype=jnp.uint32)


def pack_digits(
  codes: Integer[Array, " n"], base: int
) -> UInt8[Array, " nbytes"]:
  """Packs codes below `base` in the shorter of two ways.

  Either the codes are digits in base `base`, lowest first, and each byte holds
  as many as fit: five in base 3, for example. Or `pack_bits` packs each code.
  """
  count = _digits_in_a_byte(base)
  if not count:
    return pack_bits(codes, _bits_of(base))
  digits = jnp.pad(codes.astype(jnp.uint32), (0, -codes.size % count))
  places = base ** jnp.arange(count, dtype=jnp.uint32)
  packed = jnp.sum(digits.reshape(-1, count) * places[None], axis=1)
  return packed.astype(jnp.uint8)


def unpack_digits(
  packed: UInt8[Array, " nbytes"], count: int, base: int
) -> UInt32[Array, " count"]:
  """Returns the `count` codes below `base` that `pack_digits` packed."""
  in_a_byte = _digits_in_a_byte(base)
  if not in_a_byte:
    return unpack_bits(packed, count, _bits_of(base))
  places = base ** jnp.arange(in_a_byte, dtype=jnp.uint32)
  digits = jnp.asarray(packed, jnp.uint32)[:, None] // places[None] % base
  return digits.ravel()[:count]


def digits_nbytes(count: int, base: int) -> int:
  """Returns the length in bytes of `count` codes packed by `pack_digits`."""
  in_a_byte = _digits_in_a_byte(base)
  return (
    -(-count // in_a_byte) if in_a_byte else -(-count * _bits_of(base) // 8)
  )


def _bits_of(base: int) -> int:
  return (base - 1).bit_length()


def _digits_in_a_byte(base: int) -> int:
  """The number of digits that fit in a byte; 0 if `pack_bits` does as well."""
  count = 0
  while base ** (count + 1) <= 256:
    count += 1
  return count if count * _bits_of(base) > 8 else 0
