"""Published compressors, composed of the other modules' compressors."""

import jax.numpy as jnp

from fedjax_llm.compression import (
  base,
  levels,
  quantize,
  rotation,
  sparse,
)


def stc(density: float) -> base.Compressor:
  """Sparse ternary compression (STC): signs of a Top-K, and a mean magnitude.

  Sattler, Wiedemann, Müller, Samek, "Robust and Communication-Efficient
  Federated Learning from Non-IID Data", 2019 (arXiv 1903.02891), algorithm 1.
  Each kept entry arrives as plus or minus the mean magnitude of the kept ones.
  The paper uses error feedback at both ends (`base.error_feedback`). It codes
  positions with Golomb codes; this library uses `supports`. If too few entries
  are nonzero, some zeros are kept, and arrive as plus the mean.

  Args:
    density: fraction of the entries to keep, in (0, 1]; the paper's p.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  return base.chain(sparse.top_k(density), levels.sign())


def ef_sign_sgd() -> base.Compressor:
  """EF-signSGD: the scaled sign with error feedback, for updates.

  Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other
  Gradient Compression Schemes", 2019 (arXiv 1901.09847), algorithm 1.
  """
  return base.error_feedback(levels.sign())


def drive(*, unbiased: bool = False, block: int = 1024) -> base.Compressor:
  """DRIVE: the signs after a random rotation, one bit for each entry.

  Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", 2021 (arXiv
  2105.08339). The squared error is 1 - 2 / pi times the vector's squared norm,
  or pi / 2 - 1 times if unbiased.

  Args:
    unbiased: whether the expectation of what arrives is nearly the vector,
      which suits means over many clients. Otherwise the error is minimal.
    block: the length of a rotated block, which has its own scale; the paper's
      d.

  Raises:
    ValueError: if `block` is not a power of two.
  """
  rotated = rotation.rotate(block=block)
  return base.chain(rotated, levels.sign(block=block, unbiased=unbiased))


def eden(
  bits: float, *, unbiased: bool = True, block: int = 1024
) -> base.Compressor:
  """EDEN: few bits for each entry, or less than one, after a random rotation.

  Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean
  Estimation for Federated Learning", 2022 (arXiv 2108.08842). Entries are
  rounded to the nearest of the optimal levels for a Gaussian, and a scale
  removes the bias. A little bias remains, because the rotation uses Hadamard's
  matrix and the scale is a bfloat16. Below one bit, a random fraction `bits` of
  the rotated entries is sent in one bit each; here, all blocks send the same
  positions. For other fractional `bits` the paper mixes two quantizers; this
  function raises an error.

  Args:
    bits: the number of bits for each entry, in (0, 1] or a whole number up to
      6.
    unbiased: whether the expectation of what arrives is nearly the vector.
      Otherwise the error is minimal.
    block: the length of a rotated block, which has its own scale; the paper's
      d.

  Raises:
    ValueError: if `bits` is out of range, or `block` is not a power of two.
  """
  if not (0 < bits <= 1 or bits in range(2, 7)):
    raise ValueError(
      f"eden expected bits in (0, 1] or a whole number up to 6, got {bits=}."
    )
  density = min(bits, 1)
  return base.chain(
    rotation.rotate(block=block, density=density, unbiased=unbiased),
    quantize.lloyd_max(
      max(1, int(bits)),
      block=sparse.count_kept(block, density),
      unbiased=unbiased,
    ),
  )


def deep_gradient_compression(
  density: float, *, momentum: float = 0.9
) -> base.Compressor:
  """Deep gradient compression (DGC): Top-K with a residual and momentum.

  Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", 2018 (arXiv
  1712.01887), section 3. The sender keeps momentum (momentum correction), and
  forgets it for the entries that it sends (momentum factor masking). The
  paper's Top-K uses a sampled threshold; here it is exact. For the paper's
  gradient clipping use the client's optimizer; for its warm-up use
  `schedules.staged`. This compressor is for updates. The server's optimizer
  should have no momentum, and at most (1 - momentum) times its usual rate.

  Args:
    density: fraction of the entries to keep, in (0, 1].
    momentum: the decay of the velocity, in [0, 1).

  Returns:
    A `Compressor` with state (velocity, gathered); `gathered` is the sum of the
    velocities that were not sent yet.

  Raises:
    ValueError: if `density` or `momentum` is out of range.
  """
  if not 0 <= momentum < 1:
    raise ValueError(
      f"deep_gradient_compression expected momentum in [0, 1), got {momentum=}."
    )
  top_k = sparse.top_k(density)

  def init(vector):
    return jnp.zeros_like(vector), jnp.zeros_like(vector)

  def encode(vector, state, key):
    velocity, gathered = state
    velocity = momentum * velocity + vector
    gathered = gathered + velocity
    payload, _ = top_k.encode(gathered, (), key)
    forget = lambda x: jnp.where(sparse.support(payload), 0, x)
    return payload, (forget(velocity), forget(gathered))

  return base.Compressor(init, encode, top_k.decode, for_updates=True)
