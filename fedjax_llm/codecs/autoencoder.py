"""A fitted autoencoder as a compressor: the client encodes, the server decodes.

Both ends agree on a `Codec` before the first round. Its arrays are the leaves
of a pytree, so a codec can be an argument of a jitted round. Encoding does not
read the decoder's variables, nor decoding the encoder's. So a client receives
`setup_bytes` bytes once, and the decoder stays at the server.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from fedjax_llm import compression
from fedjax_llm.codecs import layouts, networks, pca
from fedjax_llm.compression import base, wire

# Number of latent entries that share a bfloat16 scale.
LATENT_BLOCK = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """What both ends agree on; `fitting.fit` makes it.

  Attributes:
    layout: how vectors become images; static.
    network: networks of both ends; static.
    scale: divisor of images, float32: one number, or one for each column. It is
      fixed, so messages do not contain it.
    encoder: variables of the encoder.
    decoder: variables of the decoder.
  """

  layout: layouts.Layout = dataclasses.field(metadata=dict(static=True))
  network: networks.Network = dataclasses.field(metadata=dict(static=True))
  scale: Any
  encoder: Any
  decoder: Any


def autoencoder(codec: Codec) -> base.Compressor:
  """Sends the latent of a vector.

  Args:
    codec: the codec. A client needs no `decoder`, and the server no `encoder`.

  Returns:
    A `Compressor` whose payload is a `pca.Latent`. Its values are quantised if
    the network has `bits`; otherwise they are float32, and a quantiser can
    follow in a `chain`.

  Raises:
    ValueError: from `encode`, if the vector has another length; from `decode`,
      if the latent has the size of another codec.
  """
  scale = codec.scale.reshape(1, -1)

  def encode(vector, key):
    del key  # Deterministic.
    image = codec.layout.pack(vector.astype(jnp.float32)) / scale
    latents: Any = codec.network.encoder.apply(codec.encoder, image[None])
    return pca.Latent(latents.ravel(), vector.size)

  def decode(payload):
    shape = latent_shape(codec.network, codec.layout)
    sizes = math.prod(shape), codec.layout.size
    pca.require_latent("the codec", payload, *sizes)
    latents = jnp.asarray(payload.values).reshape(1, *shape)
    images: Any = codec.network.decoder.apply(codec.decoder, latents)
    image = images.reshape(codec.layout.positions.shape)
    return codec.layout.unpack(image * scale)

  latent = base.stateless(encode, decode)
  quantiser = latent_quantiser(codec.network)
  return base.chain(latent, quantiser) if quantiser else latent


def latent_quantiser(network: networks.Network) -> base.Compressor | None:
  """The quantiser of latents; None if they are sent as float32."""
  if network.bits is None:
    return None
  return compression.lloyd_max(network.bits, block=LATENT_BLOCK)


def latent_shape(
  network: networks.Network, layout: layouts.Layout
) -> tuple[int, ...]:
  """Returns the shape of one latent, without the batch axis."""
  images = jax.ShapeDtypeStruct((1, *layout.positions.shape), "float32")
  init_with_output = network.encoder.init_with_output
  latents, _ = jax.eval_shape(init_with_output, jax.random.key(0), images)
  return latents.shape[1:]


def init(
  network: networks.Network, layout: layouts.Layout, key: PRNGKeyArray
) -> dict[str, Any]:
  """Draws the initial variables of both ends, "encoder" and "decoder"."""
  keys = jax.random.split(key)
  images = jnp.zeros((1, *layout.positions.shape))
  latents = jnp.zeros((1, *latent_shape(network, layout)))
  return {
    "encoder": jax.jit(network.encoder.init)(keys[0], images),
    "decoder": jax.jit(network.decoder.init)(keys[1], latents),
  }


def setup_bytes(codec: Codec) -> int:
  """Returns the bytes of the messages that a client needs before it can encode.

  They have the encoder's variables and the scale in float32 and, for a learned
  layout, the column of each entry. Names and shapes follow from the network and
  the adapter, which both ends know.
  """
  vector, _ = ravel_pytree((codec.scale, codec.encoder))
  total = wire.nbytes(base.Dense(vector))
  if codec.layout.is_learned:
    few = codec.layout.positions.shape[1] <= 256
    column = jax.ShapeDtypeStruct(
      (codec.layout.size,), np.uint8 if few else np.uint16
    )
    total += wire.nbytes(base.Dense(column))
  return total
