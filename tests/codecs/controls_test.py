import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import compression
from fedjax_llm.codecs import controls, measures
from fedjax_llm.compression import wire

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(5, 400)).astype(np.float32)


def sent(compressor, vector, key):
  return compression.transmit(compressor, vector, (), jax.random.key(key))


def test_constants_arrive_whatever_is_sent_and_take_no_bytes():
  mean = VECTORS.mean(axis=0)
  for control, expected in (
    (controls.zero(400), np.zeros(400)),
    (controls.constant_mean(mean), mean),
  ):
    for vector in VECTORS[:2]:
      message = sent(control, vector, 0)
      np.testing.assert_array_equal(message.received, expected)
      assert message.payload.values.size == 0


def test_noise_is_of_its_seed_alone():
  control = controls.gaussian_noise(0.5, 400)
  one, other = sent(control, VECTORS[0], 0), sent(control, VECTORS[1], 0)
  np.testing.assert_array_equal(one.received, other.received)
  assert np.any(one.received != sent(control, VECTORS[0], 1).received)
  # Four standard errors of a standard deviation of 400 draws.
  np.testing.assert_allclose(np.std(one.received), 0.5, rtol=4 / np.sqrt(800))
  arrived = control.decode(wire.loads(wire.dumps(one.payload)))
  np.testing.assert_array_equal(arrived, one.received)


def test_only_what_transmits_loses_by_confusing_clients():
  mean = 3 * RANDOM.normal(size=400)
  vectors = jnp.asarray(mean + VECTORS, jnp.float32)
  noisy = vectors + 0.5 * RANDOM.normal(size=vectors.shape)
  matched = measures.relative_squared_error(vectors, noisy).mean()
  assert controls.shuffled_clients(vectors, noisy) > 1.1 * matched
  constant = jnp.tile(vectors.mean(axis=0), (5, 1))
  error = np.sum((vectors - constant) ** 2) / np.sum(vectors**2)
  shuffled = controls.shuffled_clients(vectors, constant)
  np.testing.assert_allclose(shuffled, error, rtol=1e-5)


def test_confused_clients_get_each_others_vectors():
  received = VECTORS + 1
  error = 0.0
  for i, vector in enumerate(VECTORS):
    error += np.sum((vector - received[i - 1]) ** 2)
  expected = error / np.sum(VECTORS**2)
  found = controls.shuffled_clients(VECTORS, received)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
