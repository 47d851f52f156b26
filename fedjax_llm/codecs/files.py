"""Saves and loads codecs: folders of `codec.json` and `codec.safetensors`.

The first file has the static fields, and facts such as what the codec was
fitted to. The second file has the arrays. Both kinds of codec, autoencoders and
transforms, are supported.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from fedjax_llm.codecs import (
  autoencoder,
  layouts,
  networks,
  row_network,
  transforms,
)
from fedjax_llm.federated import parameters

Codec = autoencoder.Codec | transforms.Transform
_STATIC, _ARRAYS = "codec.json", "codec.safetensors"
_VERSION = 3
_MODULES = {
  module.__name__: module
  for module in (
    networks.ResNetEncoder,
    networks.ResNetDecoder,
    networks.ConvolutionalEncoder,
    networks.ConvolutionalDecoder,
    row_network.Rows,
  )
}


def save(
  folder: str | os.PathLike, codec: Codec, about: Mapping[str, Any]
) -> None:
  """Writes a codec to a folder.

  Args:
    folder: folder to write to; made if absent.
    codec: a codec of either kind.
    about: facts about the codec for the JSON file, such as what it was fitted
      to.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  is_transform = isinstance(codec, transforms.Transform)
  static, arrays = (_of_transform if is_transform else _of_autoencoder)(codec)
  tensors = {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      np.ascontiguousarray(x)
    )
    for path, x in jax.tree.leaves_with_path(jax.device_get(arrays))
  }
  safetensors.numpy.save_file(tensors, folder / _ARRAYS)
  fields = {"version": _VERSION, **static, "about": dict(about)}
  (folder / _STATIC).write_text(json.dumps(fields, indent=2) + "\n")


def load(
  folder: str | os.PathLike, trainable: Any
) -> tuple[Codec, dict[str, Any]]:
  """Reads a codec, and prints the warning that was saved with it, if any.

  Args:
    folder: folder that `save` wrote.
    trainable: tree of the updates to compress, or its shapes.

  Returns:
    The codec, and the facts that `save` wrote plus `fingerprint`, a hash of the
    arrays.

  Raises:
    ValueError: if the folder has no codec that this release can read, or if the
      codec was fitted to a tree with other paths or shapes.
  """
  folder = pathlib.Path(folder)
  try:
    fields = json.loads((folder / _STATIC).read_text())
    tensors = safetensors.numpy.load_file(folder / _ARRAYS)
    written = (folder / _ARRAYS).read_bytes()
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"expected a codec in {folder}, got {error}. `fedjax-llm run tgap` makes"
      " runs/tgap/codec."
    ) from error
  if fields.get("version") != _VERSION:
    raise ValueError(
      f"the codec in {folder} has version {fields.get('version')}, this release"
      f" reads version {_VERSION}. Run tgap again."
    )
  if fields["signature"] != parameters.signature(trainable):
    raise ValueError(
      f"the codec in {folder} was fitted to an adapter of other layers or"
      " shapes. Give the model, rank and targets that it was recorded with, or"
      " run tgap with yours."
    )
  about = fields["about"]
  about["fingerprint"] = hashlib.sha256(written).hexdigest()[:16]
  if warning := about.get("warning"):
    print(f"warning: {folder}: {warning}")
  make = _transform if fields["kind"] == "transform" else _autoencoder
  return make(fields, tensors), about


def _of_transform(transform):
  """Returns the static fields, and a tree of arrays."""
  static = {
    "kind": "transform",
    "signature": transform.signature,
    "shapes": transform.shapes,
  }
  return static, {
    "rotations": transform.rotations,
    "variances": transform.variances,
  }


def _transform(fields, tensors):
  shapes = tuple(map(tuple, fields["shapes"]))
  pairs = lambda kind: tuple(
    tuple(tensors.get(f"{kind}/{number}/{side}") for side in range(2))
    for number in range(len(shapes))
  )
  return transforms.Transform(
    pairs("rotations"), pairs("variances"), shapes, fields["signature"]
  )


def _of_autoencoder(codec):
  """Returns the static fields, and a tree of arrays."""
  static = {
    "kind": "autoencoder",
    "signature": codec.layout.signature,
    "size": codec.layout.size,
    "is_learned": codec.layout.is_learned,
    "encoder": _described(codec.network.encoder),
    "decoder": _described(codec.network.decoder),
    "bits": codec.network.bits,
  }
  return static, {
    "encoder": codec.encoder,
    "decoder": codec.decoder,
    "scale": codec.scale,
    "positions": codec.layout.positions,
  }


def _autoencoder(fields, tensors):
  layout = layouts.Layout(
    tensors.pop("positions"),
    fields["size"],
    fields["signature"],
    fields["is_learned"],
  )
  encoder, decoder = (
    _MODULES[name](**settings)
    for name, settings in (fields["encoder"], fields["decoder"])
  )
  network = networks.Network(encoder, decoder, fields["bits"])
  arrays = {name: jnp.asarray(x) for name, x in tensors.items()}
  trees = traverse_util.unflatten_dict(arrays, sep="/")
  return autoencoder.Codec(layout, network, **trees)


def _described(module):
  """Returns the name and the settings of a module."""
  settings = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name")
  }
  return [type(module).__name__, settings]
