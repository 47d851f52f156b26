"""Quantizers: they send each entry of a vector in fewer bits."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fedjax_llm.compression import base, packing, wire


@wire.message(tag=8)
class Nearest:
  """Codes of `bits` bits, and a bfloat16 scale for each `block` entries."""

  codes: Any
  scales: Any
  bits: int
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if codes and scales do not fit the size."""
    size, bits, block = self.size, self.bits, self.block
    if not (1 <= bits <= 6 and block > 0):
      raise ValueError(
        f"The message has codes of {bits} bits in blocks of {block}."
      )
    wire.require(self.codes, np.uint8, -(-size * bits // 8), "codes")
    wire.require(self.scales, jnp.bfloat16, -(-size // block), "scales")


@wire.message(tag=15)
class Powers:
  """The sign and the exponent of each float32 entry, in nine bits."""

  codes: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if the codes do not fit the size."""
    wire.require(self.codes, np.uint8, -(-self.size * 9 // 8), "codes")
    codes = packing.unpack_bits(self.codes, self.size, 9)
    if (codes & 255 == 255).any():
      raise ValueError("The message has values that are not finite.")


def cast(dtype: DTypeLike) -> base.Compressor:
  """Rounds every entry to the nearest number of a shorter floating type.

  Args:
    dtype: bfloat16 or float16. An entry that is too large for float16 becomes
      infinite, which `wire.dumps` refuses to send.

  Returns:
    A `Compressor` whose payload is a `Dense`.

  Raises:
    ValueError: if `dtype` is another type.
  """
  if dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f"cast expected bfloat16 or float16, got {dtype=}.")
  return base.stateless(
    encode=lambda vector, key: base.Dense(vector.astype(dtype)),
    decode=lambda payload: jnp.asarray(payload.values),
  )


def lloyd_max(
  bits: int, *, block: int = 256, unbiased: bool = False
) -> base.Compressor:
  """Rounds entries to the nearest of the optimal levels for a Gaussian.

  The levels minimise the squared error of a normal variable (Max, "Quantizing
  for minimum distortion", 1960; Lloyd, 1982), in units of a block's root mean
  square. Each block is then scaled to minimise its own squared error. The error
  is far below that of `stochastic_uniform`, above all at one and two bits, but
  its expectation is not zero. Send updates with `error_feedback`, or set
  `unbiased` and chain it after `rotate`.

  Args:
    bits: the number of bits for each entry, in [1, 6].
    block: the number of entries that share a bfloat16 scale.
    unbiased: whether to scale each block so that its inner product with the
      received block equals its squared norm. After a random rotation, the
      expectation is then the block, as in EDEN, but the error is larger.

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
    blocks = in_blocks(vector.astype(jnp.float32), block)
    blocks, peaks = in_units(blocks)
    is_real = np.arange(blocks.size).reshape(blocks.shape) < vector.size
    unit = jnp.sqrt(jnp.sum(blocks**2, axis=1) / is_real.sum(axis=1))
    codes = jnp.searchsorted(borders, blocks / divisor(unit)[:, None])
    rounded = jnp.asarray(levels)[codes] * is_real
    product = (blocks * rounded).sum(axis=1)
    if unbiased:
      scales = (blocks**2).sum(axis=1) / divisor(product)
    else:
      scales = product / (rounded**2).sum(axis=1)
    scales = (scales * peaks).astype(jnp.bfloat16)
    packed = packing.pack_bits(codes.ravel()[: vector.size], bits)
    return Nearest(packed, scales, bits, block, vector.size)

  def decode(payload):
    codes = packing.unpack_bits(payload.codes, payload.size, payload.bits)
    levels = jnp.asarray(gaussian_levels(payload.bits))
    blocks = in_blocks(levels[codes], payload.block)
    return scaled(blocks, payload.scales, payload.size)

  return base.stateless(encode, decode)


def natural() -> base.Compressor:
  """Natural compression: rounds entries at random to powers of two.

  Horváth et al., "Natural Compression for Distributed Deep Learning", 2022
  (arXiv 1905.10988, section 2). The mantissa is the probability of rounding up
  to the larger neighbouring power. The expectation is exact, and the variance
  is at most an eighth of the squared entry. Each entry takes nine bits.

  Returns:
    A `Compressor` whose payload is a `Powers`.
  """

  def encode(vector, key):
    bits = jax.lax.bitcast_convert_type(vector.astype(jnp.float32), jnp.uint32)
    chance = jax.random.bits(key, vector.shape, jnp.uint32) >> 9
    # The 23-bit mantissa is the probability of rounding up, which adds one to
    # the exponent. The largest power has no larger neighbour.
    carries = (bits >> 23 & 255 < 254) & (chance < bits & (1 << 23) - 1)
    codes = (bits >> 23) + carries.astype(jnp.uint32)
    return Powers(packing.pack_bits(codes, 9), vector.size)

  def decode(payload):
    codes = packing.unpack_bits(payload.codes, payload.size, 9)
    return jax.lax.bitcast_convert_type(codes << 23, jnp.float32)

  return base.stateless(encode, decode)


@functools.cache
def gaussian_levels(bits: int) -> np.ndarray:
  """Returns 2**bits levels of least squared error for a standard normal.

  Lloyd's iteration: each level becomes the mean of the numbers rounded to it.
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


def divisor(numbers: jax.Array) -> jax.Array:
  """Replaces numbers that are not positive by 1, so that they can divide."""
  return jnp.where(numbers > 0, numbers, 1)


def largest(blocks: jax.Array) -> jax.Array:
  """Returns the largest magnitude of each block."""
  return jnp.max(jnp.abs(blocks), axis=1)


def in_units(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns blocks divided by their largest magnitudes, and the magnitudes.

  Without this, squares of small entries would underflow to zero.
  """
  peaks = largest(blocks)
  return blocks / divisor(peaks)[:, None], peaks


def scaled(blocks: jax.Array, scales: jax.Array, size: int) -> jax.Array:
  """Multiplies each block by its scale; returns the first `size` entries."""
  scales = jnp.asarray(scales, jnp.float32)
  return (blocks * scales[:, None]).ravel()[:size]


def in_rows(vector: jax.Array, width: int) -> jax.Array:
  """Reshapes a vector to rows of `width` entries, with zeros at the end."""
  return jnp.pad(vector, (0, -vector.size % width)).reshape(-1, width)


def in_blocks(vector: jax.Array, block: int) -> jax.Array:
  """Reshapes a vector to rows of `block` entries, or one row if shorter."""
  return in_rows(vector, min(block, max(vector.size, 1)))
