"""Hugging Face folder or hub name -> Flax parameters, and back, without torch.

What a checkpoint's tensors are called is in `models.layout`; kernels of dense
layers are transposed, layers stacked, everything else is the same array.
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

# The small Llama that the package ships, see configs/pretrain.py.
SHIPPED = pathlib.Path(__file__).parent / "python_llama"
# The files of a repository that loading needs: no pickles, no other formats.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
# Checkpoints of the training, and weights in Meta's names.
_IGNORED = ["*/*", "consolidated*"]


def resolve(name_or_folder: str | os.PathLike) -> pathlib.Path:
  """The local folder of a model: itself, or its snapshot from the hub.

  Args:
    name_or_folder: a folder with a `config.json`, or a hub repository such as
      "meta-llama/Llama-3.2-1B". With `HF_HUB_OFFLINE=1` only the hub's local
      cache is searched.

  Raises:
    ValueError: if it is neither.
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
  except (OSError, ValueError) as error:  # Of the hub, its cache or the name.
    raise ValueError(
      f"{str(name_or_folder)!r} is neither a folder nor a model that the"
      f" Hugging Face hub or its local cache gives: {error}"
    ) from error


def load(
  name_or_folder: str | os.PathLike,
  *,
  head: heads.Classifier | None = None,
  dtype: Any = jnp.float32,
  quantize: quantized.Format | None = None,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Loads the shape and the parameters of a base model.

  Tensors are read some rows at a time, straight into `dtype`; only the part
  that a device holds, unless they are quantised first, layer by layer. Beside
  the model, about one stacked parameter is in host memory: what that comes to
  is in benchmarks/results/load_checkpoint.json.

  Args:
    name_or_folder: a Hugging Face folder or hub name (see `resolve`).
    head: what classifies a row, if the model is no language model. The head of
      the checkpoint is loaded if it has one of as many labels.
    dtype: what the parameters are stored in.
    quantize: store the kernels of the layers in this format instead.
    sharding: of every parameter; the first device's if None.

  Returns:
    The config, and the parameters as `families.model(config, head=head)` takes
    them.

  Raises:
    ValueError: listing every missing, unexpected or mis-shaped tensor.
  """
  folder = resolve(name_or_folder)
  config = families.read_config(folder)
  names = families.of(config).layout
  shapes = _parameter_shapes(config, head)
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
      within = [name for name, _ in _tensors(names, path, leaf.shape)]
      if within[0] not in stored:
        continue  # A head that is yet to be trained.
      tensors = [stored[name] for name in within]
      array: Any = tensor_files.Parameter(
        tensors, names, path, leaf.shape, dtype
      )
      if quantize and path[0] == "layers" and path[-1] == "kernel":
        array = _quantized(array, quantize)
      place = lambda array: jax.make_array_from_callback(
        array.shape, sharding, array.__getitem__
      )
      # Waits, so that the host's copy is gone before the next one is made.
      params[path] = jax.block_until_ready(jax.tree.map(place, array))
  return config, flax.traverse_util.unflatten_dict(params)


def fingerprint(folder: pathlib.Path) -> str:
  """SHA-256 of a model folder's shape and weights, wherever it lies."""
  digest = hashlib.sha256()
  files = [*folder.glob("*config.json"), *sorted(folder.glob("*.safetensors"))]
  for path in files:
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
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
  """Writes a model folder as transformers loads it.

  Args:
    folder: where to; made if absent.
    config: the model's shape.
    params: its parameters.
    head: what classifies a row, if the model is no language model.
    dtype: what the tensors are stored in.
    like: folder of a base model, whose tokenizer, token ids and settings of
      generation are kept.
  """
  made = config.to_hugging_face(head)
  fields = made
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if like is not None:
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
      for path in like.glob(pattern):
        if not path.name.endswith(".safetensors.index.json"):
          shutil.copy(path, folder)
    older = json.loads((like / "config.json").read_text())
    older.pop("torch_dtype", None)
    of_head = hub_config.label_fields(head)
    of_head |= {"architectures": made["architectures"]} if head else {}
    fields = made | older | of_head
  fields["dtype"] = jnp.dtype(dtype).name
  (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
  tensor_files.write(folder, tensor_files.shards(_named(config, params, dtype)))


def _named(config, params, dtype) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a checkpoint, one stacked parameter at a time."""
  names = families.of(config).layout
  flat: Any = flax.traverse_util.flatten_dict(
    dict(params), is_leaf=lambda _, x: not isinstance(x, Mapping)
  )
  for path, leaf in flat.items():
    leaf = np.asarray(quantized.dequantize(leaf, dtype))
    layers = leaf if path[0] == "layers" else leaf[None]
    tensors = _tensors(names, path, leaf.shape)
    for (name, _), array in zip(tensors, layers, strict=True):
      if names.is_transposed(path):
        array = array.swapaxes(-1, -2)
      yield names.stored_name(name), np.ascontiguousarray(array)


def _parameter_shapes(config, head) -> dict[layout.Path, Any]:
  shapes = lora.abstract_variables(families.model(config, head=head))
  flat: Any = flax.traverse_util.flatten_dict(shapes["params"])
  return flat


def _tensors(
  names: layout.Layout, path: layout.Path, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """The checkpoint's names of a parameter, with the shape of each tensor."""
  is_stacked = path[0] == "layers"
  inner = shape[1:] if is_stacked else shape
  if names.is_transposed(path):
    inner = (*inner[:-2], inner[-1], inner[-2])
  for layer in range(shape[0]) if is_stacked else (None,):
    yield names.tensor_name(path, layer), inner


def _quantized(kernel: Any, format: quantized.Format) -> Any:
  """Quantises a parameter, one of its layers in memory at a time."""
  layers = (
    quantized.quantize(kernel[layer : layer + 1, :, :], format)
    for layer in range(kernel.shape[0])
  )
  join = lambda *parts: np.concatenate(parts)
  return jax.tree.map(join, *map(jax.device_get, layers))


def _leave_heads(names, shapes, stored):
  """Forgets the head of another number of labels: it is trained anew."""
  tensors = [
    tensor
    for path, leaf in shapes.items()
    if path[0] in names.heads
    for tensor in _tensors(names, path, leaf.shape)
  ]
  fits = lambda name, shape: tuple(stored[name].get_shape()) == shape
  if not all(fits(*tensor) for tensor in tensors if tensor[0] in stored):
    for name, _ in tensors:
      stored.pop(name, None)


def _check_tied(folder, names, shapes, stored):
  """Refuses an output matrix that is not the embedding it is said to be."""
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
      f"{folder} has an output matrix of its own, but its config.json says that"
      " the embedding is used. Set tie_word_embeddings to false in it."
    )


def _check(folder, names, shapes, stored, head):
  """Raises one error for everything that does not fit."""
  problems, expected = [], {}
  for path, leaf in shapes.items():
    tensors = dict(_tensors(names, path, leaf.shape))
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
      f"the tensors in {folder} do not fit its config.json:\n  "
      + "\n  ".join(problems)
    )
