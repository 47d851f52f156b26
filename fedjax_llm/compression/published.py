"""Published compressors that are compositions of the other modules'."""

import jax.numpy as jnp

from fedjax_llm.compression import (
  base,
  levels,
  quantize,
  rotation,
  sparse,
)


def stc(density: float) -> base.Compressor:
  """Sparse ternary compression (STC): the signs of a Top-K, and their mean.

  Sattler, Wiedemann, Müller, Samek, "Robust and Communication-Efficient
  Federated Learning from Non-IID Data", 2019 (arXiv 1903.02891), algorithm 1.
  Each kept entry arrives as plus or minus the mean magnitude of all of them.
  The paper uses error feedback at both ends (`base.error_feedback`), and Golomb
  codes for positions where this library has supports. If too few entries are
  nonzero, some zeros are kept, and arrive as plus the mean.

  Args:
    density: fraction of the entries to keep, in (0, 1]; the paper's p.

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  return base.chain(sparse.top_k(density), levels.sign())


def ef_sign_sgd() -> base.Compressor:
  """EF-signSGD: the scaled sign under error feedback. For updates.

  Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other
  Gradient Compression Schemes", 2019 (arXiv 1901.09847), algorithm 1.
  """
  return base.error_feedback(levels.sign())


def drive(*, unbiased: bool = False, block: int = 1024) -> base.Compressor:
  """DRIVE: the signs after a random rotation, one bit for each entry.

  Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", 2021 (arXiv
  2105.08339). The squared error is 1 - 2 / pi of the vector's squared norm, or
  pi / 2 - 1 of it if unbiased.

  Args:
    unbiased: whether the expectation is nearly the vector, for means over many
      clients. Otherwise the error is least.
    block: the length of a rotated block, which has a scale of its own; the
      paper's d.

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
  rounded to the nearest of the levels that suit a Gaussian best, and a scale
  removes the bias. A little bias remains, because the rotation is Hadamard's
  and the scale is a bfloat16. Below one bit, a random fraction `bits` of the
  rotated entries is sent in one bit each; here they are the same in all blocks.
  Between whole numbers the paper mixes two quantizers; here that is refused.

  Args:
    bits: the number of bits for each entry, in (0, 1] or a whole number up to
      6.
    unbiased: whether the expectation is nearly the vector. Otherwise the error
      is least.
    block: the length of a rotated block, which has a scale of its own; the
      paper's d.

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
  paper's Top-K uses a sampled threshold; here it is exact. For its gradient
  clipping use the client's optimizer, for its warm-up `schedules.staged`. It is
  for updates. Use no momentum in the server's optimizer, and up to
  (1 - momentum) times its usual rate.

  Args:
    density: fraction of the entries to keep, in (0, 1].
    momentum: the decay of the velocity, in [0, 1).

  Returns:
    A `Compressor` with state (velocity, gathered).

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
