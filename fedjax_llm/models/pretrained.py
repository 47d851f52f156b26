"""Hugging Face folder or hub name -> Flax parameters, and back, without torch.

A parameter `layers/self_attn/q_proj/kernel` [layers, in, out] is the tensors
`model.layers.{i}.self_attn.q_proj.weight` [out, in] of the checkpoint: kernels
are transposed and layers stacked, everything else is the same array.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedjax_llm.models import llama

# The small Llama that the package ships, see configs/pretrain.py.
SHIPPED = pathlib.Path(__file__).parent / "python_llama"
# The files of a repository that loading needs: no pickles, no other formats.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
# Buffers that old checkpoints carry and that are computed here.
_BUFFERS = ("rotary_emb.inv_freq",)


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


def read_config(folder: pathlib.Path) -> llama.LlamaConfig:
  """Reads the `config.json` of a model folder.

  Raises:
    ValueError: if there is none, or it describes a model not supported here.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"expected a config.json in {folder}, found none.")
  try:
    return llama.LlamaConfig.from_hugging_face(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def load(
  name_or_folder: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[llama.LlamaConfig, dict[str, Any]]:
  """Loads the shape and the parameters of a base model.

  One stacked parameter is in host memory at a time.

  Args:
    name_or_folder: a Hugging Face folder or hub name (see `resolve`).
    dtype: what the parameters are stored in.

  Returns:
    The config, and the parameters as `llama.Llama(config).apply` takes them.

  Raises:
    ValueError: listing every missing, unexpected or mis-shaped tensor.
  """
  folder = resolve(name_or_folder)
  config = read_config(folder)
  shapes = _parameter_shapes(config)
  expected = {
    name: shape[::-1] if path[-1] == "kernel" else shape
    for path, leaf in shapes.items()
    for name, shape in _tensors(path, leaf.shape)
  }
  stored = _stored_tensors(folder)
  _check(folder, expected, stored)
  params = {}
  for path, leaf in shapes.items():
    names = [name for name, _ in _tensors(path, leaf.shape)]
    arrays = [stored[name].read(name) for name in names]
    if path[-1] == "kernel":
      arrays = [array.T for array in arrays]
    stacked = np.stack(arrays) if path[0] == "layers" else arrays[0]
    params[path] = jnp.asarray(stacked, dtype)
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
  config: llama.LlamaConfig,
  params: Mapping[str, Any],
  *,
  dtype: Any = jnp.bfloat16,
) -> None:
  """Writes `config.json` and `model.safetensors` as transformers loads them.

  Args:
    folder: where to; made if absent.
    config: the model's shape.
    params: its parameters.
    dtype: what the tensors are stored in.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  flat: Any = flax.traverse_util.flatten_dict(dict(params))
  for path, leaf in flat.items():
    leaf = np.asarray(leaf.astype(dtype))
    layers = leaf if path[0] == "layers" else leaf[None]
    names = [name for name, _ in _tensors(path, leaf.shape)]
    for name, array in zip(names, layers, strict=True):
      array = array.T if path[-1] == "kernel" else array
      tensors[name] = np.ascontiguousarray(array)
  safetensors.numpy.save_file(
    tensors, folder / "model.safetensors", metadata={"format": "pt"}
  )
  fields = {**config.to_hugging_face(), "dtype": jnp.dtype(dtype).name}
  (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def tensor_name(path: tuple[str, ...], layer: int | None) -> str:
  """The checkpoint's name of a module, e.g. `model.layers.3.mlp.up_proj`."""
  if path[0] == "layers":
    return ".".join(("model.layers", str(layer), *path[1:]))
  return ".".join(path if path[0] == "lm_head" else ("model", *path))


def _parameter_shapes(config) -> dict[tuple[str, ...], Any]:
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = llama.Llama(config).init
  shapes: Any = jax.eval_shape(init, jax.random.key(0), tokens)
  flat: Any = flax.traverse_util.flatten_dict(shapes["params"])
  return flat


def _tensors(
  path: tuple[str, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """The checkpoint's names of a parameter, with the shape of each slice."""
  suffix = "bias" if path[-1] == "bias" else "weight"
  if path[0] != "layers":
    yield f"{tensor_name(path[:-1], None)}.{suffix}", shape
    return
  for layer in range(shape[0]):
    yield f"{tensor_name(path[:-1], layer)}.{suffix}", shape[1:]


class _Stored(NamedTuple):
  """Where a tensor is, and its shape."""

  file: pathlib.Path
  shape: tuple[int, ...]

  def read(self, name: str) -> np.ndarray:
    with safetensors.safe_open(self.file, "np") as file:
      return file.get_tensor(name)


def _stored_tensors(folder: pathlib.Path) -> dict[str, _Stored]:
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
      with safetensors.safe_open(path, "np") as file:
        for name in file.keys():
          shape = tuple(file.get_slice(name).get_shape())
          tensors[name] = _Stored(path, shape)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path} is not a safetensors file: {error}") from error
  return tensors


def _check(folder, expected, stored):
  """Raises one error for everything that does not fit."""
  problems = [f"missing {name}" for name in expected if name not in stored]
  for name, tensor in stored.items():
    if name in expected:
      if tensor.shape != expected[name]:
        problems.append(
          f"{name} has shape {tensor.shape}, not {expected[name]}"
        )
    # Tied models may carry the output matrix a second time.
    elif not name.endswith(_BUFFERS) and name != "lm_head.weight":
      problems.append(f"unexpected {name}")
  if problems:
    raise ValueError(
      f"the tensors in {folder} do not fit its config.json:\n  "
      + "\n  ".join(problems)
    )
