"""Tests of the quantizers: their error, their expectation, their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression

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


def test_what_a_quantizer_cannot_do_is_refused():
  with pytest.raises(ValueError, match="bits=0"):
    compression.uniform(0)
  with pytest.raises(ValueError, match="bits=9"):
    compression.uniform(9)
  with pytest.raises(ValueError, match="block=0"):
    compression.uniform(4, block=0)
  with pytest.raises(ValueError, match="cast expected bfloat16 or float16"):
    compression.cast(jnp.float32)
