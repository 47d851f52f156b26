"""Loads a Hugging Face model as Flax parameters, and saves it, without torch.

`models.layout` maps parameters to the names of a checkpoint's tensors. Layers
are stacked, and dense kernels stored as [out, in] are transposed. Other arrays
stay as they are.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import (
  families,
  heads,
  hub_config,
  layout,
  lora,
  quantized,
  tensor_files,
)

# The small Llama that the package ships; configs/pretrain.py trained it.
SHIPPED = pathlib.Path(__file__).parent / "python_llama"
_TEXTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
# The files of a repository that `load` needs: no pickles, no other formats.
_PATTERNS = [*_TEXTS, "*.safetensors"]
_META = "consolidated*"  # Weights under Meta's tensor names.
_IGNORED = ["*/*", _META]  # The folders hold intermediate checkpoints.
# The files that determine what a model or an adapter computes.
_IDENTITY = """config.json adapter_config.json classifier.json *.safetensors
*.safetensors.index.json tokenizer* *vocab* merges.txt added_tokens.json
special_tokens_map.json chat_template*""".split()


def resolve(name_or_folder: str | os.PathLike) -> pathlib.Path:
  """Returns the local folder of a model, downloading it from the hub if needed.

  Args:
    name_or_folder: a folder with a `config.json`, or a hub repository such as
      "meta-llama/Llama-3.2-1B". With `HF_HUB_OFFLINE=1`, only the hub's local
      cache is searched.

  Raises:
    ValueError: if there is no such folder and the hub has no such repository.
  """
  folder = pathlib.Path(name_or_folder)
  if folder.is_dir():
    return folder
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(name_or_folder), allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
      )
    )
  except (OSError, ValueError) as error:
    raise ValueError(
      "expected a model folder, or the name of a model on the Hugging Face hub"
      f" or in its local cache, got {str(name_or_folder)!r}: {error}"
    ) from error


def load(
  name_or_folder: str | os.PathLike,
  *,
  head: heads.Classifier | None = None,
  dtype: Any = jnp.float32,
  quantize: quantized.Format | None = None,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Loads the config and the parameters of a base model.

  Tensors are read and cast to `dtype` a few rows at a time. Each device gets
  only its own part. Quantised kernels are read layer by layer. At most about
  one stacked parameter is in host memory at a time
  (benchmarks/results/load_checkpoint.json has the measurements).

  Args:
    name_or_folder: a Hugging Face folder or hub name (see `resolve`).
    head: the classification head, or None. The head of the checkpoint is loaded
      if it has the same number of labels.
    dtype: the type of the loaded parameters.
    quantize: the format for the kernels of the layers; None for `dtype`.
    sharding: the sharding of every parameter; None for the first device.

  Returns:
    The config and the parameters of `families.model(config, head=head)`. If the
    checkpoint has no such head, they lack it; `heads.complete` adds a new one.

  Raises:
    ValueError: if tensors are missing, unexpected or of the wrong shape. The
      message lists all of them.
  """
  folder = resolve(name_or_folder)
  config = families.read_config(folder)
  names = families.of(config).layout
  model = families.model(config, head=head)
  shapes: Any = flax.traverse_util.flatten_dict(
    lora.abstract_variables(model)["params"]
  )
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with contextlib.ExitStack() as stack:
    stored = tensor_files.open_tensors(folder, names, stack)
    if head is not None:
      _leave_heads(names, shapes, stored)
    _check(folder, names, shapes, stored, head)
    if getattr(config, "tie_word_embeddings", False) and head is None:
      _check_tied(folder, names, shapes, stored)
    params = {}
    for path, leaf in shapes.items():
      within = _tensors(names, path, leaf.shape)
      if not stored.keys() >= within.keys():
        continue  # A new head: the checkpoint has none that fits.
      tensors = [stored[name] for name in within]
      array: Any = tensor_files.Parameter(
        tensors, names, path, leaf.shape, dtype
      )
      if quantize and path[0] == "layers" and path[-1] == "kernel":
        array = _quantized(array, quantize)
      place = lambda array: jax.make_array_from_callback(
        array.shape, sharding, array.__getitem__
      )
      # Waits, so that the host frees this copy before it reads the next one.
      params[path] = jax.block_until_ready(jax.tree.map(place, array))
  return config, flax.traverse_util.unflatten_dict(params)


def fingerprint(folder: pathlib.Path) -> str:
  """Returns the SHA-256 of the files that determine what a model computes.

  These are the config, weights and tokenizer of a model or an adapter. The name
  of the folder does not change the fingerprint.
  """
  found = {path for pattern in _IDENTITY for path in folder.glob(pattern)}
  found -= {*folder.glob(_META)}
  digest = hashlib.sha256()
  for path in sorted(found):
    with path.open("rb") as file:
      content = hashlib.file_digest(file, "sha256")
    digest.update(f"{path.name}\0{content.hexdigest()}\n".encode())
  return digest.hexdigest()


def save(
  folder: str | os.PathLike,
  config: Any,
  params: Mapping[str, Any],
  *,
  head: heads.Classifier | None = None,
  dtype: Any = jnp.bfloat16,
  like: pathlib.Path | None = None,
) -> None:
  """Writes a model folder that transformers loads.

  Args:
    folder: the folder to write; it is made if absent.
    config: the config of the model.
    params: the parameters of the model.
    head: the classification head, or None.
    dtype: the type of the stored tensors.
    like: the folder of a base model, or None. Its tokenizer, its generation
      settings and the fields of its config.json are copied.
  """
  made = config.to_hugging_face(head)
  fields = made
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if like is not None:
    for pattern in _TEXTS:
      for path in like.glob(pattern):
        if not path.name.endswith(".safetensors.index.json"):
          shutil.copy(path, folder)
    older = json.loads((like / "config.json").read_text())
    older.pop("torch_dtype", None)
    labels = hub_config.label_fields(head)
    labels |= {"architectures": made["architectures"]} if head else {}
    fields = made | older | labels
  fields["dtype"] = jnp.dtype(dtype).name
  (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
  tensor_files.write(folder, tensor_files.shards(_named(config, params, dtype)))


def _named(config, params, dtype) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of a checkpoint, one stacked parameter at a time."""
  names = families.of(config).layout
  flat: Any = flax.traverse_util.flatten_dict(
    dict(params), is_leaf=lambda _, x: not isinstance(x, Mapping)
  )
  for path, leaf in flat.items():
    leaf = np.asarray(quantized.dequantize(leaf, dtype))
    for layer, array in layout.unstack(path, leaf):
      if names.is_transposed(path):
        array = array.swapaxes(-1, -2)
      name = names.stored_name(names.tensor_name(path, layer))
      yield name, np.ascontiguousarray(array)


def _tensors(
  names: layout.Layout, path: layout.Path, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
  """Returns the names and shapes of the tensors that hold a parameter."""
  # A broadcast view of one number takes no memory.
  whole = np.broadcast_to(0, shape)
  whole = whole.swapaxes(-1, -2) if names.is_transposed(path) else whole
  return {
    names.tensor_name(path, layer): part.shape
    for layer, part in layout.unstack(path, whole)
  }


def _quantized(kernel: Any, format: quantized.Format) -> Any:
  """Quantises a parameter with one layer in memory at a time."""
  layers = (
    quantized.quantize(kernel[layer : layer + 1, :, :], format)
    for layer in range(kernel.shape[0])
  )
  join = lambda *parts: np.concatenate(parts)
  return jax.tree.map(join, *map(jax.device_get, layers))


def _leave_heads(names, shapes, stored):
  """Removes the stored head if it has another number of labels."""
  tensors = {}
  for path, leaf in shapes.items():
    if path[0] in names.heads:
      tensors |= _tensors(names, path, leaf.shape)
  found = stored.keys() & tensors.keys()
  if any(tuple(stored[x].get_shape()) != tensors[x] for x in found):
    for name in found:
      del stored[name]


def _check_tied(folder, names, shapes, stored):
  """Raises an error if the output matrix differs from the tied embedding."""
  output = stored.get("lm_head.weight")
  if output is None:
    return
  size = output.get_shape()[0]
  rows = [slice(x, min(x + 4096, size)) for x in range(0, size, 4096)]
  tables = [
    stored[names.tensor_name(path, None)]
    for path, leaf in shapes.items()
    if path[-1] == "embedding" and list(leaf.shape) == output.get_shape()
  ]
  same = lambda table: all(np.array_equal(table[x], output[x]) for x in rows)
  if not any(map(same, tables)):
    raise ValueError(
      f"expected lm_head.weight in {folder} to equal the embedding, as its"
      " config.json ties the two, got another matrix. Set tie_word_embeddings"
      " to false in config.json."
    )


def _check(folder, names, shapes, stored, head):
  """Raises one error that lists every tensor that does not fit."""
  problems, expected = [], {}
  for path, leaf in shapes.items():
    tensors = _tensors(names, path, leaf.shape)
    expected |= tensors
    if head is None or path[0] not in names.heads:
      problems += [f"missing {name}" for name in tensors if name not in stored]
  for name, tensor in stored.items():
    if name in expected:
      if (shape := tuple(tensor.get_shape())) != expected[name]:
        problems.append(f"{name} has shape {shape}, not {expected[name]}")
    elif not names.is_optional(name):
      problems.append(f"unexpected {name}")
  if problems:
    raise ValueError(
      f"expected tensors in {folder} that fit its config.json. Download the"
      " model again, or correct its config.json. Problems:\n  "
      + "\n  ".join(problems)
    )
