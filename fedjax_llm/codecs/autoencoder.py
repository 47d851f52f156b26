"""A learned codec as a compressor: the client encodes, the server decodes.

`Codec` is what both ends agreed on before the first round. Its arrays are the
leaves of a pytree, so a codec may be an argument of a jitted round. Encoding
reads nothing of the decoder, decoding nothing of the encoder: a client is sent
`setup_bytes` once, and the server keeps the other half.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.codecs import layouts, networks, pca, row_network
from fedjax_llm.compression import base, wire

# Entries of a latent that share a scale, in bfloat16.
LATENT_BLOCK = 4096
FILES = ("codec.json", "codec.safetensors")
_VERSION = 1
_MODULES = {
  module.__name__: module
  for module in (
    *(networks.ResNetEncoder, networks.ResNetDecoder),
    *(networks.ConvolutionalEncoder, networks.ConvolutionalDecoder),
    *(row_network.RowEncoder, row_network.RowDecoder),
  )
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """What both ends agreed on; `fitting.fit` makes it.

  Attributes:
    arrangement: of vectors as images; static.
    network: of both ends; static.
    scale: float32, what images are divided by: one number, or one for each
      column. It is frozen, and no part of a message.
    encoder: variables of the network's encoder.
    decoder: variables of its decoder.
  """

  arrangement: layouts.Arrangement = dataclasses.field(
    metadata=dict(static=True)
  )
  network: networks.Network = dataclasses.field(metadata=dict(static=True))
  scale: Any
  encoder: Any
  decoder: Any


def autoencoder(codec: Codec) -> base.Compressor:
  """Sends the latent of a vector.

  Args:
    codec: of `fitting.fit`. At a client `decoder` may be anything, at the
      server `encoder`.

  Returns:
    A `Compressor` whose payload is a `pca.Latent`, of float32 for quantisers
    after it in a `chain`, or quantised already if the network's `bits` say so.
    It raises a `ValueError` for a vector of another length, or a latent.
  """
  scale = codec.scale.reshape(1, -1)

  def encode(vector, key):
    del key  # Deterministic.
    image = codec.arrangement.pack(vector.astype(jnp.float32)) / scale
    images = image[None, :, :, None]
    latents: Any = codec.network.encoder.apply(codec.encoder, images)
    return pca.Latent(latents.ravel(), vector.size)

  def decode(payload):
    shape = latent_shape(codec.network, codec.arrangement)
    expected = (int(np.prod(shape)), codec.arrangement.size)
    if (payload.values.size, payload.size) != expected:
      raise ValueError(
        f"the codec has latents of {expected[0]} entries for vectors of"
        f" {expected[1]}, the message {payload.values.size} for"
        f" {payload.size}. Both ends need one codec."
      )
    latents = jnp.asarray(payload.values).reshape(1, *shape)
    images: Any = codec.network.decoder.apply(codec.decoder, latents)
    image = images.reshape(codec.arrangement.positions.shape)
    return codec.arrangement.unpack(image * scale)

  latent = base.stateless(encode, decode)
  quantiser = latent_quantiser(codec.network)
  return base.chain(latent, quantiser) if quantiser else latent


def latent_quantiser(network: networks.Network) -> base.Compressor | None:
  """What latents are sent by; None if they are sent as they are."""
  if network.bits is None:
    return None
  return compression.lloyd_max(network.bits, block=LATENT_BLOCK)


def latent_shape(
  network: networks.Network, arrangement: layouts.Arrangement
) -> tuple[int, ...]:
  """The shape of one latent, from what is static alone."""
  image = jax.ShapeDtypeStruct((1, *arrangement.positions.shape, 1), "float32")
  init = network.encoder.init_with_output
  latents, _ = jax.eval_shape(init, jax.random.key(0), image)
  return latents.shape[1:]


def setup_bytes(codec: Codec) -> int:
  """The length of the messages that bring a client all it encodes by.

  The encoder's variables and the scale, in float32, and of an arrangement that
  is learned the column of each entry. Names and shapes follow from the network
  and the adapter, which both ends know.
  """
  vector, _ = ravel_pytree((codec.scale, codec.encoder))
  total = wire.nbytes(base.Dense(vector))
  if codec.arrangement.is_learned:
    few = codec.arrangement.positions.shape[1] <= 256
    column = jax.ShapeDtypeStruct(
      (codec.arrangement.size,), np.uint8 if few else np.uint16
    )
    total += wire.nbytes(base.Dense(column))
  return total


def save(folder: pathlib.Path, codec: Codec) -> None:
  """Writes a codec, as safetensors and what is static as JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  trees = {
    "encoder": codec.encoder,
    "decoder": codec.decoder,
    "scale": codec.scale,
    "positions": codec.arrangement.positions,
  }
  tensors = traverse_util.flatten_dict(jax.device_get(trees), sep="/")
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / FILES[1])
  fields = {
    "version": _VERSION,
    "arrangement": codec.arrangement.digest,
    "size": codec.arrangement.size,
    "is_learned": codec.arrangement.is_learned,
    "encoder": _described(codec.network.encoder),
    "decoder": _described(codec.network.decoder),
    "bits": codec.network.bits,
  }
  (folder / FILES[0]).write_text(json.dumps(fields, indent=2) + "\n")


def load(
  folder: pathlib.Path, arrangement: layouts.Arrangement | None = None
) -> Codec:
  """Reads a codec.

  Args:
    folder: what `save` wrote.
    arrangement: of the adapter that the codec is to serve; None for that which
      it was fitted on, unseen.

  Raises:
    ValueError: if there is none, it is of another release, or its arrangement
      is another one.
  """
  try:
    fields = json.loads((folder / FILES[0]).read_text())
    tensors = safetensors.numpy.load_file(folder / FILES[1])
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(f"cannot read a codec in {folder}: {error}") from error
  if fields.get("version") != _VERSION:
    raise ValueError(
      f"the codec in {folder} has version {fields.get('version')}, this release"
      f" reads version {_VERSION}."
    )
  found = layouts.Arrangement(
    tensors.pop("positions"),
    fields["size"],
    fields["arrangement"],
    fields["is_learned"],
  )
  if arrangement is not None and found != arrangement:
    raise ValueError(
      f"the codec in {folder} has arrangement {found.digest}, of {found.size}"
      f" entries, expected {arrangement.digest}, of {arrangement.size}. A codec"
      " serves the adapter that it was fitted on: its model, rank and modules."
    )
  trees = traverse_util.unflatten_dict(
    {name: jnp.asarray(x) for name, x in tensors.items()}, sep="/"
  )
  network = networks.Network(
    _module(fields["encoder"]), _module(fields["decoder"]), fields["bits"]
  )
  return Codec(found, network, **trees)


def _described(module: Any) -> list[Any]:
  """The name and the numbers of a module."""
  chosen = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name")
  }
  return [type(module).__name__, chosen]


def _module(described: list[Any]) -> Any:
  name, chosen = described
  return _MODULES[name](**chosen)
