"""Quantizers with evenly spaced levels: QSGD, TernGrad, the sign and others."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import base, packing, quantize, wire


@wire.message(tag=13)
class Levels:
  """Codes for `levels` levels in [-scale, scale], and a scale for each block.

  A block has `block` entries.
  """

  codes: Any
  scales: Any
  levels: int
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if codes and scales do not fit the size."""
    if not (2 <= self.levels <= 256 and self.block > 0):
      raise ValueError(
        f"The message has {self.levels} levels in blocks of {self.block}."
      )
    length = packing.digits_nbytes(self.size, self.levels)
    wire.require(self.codes, np.uint8, length, "codes")
    blocks = -(-self.size // self.block)
    wire.require(self.scales, np.float32, blocks, "scales")
    codes = packing.unpack_digits(self.codes, self.size, self.levels)
    if (codes >= self.levels).any():
      raise ValueError(f"The message has codes beyond {self.levels} levels.")


def stochastic_uniform(bits: int, *, block: int = 256) -> base.Compressor:
  """Rounds entries at random to evenly spaced levels, without bias.

  The 2**bits levels are evenly spaced from -scale to scale, where scale is the
  largest magnitude of a block. An entry is rounded to one of its two
  neighbouring levels.

  Args:
    bits: the number of bits for each entry, in [1, 8].
    block: the number of entries that share a float32 scale.

  Returns:
    A `Compressor` whose payload is a `Levels`.

  Raises:
    ValueError: if `bits` is not in [1, 8] or `block` is not positive.
  """
  if not (1 <= bits <= 8 and block > 0):
    raise ValueError(
      "stochastic_uniform expected bits in [1, 8] and block > 0, got"
      f" {bits=}, {block=}."
    )
  return _at_random(2**bits, block, quantize.largest)


def qsgd(levels: int, *, block: int = 512) -> base.Compressor:
  """QSGD: rounds entries at random to multiples of norm / levels.

  Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization
  and Encoding", 2017 (arXiv 1610.02132), section 3.1. An entry is rounded
  without bias to one of its two neighbouring multiples. The variance is at most
  min(block / levels**2, sqrt(block) / levels) times the squared norm. The paper
  uses Elias codes, whose length depends on the data. Here the length is fixed;
  it is shorter than theirs if most codes are not zero.

  Args:
    levels: the paper's s, in [1, 127]. Messages have 2 s + 1 levels.
    block: the number of entries that share a float32 norm; the paper's d.

  Returns:
    A `Compressor` whose payload is a `Levels`.

  Raises:
    ValueError: if `levels` or `block` is out of range.
  """
  if not (1 <= levels <= 127 and block > 0):
    raise ValueError(
      f"qsgd expected levels in [1, 127] and block > 0, got {levels=},"
      f" {block=}."
    )
  return _at_random(2 * levels + 1, block, _norm)


def tern_grad(*, clip: float = 2.5, block: int = 4096) -> base.Compressor:
  """TernGrad: rounds entries at random to -scale, 0 or scale.

  Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in
  Distributed Deep Learning", 2017 (arXiv 1705.07878). The scale is the largest
  magnitude of a block. Entries are first clipped, because one large entry would
  make nearly all others zero. The expectation is the clipped vector. A byte
  holds five entries.

  Args:
    clip: the largest magnitude, in units of a block's root mean square;
      positive, or `math.inf` for no clipping.
    block: the number of entries that share a float32 scale; a layer in the
      paper.

  Returns:
    A `Compressor` whose payload is a `Levels`.

  Raises:
    ValueError: if `clip` or `block` is not positive.
  """
  if not (clip > 0 and block > 0):
    raise ValueError(
      f"tern_grad expected clip > 0 and block > 0, got {clip=}, {block=}."
    )

  def clipped(blocks, counts):
    if math.isinf(clip):
      return blocks
    bounds = clip * _norm(blocks) / jnp.sqrt(counts)
    # vmap changes the order of the sum. Rounding to 16 bits hides the
    # difference.
    bounds = jax.lax.reduce_precision(bounds, 8, 16)
    return jnp.clip(blocks, -bounds[:, None], bounds[:, None])

  return _at_random(3, block, quantize.largest, clipped)


def sign(
  *, block: int | None = None, unbiased: bool = False
) -> base.Compressor:
  """Sends the signs of the entries, and one magnitude for each block.

  A zero counts as positive.

  Args:
    block: the number of entries that share a float32 magnitude; None for all
      entries.
    unbiased: whether the magnitude is the squared norm divided by the sum of
      magnitudes, which removes the bias after a rotation, as in DRIVE.
      Otherwise it is the mean magnitude, which minimises the squared error.

  Returns:
    A `Compressor` whose payload is a `Levels`.

  Raises:
    ValueError: if `block` is not positive.
  """
  if block is not None and block <= 0:
    raise ValueError(f"sign expected block > 0, got {block=}.")

  def encode(vector, key):
    del key  # Deterministic.
    length = block or max(vector.size, 1)
    blocks = quantize.in_blocks(vector.astype(jnp.float32), length)
    total = jnp.abs(blocks).sum(axis=1)
    if unbiased:
      norm = _norm(blocks)
      scales = norm * (norm / quantize.divisor(total))
    else:
      scales = total / _counts(vector.size, length)
    codes = packing.pack_digits(vector >= 0, 2)
    return Levels(codes, scales, 2, length, vector.size)

  return base.stateless(encode, _decode)


def _at_random(levels, block, scale_of, prepare=lambda blocks, counts: blocks):
  """A compressor that rounds each entry at random to a neighbouring level."""
  steps = levels - 1

  def encode(vector, key):
    blocks = quantize.in_blocks(vector.astype(jnp.float32), block)
    blocks = prepare(blocks, _counts(vector.size, block))
    scales = scale_of(blocks)
    shares = blocks / quantize.divisor(scales)[:, None]
    # Clipped, because some devices divide inexactly: a code could wrap around.
    places = (jnp.clip(shares, -1, 1) + 1) * (steps / 2)
    below = jnp.floor(places)
    chance = jax.random.uniform(key, blocks.shape, jnp.float32)
    codes = below.astype(jnp.uint8) + (chance < places - below)
    packed = packing.pack_digits(codes.ravel()[: vector.size], levels)
    return Levels(packed, scales, levels, block, vector.size)

  return base.stateless(encode, _decode)


def _decode(payload: Levels) -> jax.Array:
  codes = packing.unpack_digits(payload.codes, payload.size, payload.levels)
  # A table, because devices round divisions differently.
  steps = payload.levels - 1
  table = (2 * np.arange(payload.levels) - steps) / steps
  table = jnp.asarray(table, jnp.float32)
  blocks = quantize.in_blocks(table[codes], payload.block)
  return quantize.scaled(blocks, payload.scales, payload.size)


def _norm(blocks: jax.Array) -> jax.Array:
  blocks, largest = quantize.in_units(blocks)
  return largest * jnp.linalg.norm(blocks, axis=1)


def _counts(size: int, block: int) -> jax.Array:
  """The number of entries in each block, without padding."""
  starts = np.arange(0, size, block)
  return jnp.asarray(np.minimum(size - starts, block), jnp.float32)
