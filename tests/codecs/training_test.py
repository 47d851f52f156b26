"""A step's loss is the error of what a fitted codec would send."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.codecs import autoencoder, layouts, row_network, training
from fedjax_llm.compression import base, quantize

SIZE, WIDTH = 75, 8
LAYOUT = layouts.columns({"w": np.zeros(SIZE)}, width=WIDTH)
RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(3, SIZE)).astype(np.float32)
SCALE = jnp.linspace(0.5, 2, WIDTH)


@pytest.mark.parametrize("bits", [None, 1, 2])
def test_the_loss_is_the_mean_squared_error_of_what_arrives(bits):
  network, optimizer = (
    row_network.network(WIDTH, latents=5, bits=bits),
    optax.sgd(1.0),
  )
  variables = autoencoder.init(network, LAYOUT, jax.random.key(0))
  step = jax.jit(training.step(network, LAYOUT, optimizer, SCALE))
  memory = optimizer.init(training.parameters_of(variables))
  after, memory, loss = step(variables, memory, VECTORS)
  codec = autoencoder.Codec(LAYOUT, network, SCALE, **variables)
  compressor = autoencoder.autoencoder(codec)
  total = 0.0
  for vector in VECTORS:
    state = compressor.init(vector)
    sent = base.transmit(compressor, vector, state, jax.random.key(0))
    total += np.mean((vector - sent.received) ** 2)
  unit = np.mean(np.square(SCALE))
  np.testing.assert_allclose(loss, total / 3 / unit, rtol=1e-5)
  # A single step of a quantised network may go either way.
  for _ in range(20):
    after, memory, last = step(after, memory, VECTORS)
  assert last < loss - 0.002


def test_the_gradient_passes_the_quantiser_as_if_it_were_not_there():
  """By hand, for the decoder's kernel and the encoder's behind it."""
  network, optimizer = (
    row_network.network(WIDTH, latents=3, bits=1),
    optax.sgd(1.0),
  )
  variables = autoencoder.init(network, LAYOUT, jax.random.key(0))
  ones = jnp.ones(1)
  step = jax.jit(training.step(network, LAYOUT, optimizer, ones))
  memory = optimizer.init(training.parameters_of(variables))
  after, _, _ = step(variables, memory, VECTORS[:1])
  kernel = lambda tree, end: np.float64(jax.tree.leaves(tree[end]["params"])[0])
  encode, decode = (kernel(variables, end) for end in ("encoder", "decoder"))
  padded = np.append(np.float64(VECTORS[0]), 0)
  image = padded[LAYOUT.positions]
  latents = image @ encode
  # One bit and one scale, that of least squared error.
  scale = np.float64(jnp.bfloat16(np.abs(latents).mean()))
  arrived = scale * np.sign(latents)
  is_real = LAYOUT.positions < SIZE
  slope = 2 * is_real * (arrived @ decode - image) / SIZE
  root_mean_square = np.sqrt(np.mean(latents**2))
  limit = 2 * quantize.gaussian_levels(1)[-1] * root_mean_square
  passes = np.abs(latents) < limit
  assert 0 < passes.mean() < 1
  expected = {
    "decoder": decode - arrived.T @ slope,
    "encoder": encode - image.T @ (slope @ decode.T * passes),
  }
  for end, value in expected.items():
    np.testing.assert_allclose(kernel(after, end), value, rtol=1e-3, atol=1e-4)
