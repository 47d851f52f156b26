"""Reads a config.json; a field that is not supported is an error."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from fedjax_llm.models import heads

# Fields that do not change what a model computes: provenance, token ids, and
# settings of training, generation and storage.
_IGNORED = frozenset(
  """architectures bos_token_id cache_implementation chunk_size_feed_forward
  do_sample dtype eos_token_id gradient_checkpointing id2label
  initializer_range is_llama_config label2id length_penalty max_length
  max_new_tokens max_sequence_length name_or_path num_beam_groups num_beams
  num_return_sequences output_attentions output_hidden_states output_past
  pad_token_id pretraining_tp problem_type repetition_penalty return_dict
  sep_token_id task_specific_params temperature tokenizer_class top_k top_p
  torch_dtype torchscript transformers.js_config transformers_version typical_p
  unsloth_fixed unsloth_version use_cache""".split()
)
_tanh_gelu = functools.partial(nn.gelu, approximate=True)
# The activations, by their names in a config.json.
ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_new": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "relu": nn.relu,
  "silu": nn.silu,
  "swish": nn.silu,
}
# Without these, transformers would stop at its default token ids.
NO_TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


class Fields:
  """The fields of a config.json, to be taken out one by one.

  `finish` raises an error for the fields that are left.
  """

  def __init__(self, fields: Mapping[str, Any]):
    self._left = dict(fields)

  def pop(self, name: str) -> Any:
    """Takes a field out and returns it; None if it is absent or null."""
    return self._left.pop(name, None)

  def peek(self, name: str) -> Any:
    """Returns a field and leaves it in; None if it is absent or null."""
    return self._left.get(name)

  def default(self, values: Mapping[str, Any]) -> None:
    """Adds the `values` of absent fields; a field that is null stays null."""
    self._left = {**values, **self._left}

  def take(self, names: Mapping[str, str]) -> dict[str, Any]:
    """Takes fields out and returns those that are not null.

    Args:
      names: the config.json name of each field, by its name in the result.
    """
    taken = {name: self.pop(written) for name, written in names.items()}
    return {name: x for name, x in taken.items() if x is not None}

  def choose(self, name: str, choices: Sequence[str]) -> str:
    """Takes out a field and returns it.

    Raises:
      ValueError: if its value is not in `choices`.
    """
    if (value := self.pop(name)) not in choices:
      raise ValueError(
        f"expected {name} in {', '.join(map(repr, choices))}, got {value!r}."
      )
    return value

  def finish(self, kind: str, ignored: Iterable[str] = ()) -> None:
    """Checks that no field is left that may change what the model computes.

    Args:
      kind: the kind of the model, for the message.
      ignored: the names of fields that do not change this kind of model.

    Raises:
      ValueError: if such a field is left. The message names it.
    """
    known = _IGNORED | set(ignored)
    # An unknown field that is false, null, zero or empty changes nothing.
    if unknown := sorted(
      name
      for name, value in self._left.items()
      if value and name not in known and not name.startswith("_")
    ):
      raise ValueError(
        f"expected a config.json with supported fields only, got {unknown}."
        f" This {kind} does not support them, so results could be wrong. Take"
        " another model, or remove a field that changes nothing."
      )


def check_activation(config: Any) -> None:
  """Raises a `ValueError` if the activation of a config is unknown."""
  if config.hidden_act not in ACTIVATIONS:
    raise ValueError(
      f"expected hidden_act in {', '.join(ACTIVATIONS)}, got"
      f" {config.hidden_act!r}."
    )


def check_heads(config: Any) -> None:
  """Raises a `ValueError` if the heads do not divide the hidden size."""
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      "expected num_attention_heads to divide hidden_size, got"
      f" {config.num_attention_heads} and {config.hidden_size}."
    )


def build(kind: Any, values: Mapping[str, Any]) -> Any:
  """Makes a config of the dataclass `kind`.

  Raises:
    ValueError: if a field without a default is not in `values`.
  """
  required = [
    x.name for x in dataclasses.fields(kind) if x.default is dataclasses.MISSING
  ]
  if missing := [name for name in required if name not in values]:
    raise ValueError(
      f"expected a config.json with every required field, {missing} is missing."
      " Complete it."
    )
  return kind(**values)


def label_fields(head: heads.Classifier | None) -> dict[str, Any]:
  """Returns the fields of a config.json that describe a classifier's labels."""
  if head is None:
    return {}
  names = head.names or [f"LABEL_{number}" for number in range(head.labels)]
  kind = "multi" if head.multi_label else "single"
  return {
    "id2label": {str(number): name for number, name in enumerate(names)},
    "label2id": {name: number for number, name in enumerate(names)},
    "problem_type": f"{kind}_label_classification",
  }


def label_names(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the label names of a folder's config.json; empty if it has none."""
  names = json.loads((folder / "config.json").read_text()).get("id2label") or {}
  return tuple(names[key] for key in sorted(names, key=int))


def stored_dtype(folder: pathlib.Path) -> str:
  """Returns the dtype in a folder's config.json; "float32" if it has none."""
  fields = json.loads((folder / "config.json").read_text())
  return fields.get("dtype") or fields.get("torch_dtype") or "float32"


def end_tokens(folder: pathlib.Path) -> tuple[int, ...]:
  """Returns the ids of the tokens that end a text; empty if there are none.

  They are read from generation_config.json. If it has none, they are read from
  config.json.
  """
  for name in ("generation_config.json", "config.json"):
    path = folder / name
    fields = json.loads(path.read_text()) if path.is_file() else {}
    if (ids := fields.get("eos_token_id")) is not None:
      return tuple(ids) if isinstance(ids, list) else (ids,)
  return ()
