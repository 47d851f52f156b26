"""Saves trained parameters as a PEFT adapter folder, and loads such folders.

PEFT stores both factors transposed: `a` [in, rank] is its `lora_A.weight`
[rank, in], and `b` [rank, out] is its `lora_B.weight` [out, rank]. A head is
one of PEFT's `modules_to_save`, whose full weights are stored.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedjax_llm.models import families, heads, layout, lora, peft_files

# A file beside PEFT's two. It holds what PEFT does not store about a
# classifier, such as the names of the labels.
_CLASSIFIER = "classifier.json"


def save(
  folder: str | os.PathLike,
  factors: Mapping[str, Any],
  adapter: lora.LoRA,
  *,
  config: Any,
  base_model: str,
  head: heads.Classifier | None = None,
  residual: Mapping[str, Any] | None = None,
) -> None:
  """Writes an adapter folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: the folder to write; it is made if absent.
    factors: the LoRA collection of a model, including its head if it has one.
    adapter: the LoRA adapter of the model.
    config: the config of the base model.
    base_model: the folder or hub name of the base model, for PEFT's record.
    head: the classification head, or None.
    residual: dense matrices that were added to the base kernels (see
      `lora.add`), or None. PEFT stores only factors, so the rank of the saved
      adapter grows by the largest `min(inputs, outputs)` of the matrices. Such
      an adapter is for inference: it is too large for training.

  Raises:
    ValueError: if `residual` and `factors` have different modules.
  """
  if residual is not None:
    factors, adapter = _with_residual(factors, residual, adapter)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  safetensors.numpy.save_file(
    _tensors(flat, config, head),
    folder / peft_files.FILES[1],
    metadata={"format": "pt"},
  )
  saved = {path[-2] for path in flat if path[-1] not in ("a", "b")}
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
    "fan_in_fan_out": not families.of(config).layout.transposed,
    "inference_mode": True,
  }
  (folder / peft_files.FILES[0]).write_text(json.dumps(fields, indent=2) + "\n")
  if head is not None:
    text = json.dumps(dataclasses.asdict(head), indent=2)
    (folder / _CLASSIFIER).write_text(text + "\n")


def _tensors(flat, config, head) -> dict[str, np.ndarray]:
  """Returns the tensors of a PEFT file, by name."""
  names = families.of(config).layout
  tensors = {}
  for path, leaf in flat.items():
    for layer, array in layout.unstack(path, np.asarray(leaf, np.float32)):
      name = peft_files.tensor_name(names, path, layer)
      if _is_bare(config, head):
        name = name.replace(
          f"{peft_files.PREFIX}{names.base}.", peft_files.PREFIX
        )
      tensors[name] = np.ascontiguousarray(array.T)
  return tensors


def _with_residual(factors, residual, adapter):
  """Returns factors that include the residual, and their adapter.

  `scale * a @ b + delta` equals `scale * [a, I] @ [b; delta / scale]`. If a
  kernel has fewer outputs than inputs, `delta` and `I` are swapped.
  """
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  deltas: Any = flax.traverse_util.flatten_dict(dict(residual))
  modules = {path[:-1] for path in deltas}
  if modules != {path[:-1] for path in flat if path[-1] == "a"}:
    raise ValueError(
      "expected a residual with the modules of the factors, got"
      f" {sorted('/'.join(path) for path in modules)}. Give both for the same"
      " modules."
    )
  extra = max(min(delta.shape[-2:]) for delta in deltas.values())
  for (*module, _), delta in deltas.items():
    delta = np.asarray(delta, np.float32) / np.float32(adapter.scale)
    *layers, inputs, outputs = delta.shape
    small = min(inputs, outputs)
    identity = np.broadcast_to(
      np.eye(small, dtype=np.float32), (*layers, small, small)
    )
    is_wide = inputs == small
    a, b = (identity, delta) if is_wide else (delta, identity)
    none, missing = [(0, 0)] * len(layers), (0, extra - small)
    a = np.pad(a, [*none, (0, 0), missing])
    b = np.pad(b, [*none, missing, (0, 0)])
    for name, new, axis in (("a", a, -1), ("b", b, -2)):
      old = flat[*module, name]
      flat[*module, name] = np.concatenate([old, new], axis)
  rank = adapter.rank + extra
  scaled = dataclasses.replace(adapter, rank=rank, alpha=adapter.scale * rank)
  return flax.traverse_util.unflatten_dict(flat), scaled


def _task(config: Any, head: heads.Classifier | None) -> str | None:
  """Returns PEFT's name for the task of a model."""
  if not families.of(config).reads_text:
    return None  # PEFT has no name for tasks on images.
  if _is_bare(config, head):
    return "FEATURE_EXTRACTION"
  return "CAUSAL_LM" if head is None else "SEQ_CLS"


def _is_bare(config: Any, head: heads.Classifier | None) -> bool:
  """Returns whether PEFT wraps the encoder alone, without a task model.

  The tensor names then lack the `base` of the layout.
  """
  if head is None:
    return not families.of(config).predicts
  return head.pooling == "mean"  # transformers has no such classifier.


def load(
  folder: str | os.PathLike, config: Any
) -> tuple[lora.LoRA, dict[str, Any]]:
  """Reads a PEFT adapter folder, for evaluation or further training.

  If the ranks differ (`rank_pattern`), all factors are padded with zeros to the
  largest rank. The padding is zero in both factors, so it gets no gradient and
  stays zero. If the scales differ (`alpha_pattern`, ranks), each `b` is
  multiplied by own scale / returned scale. With `use_rslora`, `alpha` is
  returned such that alpha / rank is the scale. `lora.check` tests whether the
  adapter fits a model.

  Args:
    folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
    config: the config of the base model.

  Returns:
    The LoRA adapter, and its trained parameters in float32.

  Raises:
    ValueError: if a file is missing, the adapter uses an unsupported feature of
      PEFT, or the tensors do not fit the configs.
  """
  folder = pathlib.Path(folder)
  if missing := [
    name for name in peft_files.FILES if not (folder / name).is_file()
  ]:
    raise ValueError(
      f"expected a PEFT adapter in {folder}, missing {missing}. Write it with"
      " PEFT's save_pretrained."
    )
  fields = json.loads((folder / peft_files.FILES[0]).read_text())
  peft_files.refuse(folder, fields)
  pairs, trained = peft_files.read(folder / peft_files.FILES[1], config, fields)
  rank = max(a.shape[-1] for a, _, _ in pairs.values())
  alpha = float(fields.get("lora_alpha", 8))
  scale = peft_files.scale(alpha, rank, fields)
  layers: dict[layout.Path, dict[int | None, np.ndarray]] = {}
  for (path, layer), (a, b, stored) in pairs.items():
    module = families.of(config).layout.module_name(path, layer)
    names = (stored, module)
    own = peft_files.pattern(
      fields.get("rank_pattern"), names, fields.get("r", 8)
    )
    _check_rank(folder, module, own, a.shape[-1])
    own_alpha = peft_files.pattern(fields.get("alpha_pattern"), names, alpha)
    b = b * np.float32(peft_files.scale(own_alpha, own, fields) / scale)
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


def _check_rank(folder, module, expected, rank):
  """Raises a `ValueError` unless a factor has the rank of the config."""
  if rank != expected:
    raise ValueError(
      f"{folder}: expected rank {expected} of {module}, as adapter_config.json"
      f" says, got {rank}. Correct `r` or `rank_pattern` there."
    )


def base_model(folder: str | os.PathLike) -> str:
  """Returns the folder or hub name of an adapter's base model.

  Raises:
    ValueError: if there is no adapter, or it does not name its base model.
  """
  path = pathlib.Path(folder) / peft_files.FILES[0]
  if not path.is_file():
    raise ValueError(
      f"expected a PEFT adapter in {folder}, found none. Give a folder with an"
      f" {path.name}."
    )
  name = json.loads(path.read_text()).get("base_model_name_or_path")
  if not name:
    raise ValueError(
      f"expected base_model_name_or_path in {path}, found none. Give the base"
      " model."
    )
  return name


def head_of(
  folder: str | os.PathLike, trained: Mapping[str, Any]
) -> heads.Classifier | None:
  """Returns the classification head of an adapter, or None.

  PEFT stores neither the names of labels nor whether a row may have several
  labels. An adapter from PEFT gets one label for each row and no names.
  """
  kernels = [x["kernel"] for x in trained.values() if "kernel" in x]
  if not kernels:
    return None
  fields = json.loads((pathlib.Path(folder) / peft_files.FILES[0]).read_text())
  own = pathlib.Path(folder) / _CLASSIFIER
  if own.is_file():
    return heads.Classifier(**json.loads(own.read_text()))
  is_mean = fields.get("task_type") == "FEATURE_EXTRACTION"
  return heads.Classifier(kernels[0].shape[-1], "mean" if is_mean else None)


def _stack(path, arrays, config) -> np.ndarray:
  """Stacks the layers; layers without factors get zeros, which stay zero."""
  if None in arrays:
    return arrays[None]
  shapes = {array.shape for array in arrays.values()}
  if len(shapes) > 1:
    raise ValueError(
      f"expected {'.'.join(path)} of one shape in all layers, got"
      f" {sorted(shapes)}. Save the adapter again."
    )
  none = np.zeros_like(next(iter(arrays.values())))
  return np.stack(
    [arrays.get(layer, none) for layer in range(config.num_hidden_layers)]
  )


def _targets(paths: Iterable[layout.Path], config: Any) -> tuple[str, ...]:
  """Returns the shortest names that match exactly the layers with factors."""
  have = {
    ".".join(path[1:-1] if path[0] == "layers" else path[:-1]) for path in paths
  }
  targets = set()
  for module in have:
    short = module.split(".")[-1]
    alike = [
      x for x in families.of(config).model.LAYERS if x.split(".")[-1] == short
    ]
    targets.add(short if have.issuperset(alike) else module)
  return tuple(sorted(targets))
