"""The two files of a PEFT adapter: names, fields and tensors.

`adapter_config.json` describes the adapter, and `adapter_model.safetensors`
holds the trained tensors. The fields mean the same as in PEFT's code.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from fedjax_llm.models import families, layout

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Fields of an adapter_config.json that are read, or that do not change the
# result. Any other field is an error, unless it is false, null, zero or empty.
_HONOURED = frozenset(
  """alpha_pattern auto_mapping base_model_name_or_path eva_config
  exclude_modules fan_in_fan_out inference_mode init_lora_weights
  layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
  modules_to_save peft_type peft_version qalora_group_size r rank_pattern
  revision runtime_config target_modules task_type use_rslora""".split()
)
# PEFT's names for the supported tasks.
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
# Other initialisations (PiSSA, OLoRA, LoftQ, ...) also change base weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def tensor_name(
  names: layout.Layout, path: layout.Path, layer: int | None
) -> str:
  """Returns the name of a parameter in a PEFT file."""
  if path[-1] in ("a", "b"):
    module = names.module_name(path[:-1], layer)
    return f"{PREFIX}{module}.lora_{path[-1].upper()}.weight"
  return PREFIX + names.tensor_name(path, layer)


def refuse(folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Raises an error for an adapter with unsupported features.

  Args:
    folder: the folder of the adapter, for the message.
    fields: the fields of its adapter_config.json.

  Raises:
    ValueError: if a feature is not supported. The message names it.
  """
  if (kind := fields.get("peft_type")) != "LORA":
    raise ValueError(
      f'{folder}: expected peft_type "LORA", got {kind!r}. Give a LoRA adapter.'
    )
  fields = dict(fields)
  if fields.get("bias") == "none":
    fields.pop("bias")
  if (task := fields.get("task_type")) not in _TASKS:
    raise ValueError(
      f"{folder}: expected task_type in {_TASKS}, got {task!r}. Give an adapter"
      " for one of these tasks."
    )
  refused = [name for name in fields if fields[name] and name not in _HONOURED]
  if fields.get("init_lora_weights") not in _INITS:
    refused.append(f"init_lora_weights={fields['init_lora_weights']!r}")
  if refused:
    raise ValueError(
      f"{folder}: expected a plain LoRA adapter, got one that uses"
      f" {sorted(refused)}, which would be ignored. Train one without them."
    )


def scale(alpha: float, rank: int, fields: Mapping[str, Any]) -> float:
  """Returns the factor by which PEFT multiplies the product `a @ b`."""
  return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def pattern(
  patterns: Mapping[str, Any] | None, modules: Sequence[str], default: Any
) -> Any:
  """Returns the value of the first pattern that matches a module, as PEFT does.

  Args:
    patterns: the value of each pattern; None for no patterns.
    modules: the names of the module, in the file and in this package.
    default: the value if no pattern matches.
  """
  for key, value in (patterns or {}).items():
    if any(re.match(rf"(.*\.)?({key})$", module) for module in modules):
      return value
  return default


def read(file: pathlib.Path, config: Any, fields: Mapping[str, Any]):
  """Reads the tensors of an adapter.

  Args:
    file: the safetensors file.
    config: the config of the base model.
    fields: the fields of the adapter_config.json.

  Returns:
    Two dictionaries. The first holds the factors: it maps (module path, layer)
    to (a, b, module name in the file). The second holds the other trained
    parameters, such as a head: it maps their paths to arrays.

  Raises:
    ValueError: if tensors are missing or do not belong to the model.
  """
  names = families.of(config).layout
  factors: dict[Any, dict[str, Any]] = {}
  trained, problems = {}, []
  for name, array in safetensors.numpy.load_file(file).items():
    inner = names.current(name.removeprefix(PREFIX))
    if match := _FACTOR.fullmatch(inner):
      place = names.place(match[1])
      pair = factors.setdefault(place, {})
      pair[match[2]] = array.astype(np.float32).T
      pair["name"] = name.removeprefix(PREFIX).rsplit(".", 2)[0]
    elif inner.split(".")[0] in names.heads:
      module, leaf = inner.rsplit(".", 1)
      is_kernel = leaf == "weight"
      path = (*names.place(module)[0], "kernel" if is_kernel else leaf)
      trained[path] = array.T if is_kernel else array
    else:
      problems.append(f"cannot place {name}")
  problems += [
    f"cannot place layer {layer} of {'.'.join(path)}"
    for path, layer in sorted(factors, key=str)
    if layer is not None and layer >= config.num_hidden_layers
  ]
  expected = set(factors)
  if not _names_layers(fields):
    every = range(config.num_hidden_layers)
    expected |= {
      (x, n) for x, layer in factors if layer is not None for n in every
    }
  for path, layer in sorted(expected, key=str):
    pair = factors.get((path, layer), {})
    module = names.module_name(path, layer)
    problems += [
      f"missing {PREFIX}{module}.lora_{x}.weight" for x in "AB" if x not in pair
    ]
  if problems or not factors:
    raise ValueError(
      f"expected the LoRA factors of a {config.model_type} in {file}:\n  "
      + "\n  ".join(problems or ["it has none"])
      + "\nGive an adapter of this base model."
    )
  pairs = {place: (x["A"], x["B"], x["name"]) for place, x in factors.items()}
  return pairs, trained


def _names_layers(fields: Mapping[str, Any]) -> bool:
  """Returns whether an adapter selects layers; then others may lack factors."""
  names = [fields.get("target_modules"), fields.get("exclude_modules")]
  return (
    fields.get("layers_to_transform") is not None
    or any(isinstance(x, str) for x in names)
    or any(re.search(r"\.\d+\.", x) for some in names for x in some or ())
  )
