import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


def matrix(rank, seed=0, rows=20, columns=15):
  random = np.random.default_rng(seed)
  left, right = random.normal(size=(2, 20, rank))
  return (left[:rows] @ right[:columns].T).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_few_ranks_arrives(rank):
  vector = matrix(rank).ravel()
  compressor = compression.power_sgd(3, columns=15)
  sent = transmit(compressor, vector, compressor.init(vector), KEY)
  np.testing.assert_allclose(sent.received, vector, atol=1e-4)
  assert sent.payload.left.size + sent.payload.right.size == 3 * (20 + 15)


def test_steps_come_to_the_best_of_its_rank():
  vector = matrix(15).ravel()
  compressor = compression.power_sgd(2, columns=15)
  state = compressor.init(vector)
  for _ in range(100):
    received, state, _ = transmit(compressor, vector, state, KEY)
  values = np.linalg.svd(vector.reshape(20, 15), compute_uv=False)
  error = np.linalg.norm(received - vector)
  np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-3)


def test_a_step_is_the_published_one():
  # P = orth(M Q), Q' = M^T P, in NumPy.
  vector = matrix(15).ravel()
  compressor = compression.power_sgd(2, columns=15)
  start = compressor.init(vector)
  received, state, _ = transmit(compressor, vector, start, KEY)
  rows = vector.reshape(20, 15).astype(np.float64)
  basis, _ = np.linalg.qr(rows @ np.asarray(start, np.float64))
  np.testing.assert_allclose(
    received.reshape(20, 15), basis @ basis.T @ rows, atol=1e-4
  )
  np.testing.assert_allclose(
    # In units of the largest entry.
    np.linalg.norm(state) * np.abs(vector).max(),
    np.linalg.norm(basis.T @ rows),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ("vector", "rank", "columns"),
  [
    # One row that is not zero, and fewer rows than ranks.
    (np.append(np.arange(15), np.zeros(45)), 3, 15),
    (np.arange(100.0), 4, 50),
  ],
)
def test_ranks_that_a_matrix_has_not_add_nothing(vector, rank, columns):
  vector = vector.astype(np.float32)
  compressor = compression.power_sgd(rank, columns=columns)
  state = compressor.init(vector)
  for _ in range(3):
    received, state, _ = transmit(compressor, vector, state, KEY)
    np.testing.assert_allclose(received, vector, rtol=1e-4, atol=1e-3)
  # What was spared starts again from where it was.
  full = matrix(15).ravel()
  other = compression.power_sgd(2, columns=15)
  _, after, _ = transmit(other, matrix(1).ravel(), other.init(full), KEY)
  for _ in range(100):
    received, after, _ = transmit(other, full, after, KEY)
  values = np.linalg.svd(full.reshape(20, 15), compute_uv=False)
  error = np.linalg.norm(received - full)
  np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_vector_changes_nothing_else(scale):
  vector = matrix(15).ravel()
  compressor = compression.power_sgd(2, columns=15)
  outcomes = []
  for factor in (1.0, scale):
    state = compressor.init(vector)
    for _ in range(3):
      scaled = vector * np.float32(factor)
      received, state, _ = transmit(compressor, scaled, state, KEY)
    outcomes.append(np.asarray(received, np.float64) / factor)
  np.testing.assert_allclose(*outcomes, rtol=1e-3, atol=1e-3)


def test_a_vector_is_about_as_wide_as_high_unless_told():
  vector = jnp.arange(103.0)
  compressor = compression.power_sgd(1)
  payload = transmit(compressor, vector, compressor.init(vector), KEY).payload
  assert (payload.left.size, payload.right.size) == (11, 10)


@pytest.mark.parametrize("knobs", [{"rank": 0}, {"rank": 1, "columns": 0}])
def test_what_is_not_positive_is_refused(knobs):
  with pytest.raises(ValueError, match="power_sgd expected rank > 0"):
    compression.power_sgd(**knobs)
