"""Trellis codes: whole blocks are rounded at once, close to Shannon's bound.

Quantizers that round each entry by itself stay away from that bound, and need
at least one bit for each entry. Here each entry is decoded from the last
`memory` bits of a stream, by a table of pseudo-random Gaussian numbers. New
bits shift old bits out, so neighbouring entries share most of their bits.
Viterbi's algorithm finds the best stream.
"""

import fractions
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedjax_llm.compression import base, packing, quantize, wire

# Back-pointers that one search may keep, a byte each: 32 MB.
_CHOICES = 2**25


@wire.message(tag=20)
class Trellis:
  """A bit stream with `bits` bits for every `entries` entries, and the scales.

  Each block of `block` entries has a bfloat16 scale. Its decoder starts with a
  memory of zeros.
  """

  codes: Any
  scales: Any
  bits: int
  entries: int
  memory: int
  block: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if codes and scales do not fit the size."""
    bits, entries, block = self.bits, self.entries, self.block
    if not (
      0 < bits <= self.memory <= 16
      and bits <= 8
      and 0 < entries <= 8
      and 0 < block <= -(-max(self.size, 1) // entries) * entries
      and block % entries == 0
    ):
      raise ValueError(
        f"The message has {bits} bits for each {entries} entries, a memory of"
        f" {self.memory} bits, and blocks of {block}."
      )
    nbytes = -(-(-(-self.size // entries) * bits) // 8)
    wire.require(self.codes, np.uint8, nbytes, "codes")
    wire.require(self.scales, jnp.bfloat16, -(-self.size // block), "scales")


def trellis(
  bits: float,
  *,
  memory: int = 12,
  block: int = 2048,
  profile: Float[Array, " n"] | None = None,
  unbiased: bool = False,
) -> base.Compressor:
  """Codes each block by the bit stream that decodes nearest to it.

  Trellis-coded quantisation (Marcellin and Fischer, "Trellis coded quantization
  of memoryless and Gauss-Markov sources", 1990) on the bitshift trellis of QTIP
  (Tseng et al., 2024, arXiv 2406.11235), with a table in place of a structured
  code. For Gaussian vectors the squared error comes near the rate-distortion
  bound, 4**-bits, if `memory` is well above `bits`; otherwise `lloyd_max` is as
  good. Rotate vectors that are far from Gaussian first, or give a profile. The
  error is not zero on average: send updates under `error_feedback`, or set
  `unbiased` and chain it after `rotate`.

  A profile is the expected magnitude of each entry. The search minimises the
  total squared error: large entries become more exact, small entries less
  exact. The profile costs no bytes, because both ends know it.

  Args:
    bits: the number of bits for each entry, a fraction k / m with k and m from
      1 to 8, such as 1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2.
    memory: the number of bits that each entry depends on, from k to 16. One
      more bit doubles the time of encoding and brings the error a little nearer
      to the bound. Decoding is always fast.
    block: the number of entries that share a scale, rounded up to a multiple of
      m.
    profile: the expected magnitude of each entry, positive, in any unit; both
      ends know it. None if nothing is known.
    unbiased: whether to scale each decoded block so that its inner product with
      the block is the squared norm of the block, see `lloyd_max`. It is better
      for means over many clients. The error of one message is larger, near
      1 / (4**bits - 1).

  Returns:
    A `Compressor` whose payload is a `Trellis`.

  Raises:
    ValueError: if an argument is out of range; from `encode`, if the profile
      and the vector differ in length.
  """
  rate = fractions.Fraction(bits).limit_denominator(8)
  shift, width = rate.numerator, rate.denominator
  if abs(rate - bits) > 1e-9 or not 0 < shift <= 8:
    raise ValueError(
      "trellis expected bits = k / m for whole k and m from 1 to 8, got"
      f" {bits=}."
    )
  if not (shift <= memory <= 16 and block > 0):
    raise ValueError(
      f"trellis expected memory in [{shift}, 16] and block > 0, got {memory=},"
      f" {block=}."
    )
  if profile is not None and not isinstance(profile, jax.core.Tracer):
    known = np.asarray(profile)
    if known.ndim != 1 or not (np.isfinite(known) & (known > 0)).all():
      values = f"[{known.min()}, {known.max()}]" if known.size else "[]"
      raise ValueError(
        "trellis expected a 1-D profile of finite positive numbers, got"
        f" {known.dtype}{list(known.shape)} with values in {values}. Replace"
        " zeros by a small number."
      )

  def encode(vector, key):
    del key  # Deterministic.
    size = vector.size
    length = -(-min(block, max(size, 1)) // width) * width
    blocks = quantize.in_rows(vector.astype(jnp.float32), length)
    known = _profile_rows(profile, size, length)
    blocks, largest = quantize.in_units(blocks)
    # The best code for a Gaussian has less energy than the Gaussian.
    energy = jnp.sum(blocks**2, axis=1) / jnp.sum(known**2, axis=1)
    unit = quantize.divisor(jnp.sqrt(energy * (1 - 4.0**-bits)))
    codebook = jnp.asarray(table(memory, width))
    states = _search(blocks / unit[:, None], known, codebook, shift)
    rounded = codebook[states].reshape(blocks.shape) * known
    product = (blocks * rounded).sum(axis=1)
    norm = quantize.divisor((rounded**2).sum(axis=1))
    scales = largest * product / norm
    if unbiased:
      told = product**2 / (norm * quantize.divisor((blocks**2).sum(axis=1)))
      # The code of a short block may be nearly orthogonal to it.
      scales /= jnp.maximum(told, (1 - 4.0**-bits) / 2)
    symbols = states.ravel()[: -(-size // width)] & 2**shift - 1
    codes = packing.pack_bits(symbols, shift)
    scales = scales.astype(jnp.bfloat16)
    return Trellis(codes, scales, shift, width, memory, length, size)

  def decode(payload):
    size, length, width = payload.size, payload.block, payload.entries
    symbols = packing.unpack_bits(
      payload.codes, -(-size // width), payload.bits
    )
    symbols = quantize.in_rows(symbols, length // width)
    states = _windows(symbols, payload.memory, payload.bits)
    rounded = jnp.asarray(table(payload.memory, width))[states]
    rounded = rounded.reshape(-1, length) * _profile_rows(profile, size, length)
    return quantize.scaled(rounded, payload.scales, size)

  return base.stateless(encode, decode)


@functools.cache
def table(memory: int, entries: int) -> np.ndarray:
  """The entries that each state of `memory` bits codes: [2**memory, entries].

  Each column holds the quantiles of a standard normal variable, in an order
  given by a hash, so that it is the same on every machine. Two states that
  differ only in the newest bit have entries of opposite sign: every step can
  choose the sign. The error is then smaller than with independent numbers.
  """
  pairs = np.arange(2**memory // 2)
  quantile = statistics.NormalDist().inv_cdf
  sizes = np.array([quantile((1 + (i + 0.5) / len(pairs)) / 2) for i in pairs])
  columns = []
  for column in range(entries):
    mixed = _mixed(pairs + column * len(pairs))
    half = sizes[np.argsort(mixed)] * np.where(mixed & 1, 1, -1)
    columns.append(np.stack([half, -half], axis=1).ravel())
  columns = np.stack(columns, axis=1)
  return (columns / np.sqrt(np.mean(columns**2))).astype(np.float32)


def _mixed(numbers: np.ndarray) -> np.ndarray:
  """The hash of each number by SplitMix64 (Steele, Lea and Flood, 2014)."""
  x = (numbers.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> 31


def _search(blocks, known, codebook, shift):
  """Returns the states of the best stream of each block, by Viterbi."""
  states, width = codebook.shape
  steps = blocks.shape[1] // width
  nearest = functools.partial(_nearest, codebook=codebook, shift=shift)
  return jax.lax.map(
    lambda pair: nearest(*pair),
    [x.reshape(-1, steps, width) for x in (blocks, known)],
    batch_size=max(1, _CHOICES // (steps * (states >> shift))),
  )


def _nearest(
  targets: Float[Array, "steps width"],
  known: Float[Array, "steps width"],
  *,
  codebook: Float[Array, "states width"],
  shift: int,
) -> Int[Array, " steps"]:
  """Returns the states of the stream with the least squared error."""
  states = len(codebook)
  kept = states >> shift
  multiply = functools.partial(jnp.matmul, precision="highest")

  def forward(error, step):
    target, known = step
    # States that differ only in the bits shifted out lead to the same state.
    error = error.reshape(-1, kept)
    choice = jnp.argmin(error, axis=0).astype(jnp.uint8)
    # The squared target is left out: it is the same for all states.
    added = multiply(codebook**2, known**2)
    added -= 2 * multiply(codebook, target * known)
    error = error.min(axis=0)[:, None] + added.reshape(kept, -1)
    return error.ravel(), choice

  def backward(state, choice):
    before = choice[state >> shift].astype(jnp.int32) * kept + (state >> shift)
    return before, state

  start = jnp.where(jnp.arange(states) == 0, 0, jnp.inf)
  error, choices = jax.lax.scan(forward, start, (targets, known))
  _, path = jax.lax.scan(
    backward, jnp.argmin(error).astype(jnp.int32), choices, reverse=True
  )
  return path


def _windows(symbols, memory, shift):
  """Returns the state after each symbol of each row."""
  steps = symbols.shape[1]
  states = jnp.zeros_like(symbols)
  for age in range(-(-memory // shift)):
    old = jnp.pad(symbols, ((0, 0), (age, 0)))[:, :steps]
    states |= old << age * shift
  return states & 2**memory - 1


def _profile_rows(profile, size, length):
  """The profile in rows of `length`, with zeros as padding."""
  if profile is None:
    known = jnp.ones(size)
  elif profile.shape == (size,):
    known = profile / profile.max()
  else:
    raise ValueError(
      f"trellis expected a vector of {profile.size} entries, the length of its"
      f" profile, got {size}."
    )
  return quantize.in_rows(jnp.asarray(known, jnp.float32), length)
