"""LoRA factors <-> PEFT adapter folder.

PEFT stores both factors transposed: its `lora_A.weight` [rank, in] is our `a`
[in, rank] and its `lora_B.weight` [out, rank] our `b` [rank, out].
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedjax_llm.models import lora, pretrained

_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Fields of an adapter_config.json that leave what the factors compute as it is,
# or are read below. Any other that is switched on is refused.
_HONOURED = frozenset(
  """auto_mapping base_model_name_or_path eva_config exclude_modules
  inference_mode init_lora_weights lora_alpha lora_dropout megatron_core
  peft_type peft_version qalora_group_size r revision runtime_config
  target_modules task_type""".split()
)
# Other starting points (PiSSA, OLoRA, LoftQ, ...) change the base weights too.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(
  r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight"
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
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  for path, leaf in flat.items():
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

  Whether it fits a base model is for `lora.check` to tell.

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
  _refuse(folder, fields)
  factors = _stack(folder, safetensors.numpy.load_file(folder / _FILES[1]))
  rank = fields.get("r", 8)
  sizes = {
    array.shape[-1 if path[-1] == "a" else -2]
    for path, array in factors.items()
  }
  if sizes != {rank}:
    raise ValueError(f"{folder}: expected factors of rank {rank}, got {sizes}.")
  adapter = lora.LoRA(
    rank=rank,
    alpha=float(fields.get("lora_alpha", 8)),
    dropout=float(fields.get("lora_dropout", 0)),
    targets=tuple(sorted({path[-2] for path in factors})),
  )
  factors = {path: jnp.asarray(x, jnp.float32) for path, x in factors.items()}
  return adapter, flax.traverse_util.unflatten_dict(factors)


def _refuse(folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Raises one error that names everything that would be computed wrongly."""
  if (kind := fields.get("peft_type")) != "LORA":
    raise ValueError(f'{folder}: expected peft_type "LORA", got {kind!r}.')
  fields = dict(fields)
  if fields.get("bias") == "none":
    fields.pop("bias")
  refused = [name for name in fields if fields[name] and name not in _HONOURED]
  if fields.get("init_lora_weights") not in _INITS:
    refused.append(f"init_lora_weights={fields['init_lora_weights']!r}")
  if refused:
    raise ValueError(
      f"{folder}: the adapter uses {sorted(refused)}, not honoured here."
    )


def _stack(
  folder: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> dict[tuple[str, ...], np.ndarray]:
  """Transposes the factors and stacks those of all layers."""
  layers: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  problems = []
  for name, array in tensors.items():
    if match := _TENSOR.fullmatch(name):
      path = ("layers", *match[2].split("."), match[3].lower())
      layers.setdefault(path, {})[int(match[1])] = array.T
    else:
      problems.append(f"cannot place {name}")
  count = 1 + max((max(arrays) for arrays in layers.values()), default=-1)
  for module in sorted({path[:-1] for path in layers}):
    for path in ((*module, "a"), (*module, "b")):
      arrays = layers.get(path, {})
      problems += [
        f"missing {_tensor_name(path, layer)}"
        for layer in range(count)
        if layer not in arrays
      ]
      if len({array.shape for array in arrays.values()}) > 1:
        problems.append(f"{'.'.join(path)} is not of one shape in all layers")
  if problems or not layers:
    raise ValueError(
      f"expected the LoRA factors of a Llama in {folder / _FILES[1]}:\n  "
      + "\n  ".join(problems or ["it has none"])
    )
  return {
    path: np.stack([arrays[layer] for layer in range(count)])
    for path, arrays in layers.items()
  }


def _tensor_name(path: tuple[str, ...], layer: int) -> str:
  module = pretrained.tensor_name(path[:-1], layer)
  return f"base_model.model.{module}.lora_{path[-1].upper()}.weight"
