"""The paper's networks: their numbers, and what a codec must not do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.codecs import networks

IMAGES = np.random.default_rng(0).normal(size=(3, 128, 128))
IMAGES = IMAGES.astype(np.float32)
ENCODER, DECODER = networks.ResNetEncoder(), networks.ResNetDecoder()


def shapes(module, *shape):
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), image)
  return variables, jax.eval_shape(module.apply, variables, image)


@pytest.fixture(scope="module")
def codec():
  """Parameters of both ends, and the latents of the images."""
  encoder = jax.jit(ENCODER.init)(jax.random.key(0), IMAGES)
  latents = jax.jit(ENCODER.apply)(encoder, IMAGES)
  decoder = jax.jit(DECODER.init)(jax.random.key(1), latents)
  return encoder, latents, decoder


@pytest.mark.parametrize(
  ("module", "shape", "count"),
  [(ENCODER, (1, 128, 128), 246_785), (DECODER, (1, 2, 2, 64), 246_698)],
)
def test_parameters_are_as_many_as_the_papers(module, shape, count):
  variables, _ = shapes(module, *shape)
  leaves = jax.tree.leaves(variables["params"])
  assert sum(math.prod(leaf.shape) for leaf in leaves) == count


@pytest.mark.parametrize(
  ("height", "width"), [(4096, 2048), (4096, 4096), (128, 192)]
)
def test_a_latent_is_exactly_a_64th(height, width):
  _, latent = shapes(ENCODER, 1, height, width)
  assert latent.shape == (1, height // 64, width // 64, 64)
  assert math.prod(latent.shape) * 64 == height * width
  _, image = shapes(DECODER, *latent.shape)
  assert image.shape == (1, height, width)


@pytest.mark.parametrize(
  ("module", "shape", "count"),
  [
    (ENCODER, (1, 4096, 2048), 754_974_720),
    (DECODER, (1, 64, 32, 64), 1_769_996_288),
  ],
)
def test_multiplications_are_as_many_as_counted_for_the_paper(
  module, shape, count, equations
):
  variables, _ = shapes(module, *shape)
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  products = 0  # Of all convolutions, at the grid of their outputs.
  for equation in equations(module.apply, variables, image):
    if equation.primitive.name == "conv_general_dilated":
      kernel, (output,) = equation.invars[1].aval, equation.outvars
      products += math.prod(output.aval.shape) * math.prod(kernel.shape[:3])
  assert products == count


def test_an_image_does_not_depend_on_those_beside_it(codec):
  encoder, latents, decoder = codec
  alone = jax.jit(ENCODER.apply)(encoder, IMAGES[1:2])
  np.testing.assert_allclose(alone[0], latents[1], rtol=1e-5, atol=1e-6)
  images = jax.jit(DECODER.apply)(decoder, latents)
  alone = jax.jit(DECODER.apply)(decoder, latents[1:2])
  np.testing.assert_allclose(alone[0], images[1], rtol=1e-5, atol=1e-6)
  assert (np.abs(images) < 1).all()


@pytest.mark.parametrize("sides", [(64, 128), (128, 96)])
def test_images_that_would_not_come_back_are_refused(sides):
  with pytest.raises(ValueError, match="at least 128, all multiples of 64"):
    shapes(ENCODER, 1, *sides)


def test_in_training_batches_are_normalised_by_themselves(codec):
  encoder, latents, _ = codec
  train = networks.ResNetEncoder(train=True)
  apply = jax.jit(lambda x: train.apply(encoder, x, mutable="batch_stats"))
  own, after = apply(3 * IMAGES)
  same, _ = apply(IMAGES)
  # Whatever the scale of a batch, it is as if it had none.
  np.testing.assert_allclose(own, same, rtol=1e-2, atol=1e-2)
  assert not np.allclose(same, latents, atol=1e-2)
  before = jax.tree.leaves(encoder["batch_stats"])
  moved = jax.tree.leaves(after["batch_stats"])
  assert not np.allclose(before[0], moved[0])


@pytest.mark.parametrize(
  ("network", "share"),
  [(networks.resnet(stem=5, linear=True), 64), (networks.convolutional(), 32)],
)
def test_other_networks_have_latents_of_a_constant_share(network, share):
  _, latent = shapes(network.encoder, 2, 128, 192)
  assert latent.size * share == 2 * 128 * 192
  _, image = shapes(network.decoder, *latent.shape)
  assert image.size == 2 * 128 * 192 and image.shape[0] == 2


def test_a_linear_head_is_not_bounded(codec):
  _, latents, decoder = codec
  linear = networks.ResNetDecoder(linear=True)
  free = jax.jit(linear.apply)(decoder, latents)
  images = jax.jit(DECODER.apply)(decoder, latents)
  np.testing.assert_allclose(np.tanh(free), images, atol=1e-6)


def test_sequences_that_would_not_come_back_are_refused():
  with pytest.raises(ValueError, match="a multiple of 32, got 5 x 7"):
    shapes(networks.ConvolutionalEncoder(), 1, 5, 7)
