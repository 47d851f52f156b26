"""The gate: what transmits passes it, what does not is told what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import controls, measures, pca, reports
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
  return reports.report(compressor, SNAPSHOTS, GROUPS, mean=MEAN, scale=SCALE)


def test_numbers_are_those_of_what_arrives():
  compressor = compression.top_k(0.3)
  found = report(compressor).codec
  error = energy = 0
  cosines, innovations, aggregates, shuffled = [], [], [], []
  for members in GROUPS:
    vectors = SNAPSHOTS[members]
    arrived = np.zeros_like(vectors)
    for i, vector in enumerate(vectors):
      kept = np.argsort(-np.abs(vector))[: int(0.3 * N)]
      arrived[i, kept] = vector[kept]
    error += ((vectors - arrived) ** 2).sum()
    energy += (vectors**2).sum()
    cosines += list(measures.cosine(vectors, arrived))
    innovations.append(measures.innovation_cosine(vectors, arrived))
    aggregates.append(measures.cosine(vectors.mean(0), arrived.mean(0)))
    other = arrived[[3, 0, 1, 2]]
    shuffled.append(((vectors - other) ** 2).sum())
  expected = [error / energy]
  expected += map(np.mean, (cosines, innovations, aggregates))
  expected.append(sum(shuffled) / energy)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rounds_of_other_norms_do_not_hide_who_is_confused():
  # One round is a thousand times as large as the other.
  random = np.random.default_rng(1)
  vectors = random.normal(size=(2 * CLIENTS, N)).astype(np.float32)
  vectors[CLIENTS:] *= 1e-3
  groups = [np.arange(CLIENTS), np.arange(CLIENTS, 2 * CLIENTS)]
  ignores = lambda x: jnp.broadcast_to(jnp.full(N, 2e-2), x.shape)
  found = reports.quality(ignores, vectors, groups)
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
    (controls.zero(N), "that of zero 1.0000"),
    (controls.constant_mean(MEAN), "its innovation cosine is"),
    (controls.constant_mean(0.9 * MEAN), "hardly worse off"),
    (controls.gaussian_noise(SCALE, N), "that of constant_mean"),
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
