import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import segments, sparse, supports, wire

KEY = jax.random.key(0)


def send(compressor, vector):
  state = compressor.init(vector)
  transmit = jax.jit(functools.partial(compression.transmit, compressor))
  return transmit(jnp.asarray(vector), state, KEY)


def test_each_segment_keeps_its_own_largest_entries():
  rng = np.random.default_rng(0)
  # Two equal segments, which are one program, an empty one, a smaller one.
  sizes, densities = (20, 20, 0, 7), (0.3, 0.3, 0.5, 0.29)
  vector = rng.normal(size=47).astype(np.float32)
  vector[:20] *= 1000
  expected, start = np.zeros_like(vector), 0
  for size, count in zip(sizes, (6, 6, 0, 2), strict=True):
    part = vector[start : start + size]
    kept = start + np.argsort(-abs(part), kind="stable")[:count]
    expected[kept] = vector[kept]
    start += size
  message = send(segments.top_k_per_segment(sizes, densities), vector)
  np.testing.assert_array_equal(message.received, expected)
  assert wire.entries(message.payload) == 14


def test_one_segment_is_top_k_to_the_byte():
  vector = np.random.default_rng(1).normal(size=100).astype(np.float32)
  got = send(segments.top_k_per_segment([100], [0.29]), vector).payload
  expected = send(sparse.top_k(0.29), vector).payload
  assert wire.dumps(got) == wire.dumps(expected)


def test_a_support_that_only_the_sender_knows_travels():
  vector = np.arange(1, 65, dtype=np.float32)
  mask = np.arange(64) % 16 == 3
  message = send(segments.send_mask(mask, 4), vector)
  np.testing.assert_array_equal(message.received, np.where(mask, vector, 0))
  assert message.payload.support.size == supports.nbytes(64, 4)


def test_what_is_kept_is_scaled_to_the_magnitudes_of_the_whole():
  whole = np.array([1, -3, 2, 2, 5, 0, 0], np.float32)
  kept = np.array([0, -3, 2, 0, 0, 0, 0], np.float32)
  got = segments.rescale_each(kept, whole, (2, 2, 1, 0, 2))
  np.testing.assert_allclose(got, [0, -4, 4, 0, 0, 0, 0])


@pytest.mark.parametrize("densities", [(0.5,), (0.5, 0.0), (0.5, 1.5)])
def test_densities_that_do_not_fit_are_refused(densities):
  with pytest.raises(ValueError, match="for each segment"):
    segments.top_k_per_segment((4, 4), densities)


def test_a_vector_of_another_length_is_refused():
  with pytest.raises(ValueError, match="expected 8 scores"):
    send(
      segments.top_k_per_segment((4, 4), (0.5, 0.5)), np.zeros(9, np.float32)
    )
