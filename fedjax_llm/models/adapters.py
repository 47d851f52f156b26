"""LoRA factors <-> PEFT adapter folder.

PEFT stores both factors transposed: its `lora_A.weight` [rank, in] is our `a`
[in, rank] and its `lora_B.weight` [out, rank] our `b` [rank, out].
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedjax_llm.models import lora, pretrained

_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Features of PEFT's LoRA that would change the result and are not honoured.
_REFUSED = (
  "alpha_pattern",
  "rank_pattern",
  "use_dora",
  "use_rslora",
  "modules_to_save",
  "layers_to_transform",
  "lora_bias",
)


def save(
  folder: str | os.PathLike,
  factors: Mapping[str, Any],
  adapter: lora.LoRA,
  *,
  base_model: str,
) -> None:
  """Writes an adapter folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: where to; made if absent.
    factors: the LoRA collection of a model.
    adapter: what it was made with.
    base_model: folder or hub name of the base model, recorded for PEFT.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for path, leaf in flax.traverse_util.flatten_dict(dict(factors)).items():
    for layer, array in enumerate(np.asarray(leaf, np.float32)):
      tensors[_tensor_name(path, layer)] = np.ascontiguousarray(array.T)
  safetensors.numpy.save_file(
    tensors, folder / _FILES[1], metadata={"format": "pt"}
  )
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "lora_dropout": adapter.dropout,
    "target_modules": list(adapter.targets),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  (folder / _FILES[0]).write_text(json.dumps(fields, indent=2) + "\n")


def load(folder: str | os.PathLike) -> tuple[lora.LoRA, dict[str, Any]]:
  """Reads a PEFT adapter folder of a causal language model.

  Returns:
    What the adapter was made with, and its factors as float32.

  Raises:
    ValueError: if files are missing or the adapter uses a feature of PEFT
      that is not honoured here.
  """
  folder = pathlib.Path(folder)
  if missing := [name for name in _FILES if not (folder / name).is_file()]:
    raise ValueError(f"expected a PEFT adapter in {folder}, missing {missing}.")
  fields = json.loads((folder / _FILES[0]).read_text())
  if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none":
    raise ValueError(f"{folder}: expected a LoRA adapter without biases.")
  if refused := [name for name in _REFUSED if fields.get(name)]:
    raise ValueError(
      f"{folder}: the adapter uses {refused}, not honoured here."
    )
  tensors = safetensors.numpy.load_file(folder / _FILES[1])
  layers = _layers(tensors)
  factors = {}
  for path, count in layers.items():
    names = [_tensor_name(path, layer) for layer in range(count)]
    stacked = np.stack([tensors.pop(name).T for name in names])
    factors[path] = jnp.asarray(stacked, jnp.float32)
  if tensors:
    raise ValueError(f"{folder}: cannot place the tensors {sorted(tensors)}.")
  adapter = lora.LoRA(
    rank=fields.get("r", 8),
    alpha=float(fields.get("lora_alpha", 8)),
    dropout=fields.get("lora_dropout", 0.0),
    targets=tuple(sorted({path[-2] for path in factors})),
  )
  return adapter, flax.traverse_util.unflatten_dict(factors)


def _tensor_name(path: tuple[str, ...], layer: int) -> str:
  module = pretrained.tensor_name(path[:-1], layer)
  return f"base_model.model.{module}.lora_{path[-1].upper()}.weight"


def _layers(names) -> dict[tuple[str, ...], int]:
  """How many layers each factor of the folder has."""
  counts: dict[tuple[str, ...], int] = {}
  for name in names:
    parts = name.removeprefix("base_model.model.model.").split(".")
    if len(parts) < 5 or parts[0] != "layers":
      continue
    path = ("layers", *parts[2:-2], parts[-2].removeprefix("lora_").lower())
    counts[path] = counts.get(path, 0) + 1
  return counts
