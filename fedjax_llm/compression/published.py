"""Published compressors that are compositions of this library's."""

import jax.numpy as jnp

from fedjax_llm.compression import (
  base,
  levels,
  quantize,
  rotation,
  sparse,
)


def stc(density: float) -> base.Compressor:
  """Sparse ternary compression: Top-K, each entry as plus or minus their mean.

  Sattler, Wiedemann, Müller, Samek, "Robust and Communication-Efficient
  Federated Learning from Non-IID Data", 2019 (arXiv 1903.02891), algorithm 1.
  The paper has error feedback at both ends (`base.error_feedback`) and Golomb
  codes of the positions, where the wire has its supports. Of a vector with
  fewer entries that are not zero some zeros arrive as plus.

  Args:
    density: p of the paper, in (0, 1].

  Raises:
    ValueError: if `density` is not in (0, 1].
  """
  return base.chain(sparse.top_k(density), levels.sign())


def ef_sign_sgd() -> base.Compressor:
  """EF-signSGD: the scaled sign under error feedback.

  Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other
  Gradient Compression Schemes", 2019 (arXiv 1901.09847), algorithm 1.
  """
  return base.error_feedback(levels.sign())


def drive(*, unbiased: bool = False, block: int = 1024) -> base.Compressor:
  """DRIVE: one bit an entry, the sign after a random rotation.

  Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", 2021 (arXiv
  2105.08339). The squared error is 1 - 2 / pi of the vector's squared norm, or
  pi / 2 - 1 of it if unbiased.

  Args:
    unbiased: whether the expectation is the vector, nearly, for means over many
      clients; otherwise the error is least.
    block: of the rotation, each with a scale of its own; d in the paper.

  Raises:
    ValueError: if `block` is not a power of two.
  """
  rotated = rotation.rotate(block=block)
  return base.chain(rotated, levels.sign(block=block, unbiased=unbiased))


def eden(
  bits: float, *, unbiased: bool = True, block: int = 1024
) -> base.Compressor:
  """EDEN: few bits an entry, or less than one, after a random rotation.

  Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean
  Estimation for Federated Learning", 2022 (arXiv 2108.08842): entries go to the
  nearest of the levels that suit a Gaussian best, and a scale takes the bias
  away, but for what Hadamard's matrix is not any rotation and bfloat16 rounds
  the scale. Below one bit a share `bits` of the rotated entries is drawn at
  random and sent in one bit each; here it is the same entries of all blocks.
  Between whole numbers the paper mixes two; that is refused here.

  Args:
    bits: in (0, 1], or a whole number up to 6.
    unbiased: whether the expectation is the vector, nearly; otherwise the error
      is least.
    block: of the rotation, each with a scale of its own; d in the paper.

  Raises:
    ValueError: if `bits` is another one, or `block` not a power of two.
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
      block=max(1, int(density * block)),
      unbiased=unbiased,
    ),
  )


def deep_gradient_compression(
  density: float, *, momentum: float = 0.9
) -> base.Compressor:
  """DGC: Top-K of what has gathered, with momentum at the sender.

  Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", 2018 (arXiv
  1712.01887), section 3: momentum correction, and momentum factor masking, by
  which what was sent forgets its momentum. Its thresholds are sampled, here
  Top-K is exact. Its gradient clipping and warm-up are those of the client's
  optimizer and of `schedules.staged`. As momentum is here, none belongs in the
  server's optimizer, and its rate is to be up to 1 - momentum of the usual one.

  Args:
    density: of the Top-K, in (0, 1].
    momentum: in [0, 1).

  Returns:
    A `Compressor` with state (velocity, gathered).

  Raises:
    ValueError: if `density` or `momentum` is out of range.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"expected momentum in [0, 1), got {momentum=}.")
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

  return base.Compressor(init, encode, top_k.decode)
