"""Quantizers: every entry of a vector, each in fewer bits."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fedjax_llm.compression import base, wire


@wire.message(tag=3)
class Uniform:
  """Codes of `bits` bits, and the scale of each `block` of them."""

  codes: Any
  scales: Any
  bits: int
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if codes and scales are not of one vector."""
    _check(self, np.float32)


@wire.message(tag=8)
class Nearest:
  """Codes of `bits` bits, and the bfloat16 scale of each `block` of them."""

  codes: Any
  scales: Any
  bits: int
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if codes and scales are not of one vector."""
    _check(self, jnp.bfloat16)


def _check(message: Uniform | Nearest, scales: DTypeLike) -> None:
  """Raises a ValueError if codes and scales are not of one vector."""
  size, bits, block = message.size, message.bits, message.block
  if not (1 <= bits <= 8 and block > 0):
    raise ValueError(
      f"The message has codes of {bits} bits in blocks of {block}."
    )
  wire.require(message.codes, np.uint8, -(-size * bits // 8), "codes")
  wire.require(message.scales, scales, -(-size // block), "scales")


def cast(dtype: DTypeLike) -> base.Compressor:
  """Rounds every entry to the nearest of a shorter floating type.

  Args:
    dtype: bfloat16 or float16. What is too large for float16 becomes infinite,
      which `wire.dumps` refuses to send.

  Returns:
    A `Compressor` whose payload is a `Dense`.

  Raises:
    ValueError: if `dtype` is another one.
  """
  if dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f"cast expected bfloat16 or float16, got {dtype=}.")
  return base.stateless(
    encode=lambda vector, key: base.Dense(vector.astype(dtype)),
    decode=lambda payload: jnp.asarray(payload.values),
  )


def uniform(bits: int, *, block: int = 256) -> base.Compressor:
  """Rounds entries at random, so that the expectation is exact.

  The 2**bits levels are evenly spaced from -scale to scale, where scale is the
  largest magnitude of a block; an entry goes to one of its two neighbours
  (QSGD, Alistarh et al., 2017, https://arxiv.org/abs/1610.02132, with the
  largest magnitude for the norm).

  Args:
    bits: of each entry, in [1, 8].
    block: the number of entries that share a float32 scale.

  Returns:
    A `Compressor` whose payload is a `Uniform`.

  Raises:
    ValueError: if `bits` is not in [1, 8] or `block` is not positive.
  """
  if not (1 <= bits <= 8 and block > 0):
    raise ValueError(
      f"uniform expected bits in [1, 8] and block > 0, got {bits=}, {block=}."
    )

  def encode(vector, key):
    vector = vector.astype(jnp.float32)
    blocks = _blocks(vector, block)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    # Any divisor will do for a block of zeros: its levels are all zero.
    divisors = jnp.where(scales > 0, scales, 1)[:, None]
    # Clipped, because some devices divide inexactly, and codes would wrap.
    levels = (jnp.clip(blocks / divisors, -1, 1) + 1) * ((2**bits - 1) / 2)
    below = jnp.floor(levels)
    chance = jax.random.uniform(key, blocks.shape, jnp.float32)
    codes = below.astype(jnp.uint8) + (chance < levels - below)
    packed = wire.pack_bits(codes.ravel()[: vector.size], bits)
    return Uniform(packed, scales, bits, block, vector.size)

  def decode(payload):
    codes = wire.unpack_bits(payload.codes, payload.size, payload.bits)
    # A table, because a division would round differently by device.
    levels = jnp.asarray(np.linspace(-1, 1, 2**payload.bits, dtype=np.float32))
    blocks = _blocks(levels[codes], payload.block)
    return (blocks * payload.scales[:, None]).ravel()[: payload.size]

  return base.stateless(encode, decode)


def lloyd_max(bits: int, *, block: int = 256) -> base.Compressor:
  """Rounds entries to the nearest of the levels that suit a Gaussian best.

  The levels are Lloyd's and Max's ("Quantizing for minimum distortion", 1960;
  Lloyd, 1982), those of least squared error for a normal variable, in units of
  a block's root mean square; then each block is scaled so that its own squared
  error is least. The error is far below that of `uniform`, above all at one and
  two bits, but it is not zero on average: send updates by it under
  `error_feedback`.

  Args:
    bits: of each entry, in [1, 6].
    block: the number of entries that share a bfloat16 scale.

  Returns:
    A `Compressor` whose payload is a `Nearest`.

  Raises:
    ValueError: if `bits` is not in [1, 6] or `block` is not positive.
  """
  if not (1 <= bits <= 6 and block > 0):
    raise ValueError(
      f"lloyd_max expected bits in [1, 6] and block > 0, got {bits=}, {block=}."
    )
  levels = gaussian_levels(bits)
  borders = jnp.asarray((levels[1:] + levels[:-1]) / 2)

  def encode(vector, key):
    del key  # Deterministic.
    blocks = _blocks(vector.astype(jnp.float32), block)
    # Divided first, or else the squares of what is small would be zero.
    largest = jnp.max(jnp.abs(blocks), axis=1)
    blocks = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    is_real = np.arange(blocks.size).reshape(blocks.shape) < vector.size
    unit = jnp.sqrt(jnp.sum(blocks**2, axis=1) / is_real.sum(axis=1))
    unit = jnp.where(unit > 0, unit, 1)[:, None]
    codes = jnp.searchsorted(borders, blocks / unit)
    rounded = jnp.asarray(levels)[codes] * is_real
    scales = (blocks * rounded).sum(axis=1) / (rounded**2).sum(axis=1)
    scales = scales * largest
    packed = wire.pack_bits(codes.ravel()[: vector.size], bits)
    scales = scales.astype(jnp.bfloat16)
    return Nearest(packed, scales, bits, block, vector.size)

  def decode(payload):
    codes = wire.unpack_bits(payload.codes, payload.size, payload.bits)
    levels = jnp.asarray(gaussian_levels(payload.bits))
    blocks = _blocks(levels[codes], payload.block)
    scales = jnp.asarray(payload.scales, jnp.float32)
    return (blocks * scales[:, None]).ravel()[: payload.size]

  return base.stateless(encode, decode)


@functools.cache
def gaussian_levels(bits: int) -> np.ndarray:
  """The 2**bits levels of least squared error for a standard normal variable.

  By Lloyd's iteration: each level is the mean of what is rounded to it.
  """
  distribution = statistics.NormalDist()
  count = 2**bits
  levels = np.array(
    [distribution.inv_cdf((i + 0.5) / count) for i in range(count)]
  )
  for _ in range(100 * count):
    borders = (levels[1:] + levels[:-1]) / 2
    density = np.array([0.0, *map(distribution.pdf, borders), 0.0])
    below = np.array([0.0, *map(distribution.cdf, borders), 1.0])
    levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
  return levels.astype(np.float32)


def _blocks(vector: jax.Array, block: int) -> jax.Array:
  return jnp.pad(vector, (0, -vector.size % block)).reshape(-1, block)
