"""The two halves of a codec, what they send and how they are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import autoencoder, layouts, networks, pca, row_network
from fedjax_llm.compression import base, wire

KEY = jax.random.key(0)
TREE = {"w": np.zeros((120, 131), np.float32)}
SIZE = 120 * 131


def made(network, layout, scale=1.0):
  """A codec of random variables."""
  variables = autoencoder.init(network, layout, KEY)
  return autoencoder.Codec(layout, network, jnp.full(1, scale), **variables)


@pytest.fixture(scope="module")
def resnet():
  return made(networks.resnet(), layouts.flat(TREE), 0.1)


NETWORKS = {
  "one-dimensional": lambda: (
    networks.convolutional(),
    layouts.columns(TREE, width=32),
  ),
  "rows": lambda: (
    row_network.network(64, latents=32, bits=1),
    layouts.ranked(TREE, np.arange(SIZE) % 7, width=64),
  ),
}


@pytest.fixture(scope="module", params=["resnet", *NETWORKS])
def codec(request, resnet):
  if request.param == "resnet":
    return resnet
  return made(*NETWORKS[request.param](), 0.1)


@pytest.fixture(scope="module")
def vector():
  random = np.random.default_rng(0)
  return (0.1 * random.normal(size=SIZE)).astype(np.float32)


# The codec is an argument, as in a jitted round.
@jax.jit
def encode(codec, vector):
  compressor = autoencoder.autoencoder(codec)
  return compressor.encode(vector, compressor.init(vector), KEY)[0]


@jax.jit
def decode(codec, payload):
  return autoencoder.autoencoder(codec).decode(payload)


def without(tree):
  """As a party that lacks it would have it."""
  return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)


def test_neither_end_reads_what_the_other_holds(codec, vector):
  client = dataclasses.replace(codec, decoder=without(codec.decoder))
  server = dataclasses.replace(codec, encoder=without(codec.encoder))
  payload, received = (
    encode(codec, vector),
    decode(codec, encode(codec, vector)),
  )
  assert np.isfinite(received).all()
  assert wire.dumps(encode(client, vector)) == wire.dumps(payload)
  arrived = wire.loads(wire.dumps(payload))
  np.testing.assert_array_equal(decode(server, arrived), received)
  # Not even their structure.
  compressor = autoencoder.autoencoder(dataclasses.replace(codec, decoder=None))
  state = jax.eval_shape(compressor.init, vector)
  jax.eval_shape(compressor.encode, vector, state, KEY)
  server = autoencoder.autoencoder(dataclasses.replace(codec, encoder=None))
  jax.eval_shape(server.decode, payload)


def test_what_arrives_is_the_autoencoder_of_what_was_sent(codec, vector):
  network, layout = codec.network, codec.layout

  @jax.jit
  def encoder(vector):
    padded = jnp.append(vector / codec.scale, 0)
    image = padded[layout.positions][None]
    return network.encoder.apply(codec.encoder, image)

  latents = encoder(vector)
  if network.bits:
    sent = compression.lloyd_max(network.bits, block=autoencoder.LATENT_BLOCK)
    arrived = base.transmit(sent, latents.ravel(), (), KEY).received
    latents = arrived.reshape(latents.shape)
  image = jax.jit(network.decoder.apply)(codec.decoder, latents)
  expected = np.zeros(SIZE + 1, np.float32)
  image = np.ravel(image) * np.float32(0.1)
  expected[layout.positions.ravel()] = image
  received = decode(codec, encode(codec, vector))
  np.testing.assert_array_equal(received, expected[:-1])


def test_llama_7b_sends_half_a_megabyte():
  of = lambda *shape: jax.ShapeDtypeStruct((32, *shape), np.float32)
  module = {"a": of(4096, 8), "b": of(8, 4096)}
  names = ("q_proj", "k_proj", "v_proj", "o_proj")
  layout = layouts.square(dict.fromkeys(names, module))
  network = networks.resnet()
  shape = autoencoder.latent_shape(network, layout)
  assert shape == (64, 32, 64)
  image = jax.ShapeDtypeStruct((1, 4096, 2048), np.float32)
  encoder = jax.eval_shape(network.encoder.init, KEY, image)
  codec = autoencoder.Codec(layout, network, np.ones(1), encoder, None)

  def payload(codec, vector):
    compressor = autoencoder.autoencoder(codec)
    short = compression.chain(compressor, compression.cast(jnp.bfloat16))
    send = lambda x: x.encode(vector, x.init(vector), KEY)[0]
    return send(compressor), send(short)

  vector = jax.ShapeDtypeStruct((8_388_608,), np.float32)
  whole, short = jax.eval_shape(payload, codec, vector)
  # A header of a few bytes.
  assert 524_288 < wire.nbytes(whole) < 524_288 + 20
  assert 262_144 < wire.nbytes(short) < 262_144 + 20


def test_the_encoder_is_sent_once_and_is_all_of_it(resnet):
  # 246,785 parameters; two moments of 1 + 126 + 6 * 64 channels; the scale.
  numbers = 246_785 + 2 * (1 + 126 + 6 * 64) + 1
  message = wire.dumps(base.Dense(np.zeros(numbers, np.float32)))
  assert autoencoder.setup_bytes(resnet) == len(message)
  lighter = dataclasses.replace(resnet, decoder=None)
  assert autoencoder.setup_bytes(lighter) == len(message)


def test_of_a_learned_layout_the_columns_are_sent_too():
  network = row_network.network(64, latents=32)
  plain = layouts.columns(TREE, width=64)
  ranked = layouts.ranked(TREE, np.ones(SIZE), width=64)
  extra = autoencoder.setup_bytes(made(network, ranked))
  extra -= autoencoder.setup_bytes(made(network, plain))
  message = wire.dumps(base.Dense(np.zeros(SIZE, np.uint8)))
  assert extra == len(message)


def test_vectors_and_latents_of_another_codec_are_refused(resnet):
  with pytest.raises(ValueError, match="vector of 15720 entries"):
    encode(resnet, np.ones(7, np.float32))
  latent = 2 * 2 * 64
  for wrong in (pca.Latent(np.ones(latent), 7), pca.Latent(np.ones(7), SIZE)):
    with pytest.raises(ValueError, match="latent of 256 entries for a vector"):
      decode(resnet, wrong)


def test_a_codec_serves_chains_and_error_feedback(vector):
  network = row_network.network(64, latents=20, bits=None)
  codec = made(network, layouts.columns(TREE, width=64), 0.1)
  short = compression.chain(
    autoencoder.autoencoder(codec), compression.stochastic_uniform(4)
  )
  compressor = compression.error_feedback(short)
  transmit = jax.jit(
    lambda state: compression.transmit(compressor, vector, state, KEY)
  )
  state, total = compressor.init(vector), 0
  for _ in range(3):
    sent = transmit(state)
    state, total = sent.state, total + sent.received
  residual, _ = state
  np.testing.assert_allclose(total + residual, 3 * vector, atol=1e-4)
