"""Random rotations, after which the entries of any vector are like Gaussian."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from fedjax_llm.compression import base, wire


@wire.message(tag=14)
class Rotated:
  """A vector of `size`, rotated in blocks as `seed` draws it."""

  values: Any
  seed: Any
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the values are not whole blocks of the vector."""
    wire.require(self.seed, np.uint32, 2, "seed")
    is_power = self.block > 0 and self.block & (self.block - 1) == 0
    if (
      not is_power
      or self.values.size != -(-self.size // self.block) * self.block
    ):
      raise ValueError(
        f"The message has {self.values.size} values in blocks of {self.block},"
        f" of a vector of {self.size}."
      )


def rotate(*, block: int = 1024) -> base.Compressor:
  """Rotates a vector at random, for a quantiser after it in a `chain`.

  Signs are flipped at random, then each block is transformed by Hadamard's
  matrix (Suresh et al., "Distributed Mean Estimation with Limited
  Communication", 2017, arXiv 1611.00429, section 3). Then no entry stands out,
  and an unbiased quantiser's errors are small for every vector. Norms stay as
  they are. The rotation travels as the eight bytes of its seed.

  Args:
    block: a power of two. Vectors are padded to whole blocks: one of 1,025
      entries sends 2,048 by blocks of 1,024. A shorter vector has one block,
      the next power of two.

  Returns:
    A `Compressor` whose payload is a `Rotated`.

  Raises:
    ValueError: if `block` is not a power of two.
  """
  if block <= 0 or block & (block - 1):
    raise ValueError(f"rotate expected a power of two, got {block=}.")

  def encode(vector, key):
    length = min(block, 1 << (vector.size - 1).bit_length())
    seed = jax.random.bits(key, (2,), jnp.uint32)
    padded = jnp.pad(vector.astype(jnp.float32), (0, -vector.size % length))
    values = _hadamard(padded * _signs(seed, padded.size), length)
    return Rotated(values, seed, length, vector.size)

  def decode(payload):
    values = _hadamard(jnp.asarray(payload.values), payload.block)
    return (values * _signs(payload.seed, values.size))[: payload.size]

  return base.stateless(encode, decode)


def _signs(seed: UInt[Array, " 2"], size: int) -> Float[Array, " size"]:
  # The implementation is named, so that it is not a setting of either end.
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  bits = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
  places = jnp.arange(32, dtype=jnp.uint32)
  flipped = (bits[:, None] >> places[None]) & 1
  return 1 - 2 * flipped.ravel()[:size].astype(jnp.float32)


def _hadamard(vector: Float[Array, " n"], block: int) -> Float[Array, " n"]:
  """Each block by Hadamard's matrix, orthonormal: its own inverse."""
  # By two small matrices, whose Kronecker product it is: accelerators multiply
  # matrices faster than they add in log2(block) passes.
  power = block.bit_length() - 1
  left, right = _matrix(power - power // 2), _matrix(power // 2)
  blocks = vector.reshape(-1, len(left), len(right))
  product = jnp.einsum(
    "ij,bjk,kl->bil", left, blocks, right, precision=jax.lax.Precision.HIGHEST
  )
  return product.ravel()


def _matrix(power: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  for _ in range(power):
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return (matrix / math.sqrt(len(matrix))).astype(np.float32)
