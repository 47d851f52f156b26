import jax
import numpy as np
import pytest

from fedjax_llm import compression

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


@pytest.mark.parametrize("n", [1, 5, 64, 100])
def test_a_rotation_keeps_norms_and_comes_back(n):
  vector = np.random.default_rng(n).normal(size=n).astype(np.float32)
  sent = transmit(compression.rotate(block=32), vector, (), KEY)
  norm = np.linalg.norm(sent.payload.values)
  np.testing.assert_allclose(norm, np.linalg.norm(vector), rtol=1e-5)
  np.testing.assert_allclose(sent.received, vector, atol=1e-5)


def test_it_is_hadamards_matrix_and_signs():
  eye = np.eye(8, dtype=np.float32)
  rotate = lambda row: transmit(compression.rotate(), row, (), KEY).payload
  rows = np.stack([rotate(row).values for row in eye])
  # Rows of a Hadamard matrix, of which some are negative.
  np.testing.assert_allclose(np.abs(rows), 1 / np.sqrt(8), rtol=1e-6)
  np.testing.assert_allclose(rows @ rows.T, eye, atol=1e-6)
  first = np.sign(rows[:, :1])
  bits = np.array([[bin(i & j).count("1") for j in range(8)] for i in range(8)])
  np.testing.assert_array_equal(np.sign(rows) * first, (-1.0) ** bits)


def test_no_entry_stands_out_after_it():
  vector = np.zeros(1024, np.float32)
  vector[3] = 1.0
  values = transmit(compression.rotate(), vector, (), KEY).payload.values
  np.testing.assert_allclose(np.abs(values), 1 / 32, rtol=1e-5)


def test_some_of_the_entries_bring_the_vector_on_average():
  vector = np.random.default_rng(0).normal(size=100).astype(np.float32)
  compressor = compression.rotate(block=32, density=1 / 4)
  many = jax.vmap(lambda key: transmit(compressor, vector, (), key))
  sent = many(jax.random.split(KEY, 4000))
  assert sent.payload.values.shape == (4000, 4 * 8)
  received = np.asarray(sent.received, np.float64)
  deviation = received.std(axis=0) / np.sqrt(4000)
  assert (np.abs(received.mean(axis=0) - vector) <= 5 * deviation + 1e-6).all()
  # Each with a quarter of the energy; three quarters are lost, or scaled.
  errors = np.sum((received - vector) ** 2, axis=1) / np.sum(vector**2)
  np.testing.assert_allclose(errors.mean(), 4 - 1, rtol=0.05)


def test_both_ends_may_have_other_settings():
  vector = np.ones(64, np.float32)
  sent = transmit(compression.rotate(), vector, (), KEY)
  with jax.threefry_partitionable(False):
    received = compression.rotate().decode(sent.payload)
  np.testing.assert_allclose(received, vector, atol=1e-5)


def test_a_block_that_is_no_power_of_two_is_refused():
  with pytest.raises(ValueError, match="a power of two, got block=12"):
    compression.rotate(block=12)
  with pytest.raises(ValueError, match="density in"):
    compression.rotate(density=0)
