import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.codecs import measures

RANDOM = np.random.default_rng(0)


def test_ratios_of_a_worked_example():
  ones = np.ones(100, np.float32)
  received = ones + 0.1
  error = measures.relative_squared_error(ones, received)
  np.testing.assert_allclose(error, 0.01, rtol=1e-4)
  np.testing.assert_allclose(measures.snr_db(ones, received), 20, rtol=1e-4)
  paper = measures.snr_of_the_paper(ones, received)
  np.testing.assert_allclose(paper, 1e4, rtol=1e-4)


def test_sending_zero_is_worth_nothing_but_n_by_the_papers_ratio():
  vector = RANDOM.normal(size=(3, 50))
  zero = np.zeros_like(vector)
  assert not measures.snr_db(vector, zero).any()
  assert not measures.cosine(vector, zero).any()
  np.testing.assert_array_equal(measures.snr_of_the_paper(vector, zero), 50)


def test_noise_costs_its_variance():
  # The mean of n squares has a relative error of sqrt(2 / n).
  vector = RANDOM.normal(size=40_000).astype(np.float32)
  for sigma in (5e-3, 0.5):
    received = vector + sigma * RANDOM.normal(size=vector.size)
    error = measures.relative_squared_error(vector, received)
    mean = float(error) * np.mean(vector**2)
    np.testing.assert_allclose(mean, sigma**2, rtol=4 * (2 / 40_000) ** 0.5)


def test_the_papers_table_is_of_its_own_ratio():
  # Table 1: 14.29 over 5.06e-12 per entry, of 8,388,608 entries.
  entries, error = 8_388_608, 5.06e-12
  vector = np.full((1, 64), np.sqrt(14.29 / 64))
  received = vector + np.sqrt(error * entries / 64)
  usual = 1 / measures.relative_squared_error(vector, received)
  np.testing.assert_allclose(usual, 336_660, rtol=2e-2)
  np.testing.assert_allclose(usual * entries, 2.824e12, rtol=2e-2)
  np.testing.assert_allclose(measures.snr_db(vector, received), 55.3, rtol=2e-3)


def test_a_cosine_is_of_the_angle_alone():
  vector = jnp.array([3.0, 4.0])
  for factor in (0.01, 1.0, 70.0):
    turned = factor * jnp.array([4.0, 3.0])
    np.testing.assert_allclose(measures.cosine(vector, turned), 24 / 25)
  np.testing.assert_allclose(measures.cosine(vector, -vector), -1, rtol=1e-6)


def test_a_decoder_that_ignores_its_input_transmits_no_innovation():
  shared = 10 * RANDOM.normal(size=40)
  vectors = shared + RANDOM.normal(size=(5, 40))
  constant = np.tile(vectors.mean(axis=0), (5, 1))
  assert measures.cosine(vectors, constant).min() > 0.9
  assert measures.innovation_cosine(vectors, constant) == 0
  np.testing.assert_allclose(
    measures.innovation_cosine(vectors, vectors), 1, rtol=1e-5
  )
  shuffled = np.roll(vectors, 1, axis=0)
  assert measures.innovation_cosine(vectors, shuffled) < 0.1


def test_innovation_of_one_client_is_refused():
  with pytest.raises(ValueError, match="two clients or more, got 1"):
    measures.innovation_cosine(np.ones((1, 3)), np.ones((1, 3)))
