"""Tests of evenly spaced levels: error, expectation, edges."""

import math

import jax
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import wire

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)
BLOCK = 8
each_bits = pytest.mark.parametrize("bits", range(1, 9))


def draw(bits, vector, draws):
  """What arrives of `vector` in each of many draws, and the step by entry."""
  compressor = compression.stochastic_uniform(bits, block=BLOCK)
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


def many(compressor, vector, draws=4000):
  fn = jax.vmap(lambda key: transmit(compressor, vector, (), key).received)
  return np.asarray(fn(jax.random.split(KEY, draws)), np.float64)


def assert_unbiased(received, vector):
  deviation = received.std(axis=0) / np.sqrt(len(received))
  slack = 5 * deviation + 1e-6 * np.abs(vector).max()
  assert (np.abs(received.mean(axis=0) - vector) <= slack).all()


@pytest.mark.parametrize("levels", [1, 4])
def test_qsgd_is_unbiased_within_the_published_variance(levels):
  vector = np.random.default_rng(0).normal(size=64).astype(np.float32)
  received = many(compression.qsgd(levels, block=64), vector)
  assert_unbiased(received, vector)
  # Multiples of the norm over the number of levels, next to the entry.
  steps = received / np.linalg.norm(vector) * levels
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
  assert (np.abs(received - vector) < np.linalg.norm(vector) / levels).all()
  variance = np.mean(np.sum((received - vector) ** 2, axis=1))
  bound = min(64 / levels**2, math.sqrt(64) / levels)
  assert variance <= bound * np.sum(vector**2)


def test_tern_grad_is_unbiased_in_what_it_does_not_clip():
  vector = np.random.default_rng(0).normal(size=50).astype(np.float32)
  received = many(compression.tern_grad(clip=math.inf), vector)
  largest = np.abs(vector).max()
  np.testing.assert_allclose(
    np.unique(received), [-largest, 0, largest], atol=1e-6
  )
  assert_unbiased(received, vector)
  vector[0] = 100.0
  received = many(compression.tern_grad(clip=2.5), vector)
  bound = 2.5 * np.sqrt(np.mean(vector**2))
  # The bound is rounded to 16 bits, upwards or downwards.
  clipped = np.clip(vector, -bound, bound)
  assert abs(received[0, 0] - clipped[0]) <= 2.0**-17 * clipped[0]
  assert_unbiased(received[:, 1:], clipped[1:])


def test_tern_grad_sends_five_entries_in_a_byte():
  payload = transmit(
    compression.tern_grad(), np.ones(50, np.float32), (), KEY
  ).payload
  assert payload.codes.size == 10


def test_sign_has_the_scale_of_least_error_or_of_the_same_product():
  vector = np.float32([1.0, -2.0, 0.0, 5.0])
  received = transmit(compression.sign(), vector, (), KEY).received
  np.testing.assert_array_equal(received, np.float32([2, -2, 2, 2]))
  unbiased = compression.sign(unbiased=True)
  received = transmit(unbiased, vector, (), KEY).received
  np.testing.assert_allclose(received @ vector, vector @ vector, rtol=1e-6)
  received = transmit(compression.sign(block=3), vector, (), KEY).received
  np.testing.assert_array_equal(received, np.float32([1, -1, 1, 5]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(
  "compressor",
  [
    compression.qsgd(4),
    compression.tern_grad(),
    compression.sign(),
    compression.sign(unbiased=True),
  ],
)
def test_the_scale_of_a_vector_changes_nothing_else(compressor, scale):
  vector = np.random.default_rng(0).normal(size=50).astype(np.float32)
  plain, scaled = (
    transmit(compressor, vector * np.float32(factor), (), KEY).received
    for factor in (1, scale)
  )
  np.testing.assert_allclose(
    np.asarray(scaled, np.float64) / scale, plain, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("levels", [1, 49, 98, 127])
def test_zero_is_a_level_of_qsgd(levels):
  vector = np.zeros(8, np.float32)
  vector[0] = 1.0
  received = compression.qsgd(levels).decode(
    compression.qsgd(levels).encode(vector, (), KEY)[0]
  )
  np.testing.assert_array_equal(received, vector)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: compression.stochastic_uniform(0), "bits=0"),
    (lambda: compression.stochastic_uniform(9), "bits=9"),
    (lambda: compression.stochastic_uniform(4, block=0), "block=0"),
    (lambda: compression.qsgd(0), "qsgd expected levels in .*levels=0"),
    (lambda: compression.qsgd(128), "levels=128"),
    (lambda: compression.tern_grad(clip=0), "tern_grad expected clip > 0"),
    (lambda: compression.sign(block=0), "sign expected block > 0"),
  ],
)
def test_what_is_out_of_range_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_codes_of_another_length_are_refused():
  payload = transmit(
    compression.qsgd(1), np.ones(50, np.float32), (), KEY
  ).payload
  message = wire.dumps(payload)
  assert wire.dumps(wire.loads(message)) == message
  longer = message[:-1] + bytes([message[-1] + 5])
  with pytest.raises(ValueError, match="codes should be"):
    wire.loads(longer)
