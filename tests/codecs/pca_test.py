import jax
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import distortion, pca
from fedjax_llm.compression import wire

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def received(basis, vector):
  return compression.transmit(pca.pca(basis), vector, (), KEY).received


def test_as_many_components_as_snapshots_bring_each_back():
  snapshots = RANDOM.normal(size=(9, 200)).astype(np.float32)
  basis = pca.fit(snapshots, 8)
  for snapshot in snapshots:
    np.testing.assert_allclose(received(basis, snapshot), snapshot, atol=4e-6)


def test_components_are_those_of_the_singular_value_decomposition():
  snapshots = RANDOM.normal(size=(9, 50)).astype(np.float32)
  snapshots *= np.linspace(1, 3, 9)[:, None].astype(np.float32)
  basis = pca.fit(snapshots, 3)
  _, _, directions = np.linalg.svd(snapshots - snapshots.mean(axis=0))
  np.testing.assert_allclose(
    np.abs(basis.components @ directions[:3].T), np.eye(3), atol=1e-4
  )
  np.testing.assert_allclose(basis.mean, snapshots.mean(axis=0), atol=1e-6)


def test_snapshots_of_few_ranks_have_as_many_components():
  left, right = RANDOM.normal(size=(9, 2)), RANDOM.normal(size=(2, 50))
  snapshots = (left @ right).astype(np.float32)
  basis = pca.fit(snapshots, 6)
  assert np.isfinite(basis.components).all()
  norms = np.linalg.norm(basis.components, axis=1)
  np.testing.assert_allclose(norms, [1, 1, 0, 0, 0, 0], atol=1e-3)
  np.testing.assert_allclose(
    received(basis, snapshots[0]), snapshots[0], atol=1e-4
  )


def test_on_white_data_k_of_n_is_the_share_that_arrives():
  train, test = RANDOM.normal(size=(2, 100, 400)).astype(np.float32)
  basis = pca.fit(train, 40)
  arrived = jax.vmap(lambda vector: received(basis, vector))(test)
  errors = distortion.relative_squared_error(test, arrived)
  np.testing.assert_allclose(errors.mean(), 1 - 40 / 400, atol=0.03)


def test_the_latent_alone_travels():
  basis = pca.fit(RANDOM.normal(size=(9, 200)).astype(np.float32), 4)
  vector = np.ones(200, np.float32)
  payload = compression.transmit(pca.pca(basis), vector, (), KEY).payload
  assert payload.values.nbytes == 16
  message = wire.dumps(payload)
  assert len(message) == wire.nbytes(payload) < 16 + 10
  arrived = pca.pca(basis).decode(wire.loads(message))
  np.testing.assert_array_equal(arrived, received(basis, vector))
  chained = compression.chain(pca.pca(basis), compression.stochastic_uniform(8))
  state = chained.init(vector)
  short = compression.transmit(chained, vector, state, KEY)
  assert short.payload.values.codes.nbytes == 4


def test_what_does_not_fit_is_refused():
  snapshots = RANDOM.normal(size=(4, 20)).astype(np.float32)
  for components in (0, 4):
    with pytest.raises(ValueError, match=r"in \[1, 3\], fewer than the 4"):
      pca.fit(snapshots, components)
  basis = pca.fit(snapshots, 2)
  with pytest.raises(ValueError, match="a vector of 20 entries, got"):
    received(basis, np.ones(21, np.float32))
  for latent in (pca.Latent(np.ones(3), 20), pca.Latent(np.ones(2), 21)):
    with pytest.raises(ValueError, match="2 entries for a vector of 20,"):
      pca.pca(basis).decode(latent)
