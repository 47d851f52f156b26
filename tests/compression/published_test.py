import jax
import numpy as np
import pytest

from fedjax_llm import compression

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


def gaussian(n):
  return np.random.default_rng(n).normal(size=n).astype(np.float32)


def squared_error(compressor, vector):
  """Relative."""
  state = compressor.init(vector)
  error = transmit(compressor, vector, state, KEY).received - vector
  return np.sum(np.square(error)) / np.sum(vector**2)


# Cubed, so that without the rotation the errors would be others.
HEAVY = gaussian(2**16) ** 3


@pytest.mark.parametrize(
  ("compressor", "error"),
  [
    (compression.drive(), 1 - 2 / np.pi),
    (compression.drive(unbiased=True), np.pi / 2 - 1),
    (compression.eden(1), np.pi / 2 - 1),
    (compression.eden(1, unbiased=False), 1 - 2 / np.pi),
    # 1 / (1 - e) - 1 of Max's e = 0.1175.
    (compression.eden(2), 0.1332),
    # Of a half: 2 (1 + e) - 1 with e = pi / 2 - 1; and 1 - (2 / pi) / 2.
    (compression.eden(0.5), np.pi - 1),
    (compression.eden(0.5, unbiased=False), 1 - 1 / np.pi),
  ],
)
def test_errors_after_a_rotation_are_the_published_ones(compressor, error):
  np.testing.assert_allclose(squared_error(compressor, HEAVY), error, rtol=0.03)


@pytest.mark.parametrize(
  "compressor",
  [
    compression.drive(unbiased=True),
    compression.eden(0.5),
    compression.eden(2),
  ],
)
def test_the_mean_of_many_is_the_vector(compressor):
  # The squared error of a mean is that of one over how many; Hadamard's matrix
  # is not all rotations, and bfloat16 rounds scales, for which some is left.
  # Blocks of other norms have scales of their own.
  vector, draws = gaussian(2048) * np.repeat(np.float32([1, 10]), 1024), 1000
  state = compressor.init(vector)
  many = jax.vmap(lambda key: transmit(compressor, vector, state, key).received)
  received = np.asarray(many(jax.random.split(KEY, draws)))
  for block in (slice(1024), slice(1024, None)):
    exact, arrived = vector[block], received[:, block]
    error = np.mean((arrived - exact) ** 2)
    bias = np.mean((arrived.mean(axis=0) - exact) ** 2)
    assert bias <= 1.2 * error / draws + 1e-5 * np.mean(exact**2)


def test_stc_is_the_papers_algorithm():
  vector = gaussian(100)
  compressor = compression.stc(0.1)
  received = transmit(compressor, vector, compressor.init(vector), KEY).received
  kept = np.argsort(-np.abs(vector))[:10]
  expected = np.zeros_like(vector)
  expected[kept] = np.abs(vector[kept]).mean() * np.sign(vector[kept])
  np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_ef_sign_sgd_is_the_papers_algorithm():
  compressor = compression.ef_sign_sgd()
  error, state = np.zeros(30), compressor.init(gaussian(30))
  for step in range(4):
    vector = np.roll(gaussian(30), step)
    target = vector + error
    expected = np.abs(target).mean() * np.where(target >= 0, 1, -1)
    error = target - expected
    received, state, _ = transmit(compressor, vector, state, KEY)
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_deep_gradient_compression_is_the_papers_algorithm():
  compressor = compression.deep_gradient_compression(0.2, momentum=0.9)
  velocity, gathered = np.zeros(20), np.zeros(20)
  state = compressor.init(gaussian(20))
  for step in range(5):
    vector = np.roll(gaussian(20), step)
    velocity = 0.9 * velocity + vector
    gathered = gathered + velocity
    sent = np.argsort(-np.abs(gathered), kind="stable")[:4]
    expected = np.zeros(20)
    expected[sent] = gathered[sent]
    velocity[sent] = gathered[sent] = 0
    received, state, _ = transmit(compressor, vector, state, KEY)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def test_without_momentum_it_is_top_k_with_error_feedback():
  both = (
    compression.deep_gradient_compression(0.2, momentum=0.0),
    compression.error_feedback(compression.top_k(0.2)),
  )
  states = [compressor.init(gaussian(20)) for compressor in both]
  for step in range(5):
    vector = np.roll(gaussian(20), step)
    sent = [
      transmit(compressor, vector, state, KEY)
      for compressor, state in zip(both, states, strict=True)
    ]
    states = [message.state for message in sent]
    np.testing.assert_allclose(sent[0].received, sent[1].received, rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: compression.eden(0), "got bits=0"),
    (lambda: compression.eden(1.5), "got bits=1.5"),
    (lambda: compression.eden(7), "got bits=7"),
    (
      lambda: compression.deep_gradient_compression(0.1, momentum=1),
      "momentum in",
    ),
    (lambda: compression.stc(0), "density in"),
  ],
)
def test_what_is_out_of_range_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
