import jax
import numpy as np
import pytest

from fedjax_llm.codecs import row_network

IMAGES = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)


def test_rows_are_coded_each_by_itself_and_zero_is_zero():
  network = row_network.network(6, latents=4)
  apply = jax.jit(network.encoder.apply)
  latents, encoder = network.encoder.init_with_output(jax.random.key(0), IMAGES)
  assert latents.shape == (2, 9, 4)
  turned = apply(encoder, IMAGES[:, ::-1])
  np.testing.assert_allclose(turned, latents[:, ::-1], rtol=1e-5, atol=1e-6)
  images, decoder = network.decoder.init_with_output(jax.random.key(1), latents)
  assert images.shape == IMAGES.shape
  assert not network.decoder.apply(
    decoder, 0 * apply(encoder, 0 * IMAGES)
  ).any()


def test_a_codec_starts_from_the_last_columns():
  network = row_network.network(6, latents=4)
  latents, _ = network.encoder.init_with_output(jax.random.key(0), IMAGES)
  # A hundredth of noise.
  np.testing.assert_allclose(latents, IMAGES[:, :, 2:], atol=0.05)
  images, _ = network.decoder.init_with_output(jax.random.key(1), latents)
  np.testing.assert_allclose(images[:, :, 2:], IMAGES[:, :, 2:], atol=0.1)
  np.testing.assert_allclose(images[:, :, :2], 0, atol=0.1)


def test_numbers_out_of_range_are_refused():
  for width, latents in ((6, 0), (0, 3)):
    with pytest.raises(ValueError, match="width and latents > 0"):
      row_network.network(width, latents=latents)
