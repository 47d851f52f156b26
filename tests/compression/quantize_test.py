"""Tests of the quantizers: their error, their expectation, their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import quantize

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)
BLOCK = 8
each_bits = pytest.mark.parametrize("bits", range(1, 9))


def draw(bits, vector, draws):
  """What arrives of `vector` in each of many draws, and the step by entry."""
  compressor = compression.uniform(bits, block=BLOCK)
  many = jax.vmap(lambda key: transmit(compressor, vector, (), key).received)
  received = np.asarray(many(jax.random.split(KEY, draws)))
  blocks = [vector[i : i + BLOCK] for i in range(0, vector.size, BLOCK)]
  scales = np.concatenate([np.full(b.size, np.abs(b).max()) for b in blocks])
  return received, 2 * scales / (2**bits - 1)


@each_bits
def test_uniform_is_unbiased_and_off_by_less_than_a_step(bits):
  draws = 4000
  vector = np.random.default_rng(0).normal(size=21).astype(np.float32)
  vector[8:16] *= 1e-3  # A block of its own scale.
  received, step = draw(bits, vector, draws)
  assert (np.abs(received - vector) <= step * (1 + 1e-6)).all()
  # Between two levels the variance is at most step^2 / 4.
  deviation = step / 2 / np.sqrt(draws)
  assert (np.abs(received.mean(0) - vector) <= 5 * deviation + 1e-7).all()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_levels_are_sent_exactly(bits):
  codes = np.array([0, 2**bits - 1, 2 ** (bits - 1), 0, 2**bits - 1])
  vector = (codes / (2**bits - 1) * 2 - 1).astype(np.float32)
  received, _ = draw(bits, vector, 50)
  # The codes are exact but where float32 puts a level a hair off.
  np.testing.assert_allclose(
    received.mean(0), vector, atol=2.0**-12 if bits > 1 else 0
  )


def test_a_block_of_zeros_is_zero_next_to_one_that_is_not():
  vector = np.concatenate([np.zeros(BLOCK), np.ones(3)]).astype(np.float32)
  received, _ = draw(3, vector, 10)
  np.testing.assert_array_equal(received, np.tile(vector, (10, 1)))


@pytest.mark.parametrize("scale", [1e-44, 1e-37, 8e37])
def test_uniform_holds_at_the_ends_of_float32(scale):
  vector = np.array([1.0, -1.0, 0.5], np.float32) * np.float32(scale)
  received, step = draw(4, vector, 10)
  # XLA:CPU takes denormals for zero.
  tiny = np.finfo(np.float32).tiny
  assert (np.abs(received - vector) <= np.maximum(step, tiny)).all()


def test_a_vector_that_has_diverged_arrives_as_such():
  vector = np.array([1.0, np.nan, 2.0], np.float32)
  received, _ = draw(4, vector, 1)
  assert np.isnan(received).all()


@pytest.mark.parametrize(
  ("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float16, 11)]
)
def test_cast_is_off_by_half_a_unit_in_the_last_place(dtype, bits):
  vector = np.random.default_rng(0).normal(size=100).astype(np.float32)
  sent = transmit(compression.cast(dtype), vector, (), KEY)
  assert sent.payload.values.nbytes == 2 * vector.size
  error = np.abs(np.asarray(sent.received) - vector)
  assert (error <= 2.0**-bits * np.abs(vector)).all()


def test_gaussian_levels_are_those_of_max():
  # Max (1960), Table I.
  tables = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
  }
  for bits, positive in tables.items():
    levels = quantize.gaussian_levels(bits)
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], positive, atol=6e-4)
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-6)


@pytest.mark.parametrize(
  ("bits", "distortion"),
  [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)],
)
def test_lloyd_max_has_the_published_error(bits, distortion):
  # Max (1960), Table I; the mean of n squares is off by sqrt(2 / n) or so.
  vector = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
  compressor = compression.lloyd_max(bits, block=10_000)
  error = transmit(compressor, vector, (), KEY).received - vector
  got = np.mean(np.square(error)) / np.mean(vector**2)
  np.testing.assert_allclose(got, distortion, rtol=0.03)


def test_lloyd_max_sends_each_block_in_its_own_units():
  vector = np.random.default_rng(2).normal(size=21).astype(np.float32)
  scaled = vector * np.repeat(np.float32([1, 1e-20, 2.0**40]), 8)[:21]
  compressor = compression.lloyd_max(3, block=8)
  received = [
    transmit(compressor, x, (), KEY).received for x in (vector, scaled)
  ]
  # Scales travel as bfloat16, which rounds each by up to a 256th.
  expected = received[0] * np.repeat(np.float32([1, 1e-20, 2.0**40]), 8)[:21]
  np.testing.assert_allclose(received[1], expected, rtol=1 / 100)
  # A scale of least error leaves nothing of the vector in the error.
  rounded, block = received[0][:8], vector[:8]
  np.testing.assert_allclose(rounded @ block, rounded @ rounded, rtol=1 / 100)


def test_what_a_quantizer_cannot_do_is_refused():
  with pytest.raises(ValueError, match="bits=0"):
    compression.uniform(0)
  with pytest.raises(ValueError, match="bits=9"):
    compression.uniform(9)
  with pytest.raises(ValueError, match="block=0"):
    compression.uniform(4, block=0)
  with pytest.raises(ValueError, match="lloyd_max expected bits in .*bits=7"):
    compression.lloyd_max(7)
  with pytest.raises(ValueError, match="cast expected bfloat16 or float16"):
    compression.cast(jnp.float32)
