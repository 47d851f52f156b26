"""What is trained <-> PEFT adapter folder.

PEFT stores both factors transposed: its `lora_A.weight` [rank, in] is our `a`
[in, rank] and its `lora_B.weight` [out, rank] our `b` [rank, out]. A head is
one of its `modules_to_save`, stored whole.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedjax_llm.models import families, heads, layout, lora

_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Fields of an adapter_config.json that leave what the factors compute as it is,
# or are read below. Any other that is switched on is refused.
_HONOURED = frozenset(
  """alpha_pattern auto_mapping base_model_name_or_path eva_config
  exclude_modules fan_in_fan_out inference_mode init_lora_weights
  layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
  modules_to_save peft_type peft_version qalora_group_size r rank_pattern
  revision runtime_config target_modules task_type use_rslora""".split()
)
# Other starting points (PiSSA, OLoRA, LoftQ, ...) change the base weights too.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def save(
  folder: str | os.PathLike,
  factors: Mapping[str, Any],
  adapter: lora.LoRA,
  *,
  config: Any,
  base_model: str,
  head: heads.Classifier | None = None,
) -> None:
  """Writes an adapter folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: where to; made if absent.
    factors: the LoRA collection of a model, with its head if it has one.
    adapter: what it was made with.
    config: shape of the base model.
    base_model: folder or hub name of the base model, recorded for PEFT.
    head: what classifies a row, if the model is no language model.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names = families.of(config).layout
  tensors, saved = {}, set()
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  for path, leaf in flat.items():
    is_stacked = path[0] == "layers"
    if path[-1] not in ("a", "b"):
      saved.add(path[-2])
    leaf = np.asarray(leaf, np.float32)
    for layer, array in enumerate(leaf if is_stacked else leaf[None]):
      name = _tensor_name(names, path, layer if is_stacked else None)
      if _is_bare(config, head):
        name = name.replace(f"{_PREFIX}{names.base}.", _PREFIX)
      tensors[name] = np.ascontiguousarray(array.T)
  safetensors.numpy.save_file(
    tensors, folder / _FILES[1], metadata={"format": "pt"}
  )
  fields = {
    "peft_type": "LORA",
    "task_type": _task(config, head),
    "base_model_name_or_path": base_model,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "lora_dropout": adapter.dropout,
    "target_modules": list(adapter.targets),
    "modules_to_save": sorted(saved) or None,
    "bias": "none",
    "fan_in_fan_out": not names.transposed,
    "inference_mode": True,
  }
  (folder / _FILES[0]).write_text(json.dumps(fields, indent=2) + "\n")


def _task(config: Any, head: heads.Classifier | None) -> str | None:
  """PEFT's name of what a model does."""
  family = families.of(config)
  if not family.reads_text:
    return None  # It has none for images.
  if head is None:
    return "CAUSAL_LM" if family.predicts else "FEATURE_EXTRACTION"
  # transformers has no classifier of the mean.
  return "FEATURE_EXTRACTION" if head.pooling == "mean" else "SEQ_CLS"


def _is_bare(config: Any, head: heads.Classifier | None) -> bool:
  """Whether PEFT wraps an encoder alone, whose names lack the prefix."""
  if head is not None:
    return head.pooling == "mean"
  return not families.of(config).predicts


def _tensor_name(
  names: layout.Layout, path: layout.Path, layer: int | None
) -> str:
  if path[-1] in ("a", "b"):
    module = names.module_name(path[:-1], layer)
    return f"{_PREFIX}{module}.lora_{path[-1].upper()}.weight"
  return _PREFIX + names.tensor_name(path, layer)


def load(
  folder: str | os.PathLike, config: Any
) -> tuple[lora.LoRA, dict[str, Any]]:
  """Reads a PEFT adapter folder, to evaluate it or to go on training.

  Factors of several ranks (`rank_pattern`) get the largest: those that are
  padded with zeros at both ends get no gradient, so they stay zero. Where
  scales differ (`alpha_pattern`), `b` takes up the difference. With
  `use_rslora`, `alpha` does: it is that of a plain adapter of the same scale.
  Whether the adapter fits a base model is for `lora.check` to tell.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    config: shape of the base model.

  Returns:
    What the adapter was made with, and what it trained as float32.

  Raises:
    ValueError: if files are missing or the adapter uses a feature of PEFT
      that is not honoured here.
  """
  folder = pathlib.Path(folder)
  if missing := [name for name in _FILES if not (folder / name).is_file()]:
    raise ValueError(f"expected a PEFT adapter in {folder}, missing {missing}.")
  fields = json.loads((folder / _FILES[0]).read_text())
  _refuse(folder, fields)
  pairs, trained = _read(folder / _FILES[1], config, fields)
  rank = max(a.shape[-1] for a, _ in pairs.values())
  alpha = float(fields.get("lora_alpha", 8))
  scale = _scale(alpha, rank, fields)
  layers: dict[layout.Path, dict[int | None, np.ndarray]] = {}
  for (path, layer), (a, b) in pairs.items():
    module = families.of(config).layout.module_name(path, layer)
    own = _pattern(fields.get("rank_pattern"), module, fields.get("r", 8))
    if a.shape[-1] != own:
      raise ValueError(
        f"{folder}: expected factors of rank {own} of {module}, got"
        f" {a.shape[-1]}."
      )
    own_alpha = _pattern(fields.get("alpha_pattern"), module, alpha)
    b = b * np.float32(_scale(own_alpha, own, fields) / scale)
    missing = (0, rank - own)
    layers.setdefault((*path, "a"), {})[layer] = np.pad(a, [(0, 0), missing])
    layers.setdefault((*path, "b"), {})[layer] = np.pad(b, [missing, (0, 0)])
  for path, arrays in layers.items():
    trained[path] = _stack(path, arrays, config)
  adapter = lora.LoRA(
    rank=rank,
    alpha=scale * rank if fields.get("use_rslora") else alpha,
    dropout=float(fields.get("lora_dropout") or 0),
    targets=_targets(layers, config),
  )
  tree = {path: jnp.asarray(x, jnp.float32) for path, x in trained.items()}
  return adapter, flax.traverse_util.unflatten_dict(tree)


def base_model(folder: str | os.PathLike) -> str:
  """The folder or hub name of the base model that an adapter names.

  Raises:
    ValueError: if there is no adapter, or it names none.
  """
  path = pathlib.Path(folder) / _FILES[0]
  if not path.is_file():
    raise ValueError(f"expected a PEFT adapter in {folder}, found none.")
  name = json.loads(path.read_text()).get("base_model_name_or_path")
  if not name:
    raise ValueError(f"{path} names no base model: say which it is for.")
  return name


def head_of(
  folder: str | os.PathLike, trained: Mapping[str, Any]
) -> heads.Classifier | None:
  """The classifier that an adapter's head, if it has one, belongs to."""
  kernels = [x["kernel"] for x in trained.values() if "kernel" in x]
  if not kernels:
    return None
  fields = json.loads((pathlib.Path(folder) / _FILES[0]).read_text())
  is_mean = fields.get("task_type") == "FEATURE_EXTRACTION"
  return heads.Classifier(kernels[0].shape[-1], "mean" if is_mean else None)


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


def _scale(alpha: float, rank: int, fields: Mapping[str, Any]) -> float:
  """What PEFT multiplies the product of the factors by."""
  return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any):
  """The value of the first pattern that fits a module, as PEFT finds it."""
  for pattern, value in (patterns or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def _read(file: pathlib.Path, config: Any, fields: Mapping[str, Any]):
  """Reads an adapter's tensors.

  Returns:
    The factors (a, b) of each (path of a module, layer), and what else was
    trained, by path.
  """
  names = families.of(config).layout
  factors: dict[Any, dict[str, np.ndarray]] = {}
  trained, problems = {}, []
  for name, array in safetensors.numpy.load_file(file).items():
    inner = names.current(name.removeprefix(_PREFIX))
    if match := _FACTOR.fullmatch(inner):
      place = names.place(match[1])
      factors.setdefault(place, {})[match[2]] = array.astype(np.float32).T
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
      f"missing {_PREFIX}{module}.lora_{x}.weight"
      for x in "AB"
      if x not in pair
    ]
  if problems or not factors:
    raise ValueError(
      f"expected the LoRA factors of a {config.model_type} in {file}:\n  "
      + "\n  ".join(problems or ["it has none"])
    )
  return {place: (x["A"], x["B"]) for place, x in factors.items()}, trained


def _names_layers(fields: Mapping[str, Any]) -> bool:
  """Whether an adapter chooses among the layers, so that some may lack it."""
  names = [fields.get("target_modules"), fields.get("exclude_modules")]
  return (
    fields.get("layers_to_transform") is not None
    or any(isinstance(x, str) for x in names)
    or any(re.search(r"\.\d+\.", x) for some in names for x in some or ())
  )


def _stack(path, arrays, config) -> np.ndarray:
  """Stacks the layers; one without factors gets zeros, which never train."""
  if None in arrays:
    return arrays[None]
  example = next(iter(arrays.values()))
  if len({array.shape for array in arrays.values()}) > 1:
    raise ValueError(f"{'.'.join(path)} is not of one shape in all layers.")
  none = np.zeros_like(example)
  return np.stack(
    [arrays.get(layer, none) for layer in range(config.num_hidden_layers)]
  )


def _targets(paths: Iterable[layout.Path], config: Any) -> tuple[str, ...]:
  """The shortest names of the layers that have factors, and no others."""
  have = {
    ".".join(path[1:-1] if path[0] == "layers" else path[:-1]) for path in paths
  }
  targets = set()
  for module in have:
    short = module.split(".")[-1]
    alike = [x for x in families.of(config).layers if x.split(".")[-1] == short]
    targets.add(short if have.issuperset(alike) else module)
  return tuple(sorted(targets))
