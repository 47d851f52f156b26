"""Tests of the quantizers: their error, their expectation, their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import quantize, wire

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


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


def test_lloyd_max_may_keep_the_product_with_the_vector():
  vector = np.random.default_rng(2).normal(size=21).astype(np.float32)
  compressor = compression.lloyd_max(2, block=7, unbiased=True)
  received = transmit(compressor, vector, (), KEY).received
  for block in np.split(np.arange(21), 3):
    product = received[block] @ vector[block]
    np.testing.assert_allclose(product, vector[block] ** 2 @ np.ones(7), 1e-2)


def test_natural_is_unbiased_with_an_eighth_of_the_square_for_variance():
  draws = 4000
  vector = np.float32([1.5, -1.25, 3.7, 1e-30, -7e37, 1.0, 0.0, -0.0])
  vector = np.append(vector, np.float32(2e-39))  # A denormal.
  many = jax.vmap(
    lambda key: transmit(compression.natural(), vector, (), key).received
  )
  received = np.asarray(many(jax.random.split(KEY, draws)), np.float64)
  powers = np.abs(received[received != 0])
  np.testing.assert_array_equal(np.exp2(np.round(np.log2(powers))), powers)
  exact = vector.astype(np.float64)
  # The variance, (x - low)(high - x), is known here to a fiftieth or so.
  assert (received.var(axis=0) <= 1.1 * exact**2 / 8 + 1e-76).all()
  deviation = np.abs(exact) / np.sqrt(8 * draws)
  # XLA:CPU takes denormals for zero.
  tiny = np.finfo(np.float32).tiny
  assert (np.abs(received.mean(axis=0) - exact) <= 5 * deviation + tiny).all()
  np.testing.assert_array_equal(received[:, 5], 1.0)


def test_natural_stays_finite_at_the_largest_float():
  vector = np.finfo(np.float32).max * np.ones(50, np.float32)
  received = transmit(compression.natural(), vector, (), KEY).received
  np.testing.assert_array_equal(received, np.float32(2.0**127))


def test_a_message_of_natural_that_is_not_finite_is_refused():
  vector = np.float32([1.0, np.nan, 2.0])
  payload = transmit(compression.natural(), vector, (), KEY).payload
  message = wire.dumps(payload)
  with pytest.raises(ValueError, match="not finite"):
    wire.loads(message)


def test_what_a_quantizer_cannot_do_is_refused():
  with pytest.raises(ValueError, match="lloyd_max expected bits in .*bits=7"):
    compression.lloyd_max(7)
  with pytest.raises(ValueError, match="cast expected bfloat16 or float16"):
    compression.cast(jnp.float32)
