"""Hugging Face folder or hub name -> Flax parameters, and back, without torch.

What a checkpoint's tensors are called is in `models.layout`; kernels of dense
layers are transposed, layers stacked, everything else is the same array.
"""

import contextlib
import dataclasses
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
import safetensors
import safetensors.numpy

from fedjax_llm.models import families, heads, layout, lora, quantized

# The small Llama that the package ships, see configs/pretrain.py.
SHIPPED = pathlib.Path(__file__).parent / "python_llama"
# The files of a repository that loading needs: no pickles, no other formats.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_SHARD_BYTES = 5_000_000_000
# Rows of a tensor that are read at once: so few stay in the processor's cache
# while they are transposed.
_ROWS = 32


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
        str(name_or_folder), allow_patterns=_PATTERNS
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
      the checkpoint is loaded if it has one.
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
    stored = _stored_tensors(folder, names, stack)
    _check(folder, names, shapes, stored, head)
    params = {}
    for path, leaf in shapes.items():
      within = [name for name, _ in _tensors(names, path, leaf.shape)]
      if within[0] not in stored:
        continue  # A head that is yet to be trained.
      tensors = [stored[name] for name in within]
      array: Any = _Parameter(tensors, names, path, leaf.shape, dtype)
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
  files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
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
  fields = config.to_hugging_face(head)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if like is not None:
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
      for path in like.glob(pattern):
        if not path.name.endswith(".safetensors.index.json"):
          shutil.copy(path, folder)
    older = json.loads((like / "config.json").read_text())
    older.pop("torch_dtype", None)
    fields = older | {x: fields[x] for x in fields if x not in older}
    if head is not None:
      made = config.to_hugging_face(head)
      fields |= {x: made[x] for x in ("architectures", "id2label", "label2id")}
  fields["dtype"] = jnp.dtype(dtype).name
  (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
  _write(folder, _shards(_named(config, params, dtype)))


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


def _shards(tensors) -> Iterator[dict[str, np.ndarray]]:
  """Gathers tensors up to the size of a file."""
  shard, size = {}, 0
  for name, array in tensors:
    if shard and size + array.nbytes > _SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
  yield shard


def _write(folder, shards):
  """Writes one file, or several and their index."""
  files, weight_map, total = [], {}, 0
  for shard in shards:
    files.append(folder / f"model-{len(files)}.safetensors")
    safetensors.numpy.save_file(shard, files[-1], metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, len(files))
    total += sum(array.nbytes for array in shard.values())
  if len(files) == 1:
    files[0].rename(folder / "model.safetensors")
    return
  name = lambda number: f"model-{number:05d}-of-{len(files):05d}.safetensors"
  for number, path in enumerate(files, 1):
    path.rename(folder / name(number))
  index = {
    "metadata": {"total_size": total},
    "weight_map": {tensor: name(x) for tensor, x in weight_map.items()},
  }
  (folder / "model.safetensors.index.json").write_text(
    json.dumps(index, indent=2) + "\n"
  )


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


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter in a checkpoint, read where it is indexed by slices."""

  tensors: list[Any]  # Slices of safetensors.
  names: layout.Layout
  path: layout.Path
  shape: tuple[int, ...]
  dtype: Any

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """The part of the parameter that `index` says, in its dtype."""
    shape = np.broadcast_to(0, self.shape)[index].shape
    parts, tensors = np.empty((1, *shape), self.dtype), self.tensors
    if self.path[0] == "layers":
      parts, tensors, index = parts[0], tensors[index[0]], index[1:]
    into = parts
    if self.names.is_transposed(self.path):
      into = parts.swapaxes(-1, -2)
      index = (*index[:-2], index[-1], index[-2])
    rows = range(tensors[0].get_shape()[0])[index[0]]
    for tensor, part in zip(tensors, into, strict=True):
      for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        block = tensor[(slice(some.start, some.stop), *index[1:])]
        part[start : start + _ROWS] = block
    return parts.reshape(shape)


def _quantized(kernel: Any, format: quantized.Format) -> Any:
  """Quantises a parameter, one of its layers in memory at a time."""
  layers = (
    quantized.quantize(kernel[layer : layer + 1, :, :], format)
    for layer in range(kernel.shape[0])
  )
  join = lambda *parts: np.concatenate(parts)
  return jax.tree.map(join, *map(jax.device_get, layers))


def _stored_tensors(folder, names, stack) -> dict[str, Any]:
  """What the headers of the folder's one file, or of its shards, list."""
  files = ["model.safetensors"]
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  if missing := [name for name in files if not (folder / name).is_file()]:
    raise ValueError(
      f"expected the weights of {folder} in {files}, missing {missing}. Only"
      " safetensors are read: transformers' save_pretrained writes them."
    )
  tensors = {}
  for path in (folder / name for name in files):
    try:
      file = stack.enter_context(safetensors.safe_open(path, "np"))
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path} is not a safetensors file: {error}") from error
    for name in file.keys():
      tensors[names.current(name)] = file.get_slice(name)
  return tensors


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
