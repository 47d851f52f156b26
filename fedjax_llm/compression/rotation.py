"""Random rotations, which make the entries of any vector nearly Gaussian."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from fedjax_llm.compression import base, sparse, wire


@wire.message(tag=14)
class Rotated:
  """`kept` entries of each rotated block of a vector of `size`.

  `seed` determines the rotation, and which entries of a block are kept.
  """

  values: Any
  seed: Any
  block: int
  kept: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the values do not fit the blocks."""
    wire.require(self.seed, np.uint32, 2, "seed")
    blocks = -(-self.size // max(1, self.block))
    if not (
      _is_power(self.block)
      and self.block <= _power_above(self.size)
      and 0 < self.kept <= self.block
      and self.values.size == blocks * self.kept
    ):
      raise ValueError(
        f"The message has {self.values.size} values, {self.kept} of each block"
        f" of {self.block}, of a vector of {self.size}."
      )


def rotate(
  *, block: int = 1024, density: float = 1.0, unbiased: bool = True
) -> base.Compressor:
  """Rotates a vector at random, before a quantizer in a `chain`.

  Signs are flipped at random, and each block is multiplied by Hadamard's matrix
  (Suresh et al., "Distributed Mean Estimation with Limited Communication",
  2017, arXiv 1611.00429, section 3). No entry then stands out, so a quantizer's
  errors are small for every vector. Norms do not change. Only the rotation's
  seed is sent, in eight bytes.

  Each rotated entry depends on all entries of its block. With `density` below 1
  only some rotated entries are sent: this is the subsampled randomised Hadamard
  transform.

  Args:
    block: the length of a block, a power of two. Vectors are padded to whole
      blocks: with blocks of 1,024, a vector of 1,025 entries sends 2,048. A
      vector shorter than `block` has one block, whose length is the next power
      of two.
    density: fraction of each block's entries to send, in (0, 1]; at least one
      entry is sent.
    unbiased: whether to scale the values, so that the expectation of what
      arrives is the vector, as in `random_k`.

  Returns:
    A `Compressor` whose payload is a `Rotated`.

  Raises:
    ValueError: if `block` is not a power of two, or `density` is out of range.
  """
  if not _is_power(block):
    raise ValueError(
      f"rotate expected block to be a power of two, got {block=}."
    )
  sparse.require_density("rotate", density)

  def encode(vector, key):
    length = min(block, _power_above(vector.size))
    kept = sparse.count_kept(length, density)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    padded = jnp.pad(vector.astype(jnp.float32), (0, -vector.size % length))
    values = _hadamard(padded * _signs(seed, padded.size), length)
    values = values.reshape(-1, length)[:, _places(seed, length, kept)].ravel()
    if unbiased:
      values = values * (length / kept)
    return Rotated(values, seed, length, kept, vector.size)

  def decode(payload):
    values = jnp.asarray(payload.values).reshape(-1, payload.kept)
    places = _places(payload.seed, payload.block, payload.kept)
    blocks = jnp.zeros((len(values), payload.block), values.dtype)
    values = _hadamard(blocks.at[:, places].set(values), payload.block)
    return (values * _signs(payload.seed, values.size))[: payload.size]

  return base.stateless(encode, decode)


def _is_power(number: int) -> bool:
  return number > 0 and number & (number - 1) == 0


def _power_above(size: int) -> int:
  """The smallest power of two that is at least `size`."""
  return 1 << max(size - 1, 0).bit_length()


def _bits(seed: UInt[Array, " 2"], purpose: int, count: int) -> jax.Array:
  """Random bits that are the same at both ends, whatever their JAX settings."""
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  with jax.threefry_partitionable(True):
    key = jax.random.fold_in(key, purpose)
    return jax.random.bits(key, (count,), jnp.uint32)


def _places(
  seed: UInt[Array, " 2"], block: int, kept: int
) -> Int[Array, " kept"]:
  """The positions that are kept in every rotated block."""
  if kept == block:
    return jnp.arange(block)
  return jnp.argsort(_bits(seed, 1, block))[:kept]


def _signs(seed: UInt[Array, " 2"], size: int) -> Float[Array, " size"]:
  bits = _bits(seed, 0, -(-size // 32))
  places = jnp.arange(32, dtype=jnp.uint32)
  flipped = (bits[:, None] >> places[None]) & 1
  return 1 - 2 * flipped.ravel()[:size].astype(jnp.float32)


def _hadamard(vector: Float[Array, " n"], block: int) -> Float[Array, " n"]:
  """Multiplies each block by the Hadamard matrix, which is its own inverse."""
  # The matrix is the Kronecker product of two small ones. Accelerators multiply
  # by these faster than they add in log2(block) passes.
  power = block.bit_length() - 1
  left, right = _matrix(power - power // 2), _matrix(power // 2)
  blocks = vector.reshape(-1, len(left), len(right))
  product = "ij,bjk,kl->bil"
  return jnp.einsum(product, left, blocks, right, precision="highest").ravel()


def _matrix(power: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  for _ in range(power):
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return (matrix / math.sqrt(len(matrix))).astype(np.float32)
