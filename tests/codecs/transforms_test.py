import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import transforms
from fedjax_llm.compression import wire

KEY = jax.random.key(0)
LAYERS = 10
SHAPES = {"a": (LAYERS, 40, 8), "b": (LAYERS, 8, 24), "scale": (24,)}
TREE = {k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in SHAPES.items()}
SIZE = sum(map(np.prod, SHAPES.values()))


def updates(count, seed):
  """Matrices whose rows and columns have axes of their own, some larger."""
  axes, random = np.random.default_rng(0), np.random.default_rng(seed)
  leaves = []
  for shape in SHAPES.values():
    x = random.normal(size=(count, *shape))
    if len(shape) == 3:
      for side in (1, 2):
        length = shape[side]
        turn = np.linalg.qr(axes.normal(size=(length, length)))[0]
        turn = np.geomspace(1, 0.1, length)[:, None] * turn
        x = np.moveaxis(np.moveaxis(x, side + 1, -1) @ turn, -1, side + 1)
    leaves.append(x.reshape(count, -1))
  return np.concatenate(leaves, axis=1).astype(np.float32)


TRANSFORM = transforms.fit(updates(60, 1), TREE)


@functools.partial(jax.jit, static_argnums=0)
def transmit(compressor, vector):
  return compression.transmit(compressor, vector, compressor.init(vector), KEY)


def test_coordinates_are_those_of_the_matrices_of_each_layer():
  (vector,) = updates(1, 2)
  turned = transmit(transforms.to_principal_axes(TRANSFORM), vector)
  values = turned.payload.values
  rows, columns = TRANSFORM.rotations[1]
  start = LAYERS * 40 * 8
  for layer in range(LAYERS):
    part = slice(start + layer * 192, start + (layer + 1) * 192)
    expected = (
      np.asarray(rows[layer], np.float32).T
      @ vector[part].reshape(8, 24)
      @ np.asarray(columns[layer], np.float32)
    )
    np.testing.assert_allclose(
      values[part], expected.ravel(), rtol=1e-4, atol=1e-5
    )
  # Of 40 rows, too many, and of what is no matrix there is no rotation.
  assert TRANSFORM.rotations[0][0] is None
  assert TRANSFORM.rotations[2] == (None, None)
  np.testing.assert_array_equal(values[-24:], vector[-24:])


def test_axes_are_those_of_the_covariance():
  snapshots = updates(60, 1)
  weights = 1 / np.linalg.norm(snapshots, axis=1)
  leaf = (snapshots * weights[:, None])[:, : LAYERS * 40 * 8].reshape(
    60, LAYERS, 40, 8
  )
  axes = np.asarray(TRANSFORM.rotations[0][1], np.float64)
  for layer in range(LAYERS):
    stacked = leaf[:, layer].reshape(-1, 8)
    _, _, directions = np.linalg.svd(stacked, full_matrices=False)
    np.testing.assert_allclose(
      np.abs(directions @ axes[layer]), np.eye(8), atol=0.02
    )


def test_what_is_turned_there_is_turned_back():
  (vector,) = updates(1, 2)
  received = transmit(transforms.to_principal_axes(TRANSFORM), vector).received
  # But for rotations in bfloat16.
  error = np.sum((received - vector) ** 2) / np.sum(vector**2)
  assert error < 1e-4


def test_the_profile_is_the_variance_of_coordinates():
  code = transforms.to_principal_axes(TRANSFORM)
  test = updates(400, 3)
  test *= np.sqrt(SIZE) / np.linalg.norm(test, axis=1, keepdims=True)
  values = jax.vmap(lambda x: code.encode(x, (), KEY)[0].values)(test)
  measured = np.mean(np.square(values), axis=0) + transforms._LEAST
  profile = transforms.profile(TRANSFORM)
  ratio = np.log2(measured / profile)
  assert np.abs(np.mean(ratio)) < 0.2 and np.std(ratio) < 0.5


def test_the_code_is_far_better_than_what_knows_nothing():
  code = transforms.transform_code(TRANSFORM, 1.5, memory=6)
  blind = compression.trellis(1.5, memory=6)
  for vector in updates(2, 4):
    errors = []
    for compressor in (code, blind):
      received, _, payload = transmit(compressor, vector)
      errors.append(np.sum((received - vector) ** 2) / np.sum(vector**2))
      assert 8 * wire.nbytes(payload) <= 1.6 * SIZE
    assert errors[0] < errors[1] / 1.5


def test_setup_is_the_length_of_a_message():
  numbers = np.concatenate([x.ravel() for x in jax.tree.leaves(TRANSFORM)])
  message = wire.dumps(compression.identity().encode(numbers, (), KEY)[0])
  assert transforms.setup_bytes(TRANSFORM) == len(message)


@pytest.mark.parametrize(
  "snapshots", [np.ones((2, SIZE - 1)), np.zeros((2, SIZE))]
)
def test_snapshots_that_do_not_fit_are_refused(snapshots):
  with pytest.raises(ValueError, match="not all zero"):
    transforms.fit(snapshots, TREE)


def test_vectors_of_another_length_are_refused():
  with pytest.raises(ValueError, match="serves the adapter"):
    transforms.to_principal_axes(TRANSFORM).encode(jnp.ones(3), (), KEY)
