"""What is measured of a codec, and that what transmits nothing is caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import distortion, pca
from fedjax_llm.compression import wire

CLIENTS, ROUNDS, N = 4, 6, 300
RANDOM = np.random.default_rng(0)
# What all clients share is most of an update.
SHARED = 2 * RANDOM.normal(size=N)
SNAPSHOTS = (SHARED + RANDOM.normal(size=(CLIENTS * ROUNDS, N))).astype("f4")
GROUPS = [np.arange(CLIENTS) + CLIENTS * i for i in range(4, ROUNDS)]
MEAN = SNAPSHOTS[: 4 * CLIENTS].mean(axis=0)
SCALE = float(np.sqrt((SNAPSHOTS**2).mean()))


def report(compressor):
  return distortion.report(
    compressor, SNAPSHOTS, GROUPS, mean=MEAN, scale=SCALE
  )


def test_ratios_of_a_worked_example():
  ones = np.ones(100, np.float32)
  received = ones + 0.1
  error = distortion.relative_squared_error(ones, received)
  np.testing.assert_allclose(error, 0.01, rtol=1e-4)
  np.testing.assert_allclose(distortion.snr_db(ones, received), 20, rtol=1e-4)
  paper = distortion.snr_of_the_paper(ones, received)
  np.testing.assert_allclose(paper, 1e4, rtol=1e-4)


def test_sending_zero_is_worth_nothing_but_n_by_the_papers_ratio():
  vector = RANDOM.normal(size=(3, 50))
  zero = np.zeros_like(vector)
  assert not distortion.snr_db(vector, zero).any()
  assert not distortion.cosine(vector, zero).any()
  paper = distortion.snr_of_the_paper(vector, zero)
  np.testing.assert_array_equal(paper, 50)


def test_noise_costs_its_variance():
  # The mean of n squares has a relative deviation of sqrt(2 / n).
  vector = RANDOM.normal(size=40_000).astype(np.float32)
  for sigma in (5e-3, 0.5):
    received = vector + sigma * RANDOM.normal(size=vector.size)
    error = distortion.relative_squared_error(vector, received)
    mean = float(error) * np.mean(vector**2)
    np.testing.assert_allclose(mean, sigma**2, rtol=4 * (2 / 40_000) ** 0.5)


def test_the_papers_table_is_of_its_own_ratio():
  # Table 1: 14.29 over 5.06e-12 per entry, of 8,388,608 entries.
  entries, error = 8_388_608, 5.06e-12
  vector = np.full((1, 64), np.sqrt(14.29 / 64))
  received = vector + np.sqrt(error * entries / 64)
  usual = 1 / distortion.relative_squared_error(vector, received)
  np.testing.assert_allclose(usual, 336_660, rtol=2e-2)
  np.testing.assert_allclose(usual * entries, 2.824e12, rtol=2e-2)
  decibels = distortion.snr_db(vector, received)
  np.testing.assert_allclose(decibels, 55.3, rtol=2e-3)


def test_a_cosine_is_of_the_angle_alone():
  vector = jnp.array([3.0, 4.0])
  for factor in (0.01, 1.0, 70.0):
    turned = factor * jnp.array([4.0, 3.0])
    np.testing.assert_allclose(distortion.cosine(vector, turned), 24 / 25)
  np.testing.assert_allclose(distortion.cosine(vector, -vector), -1, rtol=1e-6)


def sent(compressor, vector, key):
  return compression.transmit(compressor, vector, (), jax.random.key(key))


def test_constants_arrive_whatever_is_sent_and_take_no_bytes():
  for control, expected in (
    (distortion.zero(N), np.zeros(N)),
    (distortion.constant_mean(MEAN), MEAN),
  ):
    for vector in SNAPSHOTS[:2]:
      message = sent(control, vector, 0)
      np.testing.assert_array_equal(message.received, expected)
      assert message.payload.values.size == 0


def test_noise_is_of_its_seed_alone():
  control = distortion.gaussian_noise(0.5, N)
  one, other = sent(control, SNAPSHOTS[0], 0), sent(control, SNAPSHOTS[1], 0)
  np.testing.assert_array_equal(one.received, other.received)
  assert np.any(one.received != sent(control, SNAPSHOTS[0], 1).received)
  # Four standard errors of the standard deviation of N draws.
  np.testing.assert_allclose(np.std(one.received), 0.5, rtol=4 / np.sqrt(2 * N))
  arrived = control.decode(wire.loads(wire.dumps(one.payload)))
  np.testing.assert_array_equal(arrived, one.received)


def test_only_what_transmits_loses_by_confusing_clients():
  vectors = jnp.asarray(SNAPSHOTS[:CLIENTS])
  noisy = vectors + 0.5 * RANDOM.normal(size=vectors.shape)
  matched = distortion.relative_squared_error(vectors, noisy).mean()
  assert distortion.shuffled_error(vectors, noisy) > 1.1 * matched
  constant = jnp.tile(vectors.mean(axis=0), (CLIENTS, 1))
  error = np.sum((vectors - constant) ** 2) / np.sum(vectors**2)
  shuffled = distortion.shuffled_error(vectors, constant)
  np.testing.assert_allclose(shuffled, error, rtol=1e-5)


def np_cosine(x, y):
  return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def test_numbers_are_those_of_what_arrives():
  compressor = compression.top_k(0.3)
  found = report(compressor).codec
  error = energy = confused = 0
  cosines, innovations, aggregates = [], [], []
  for members in GROUPS:
    vectors = np.float64(SNAPSHOTS[members])
    arrived = np.zeros_like(vectors)
    for i, vector in enumerate(vectors):
      kept = np.argsort(-np.abs(vector))[: int(0.3 * N)]
      arrived[i, kept] = vector[kept]
    error += ((vectors - arrived) ** 2).sum()
    energy += (vectors**2).sum()
    cosines += [np_cosine(*pair) for pair in zip(vectors, arrived, strict=True)]
    # All innovations of a round together, as one vector.
    own = [x - x.mean(axis=0) for x in (vectors, arrived)]
    innovations.append(np_cosine(*own))
    aggregates.append(np_cosine(vectors.mean(axis=0), arrived.mean(axis=0)))
    for i, vector in enumerate(vectors):
      confused += ((vector - arrived[i - 1]) ** 2).sum()
  expected = [error / energy]
  expected += map(np.mean, (cosines, innovations, aggregates))
  expected.append(confused / energy)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rounds_of_other_norms_do_not_hide_who_is_confused():
  # One round is a thousand times as large as the other.
  random = np.random.default_rng(1)
  vectors = random.normal(size=(2 * CLIENTS, N)).astype(np.float32)
  vectors[CLIENTS:] *= 1e-3
  groups = [np.arange(CLIENTS), np.arange(CLIENTS, 2 * CLIENTS)]
  ignores = lambda x: jnp.broadcast_to(jnp.full(N, 2e-2), x.shape)
  found = distortion.quality(ignores, vectors, groups)
  assert found.shuffled_error == pytest.approx(
    found.relative_squared_error, rel=1e-5
  )


def test_what_transmits_passes():
  compressor = compression.lloyd_max(3)
  found = report(compressor)
  assert found.transmits and found.warning == ""
  assert set(found.controls) == {"zero", "constant_mean", "gaussian_noise"}
  assert found.controls["zero"].relative_squared_error == 1
  payload, _ = compressor.encode(SNAPSHOTS[0], (), jax.random.key(0))
  np.testing.assert_allclose(found.bits, 8 * len(wire.dumps(payload)) / N)


def test_what_is_no_better_than_the_mean_does_not_pass():
  # A sign tells clients from each other, but less than the mean tells of all.
  found = report(compression.sign())
  assert found.codec.innovation_cosine > 0.5
  assert not found.transmits
  assert "that of constant_mean" in found.warning


@pytest.mark.parametrize(
  ("control", "problem"),
  [
    (distortion.zero(N), "that of zero 1.0000"),
    (distortion.constant_mean(MEAN), "its innovation cosine is"),
    (distortion.constant_mean(0.9 * MEAN), "hardly worse off"),
    (distortion.gaussian_noise(SCALE, N), "that of constant_mean"),
  ],
)
def test_controls_do_not_pass(control, problem):
  found = report(control)
  assert not found.transmits
  assert problem in found.warning
  assert "eden" in found.warning and found.warning in found.describe()


def test_principal_components_of_white_innovations_do_not_pass():
  # Twelve directions of noise tell nothing of other noise.
  basis = pca.fit(SNAPSHOTS[: 4 * CLIENTS], 12)
  found = report(pca.pca(basis))
  error = found.codec.relative_squared_error
  mean = found.controls["constant_mean"].relative_squared_error
  np.testing.assert_allclose(error, mean, rtol=0.1)
  # A random direction in twelve of 300 has a cosine of about 1/5.
  np.testing.assert_allclose(found.codec.innovation_cosine, 0.2, atol=0.07)
