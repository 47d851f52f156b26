"""Quantizers: every entry of a vector, each in fewer bits."""

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
    if not (1 <= self.bits <= 8 and self.block > 0):
      raise ValueError(
        f"The message has codes of {self.bits} bits in blocks of {self.block}."
      )
    wire.require(self.codes, np.uint8, -(-self.size * self.bits // 8), "codes")
    wire.require(self.scales, np.float32, -(-self.size // self.block), "scales")


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


def _blocks(vector: jax.Array, block: int) -> jax.Array:
  return jnp.pad(vector, (0, -vector.size % block)).reshape(-1, block)
