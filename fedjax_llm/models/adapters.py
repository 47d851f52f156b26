"""What is trained <-> PEFT adapter folder.

PEFT stores both factors transposed: its `lora_A.weight` [rank, in] is our `a`
[in, rank] and its `lora_B.weight` [out, rank] our `b` [rank, out]. A head is
one of its `modules_to_save`, stored whole.
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

# Beside PEFT's two: what it does not say of a classifier, such as its labels.
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
    folder: where to; made if absent.
    factors: the LoRA collection of a model, with its head if it has one.
    adapter: what it was made with.
    config: shape of the base model.
    base_model: folder or hub name of the base model, recorded for PEFT.
    head: what classifies a row, if the model is no language model.
    residual: dense matrices that were added to the base kernels, see
      `lora.add`. PEFT knows nothing but factors, so the adapter then has the
      rank of these plus the largest `min(inputs, outputs)` of the matrices: it
      is for use, too large to be trained on.

  Raises:
    ValueError: if `residual` is not of the same modules as `factors`.
  """
  if residual is not None:
    factors, adapter = _with_residual(factors, residual, adapter)
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
      name = peft_files.tensor_name(names, path, layer if is_stacked else None)
      if _is_bare(config, head):
        name = name.replace(
          f"{peft_files.PREFIX}{names.base}.", peft_files.PREFIX
        )
      tensors[name] = np.ascontiguousarray(array.T)
  safetensors.numpy.save_file(
    tensors, folder / peft_files.FILES[1], metadata={"format": "pt"}
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
  (folder / peft_files.FILES[0]).write_text(json.dumps(fields, indent=2) + "\n")
  if head is not None:
    text = json.dumps(dataclasses.asdict(head), indent=2)
    (folder / _CLASSIFIER).write_text(text + "\n")


def _with_residual(factors, residual, adapter):
  """Factors, and an adapter of their rank, that compute what both do.

  `scale * a @ b + delta` is `scale * [a, I] @ [b; delta / scale]`, or with
  delta and identity exchanged where that is smaller.
  """
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  deltas: Any = flax.traverse_util.flatten_dict(dict(residual))
  modules = {path[:-1] for path in deltas}
  if modules != {path[:-1] for path in flat if path[-1] == "a"}:
    raise ValueError(
      "expected a residual of the modules that have factors, got one of"
      f" {sorted('/'.join(path) for path in modules)}."
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
  if missing := [
    name for name in peft_files.FILES if not (folder / name).is_file()
  ]:
    raise ValueError(f"expected a PEFT adapter in {folder}, missing {missing}.")
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
    if a.shape[-1] != own:
      raise ValueError(
        f"{folder}: expected factors of rank {own} of {module}, got"
        f" {a.shape[-1]}."
      )
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


def base_model(folder: str | os.PathLike) -> str:
  """The folder or hub name of the base model that an adapter names.

  Raises:
    ValueError: if there is no adapter, or it names none.
  """
  path = pathlib.Path(folder) / peft_files.FILES[0]
  if not path.is_file():
    raise ValueError(f"expected a PEFT adapter in {folder}, found none.")
  name = json.loads(path.read_text()).get("base_model_name_or_path")
  if not name:
    raise ValueError(f"{path} names no base model: say which it is for.")
  return name


def head_of(
  folder: str | os.PathLike, trained: Mapping[str, Any]
) -> heads.Classifier | None:
  """The classifier that an adapter's head, if it has one, belongs to.

  An adapter that PEFT made does not say what the labels are called, nor whether
  a row may have several; it is taken for one label a row.
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
