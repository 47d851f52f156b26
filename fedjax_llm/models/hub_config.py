"""Reading a config.json so that no field of it is overlooked."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedjax_llm.models import heads

# Fields that do not change what a model computes: provenance, token ids,
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


class Fields:
  """The fields of a config.json, taken out one by one.

  What is left at the end and switched on would not be honoured: `finish`
  refuses it by name.
  """

  def __init__(self, fields: Mapping[str, Any]):
    self._left = dict(fields)

  def pop(self, name: str) -> Any:
    """Takes a field out; None if it is absent or null."""
    return self._left.pop(name, None)

  def peek(self, name: str) -> Any:
    """A field that stays to be taken; None if it is absent or null."""
    return self._left.get(name)

  def default(self, values: Mapping[str, Any]) -> None:
    """Fills in fields that are absent; null stays null."""
    self._left = {**values, **self._left}

  def take(self, names: Iterable[str]) -> dict[str, Any]:
    """Takes out the fields `names`; those absent or null are not returned."""
    taken = {x: self._left.pop(x, None) for x in names}
    return {x: value for x, value in taken.items() if value is not None}

  def choose(self, name: str, choices: Sequence[str]) -> str:
    """Takes out a field that must be one of `choices`.

    Raises:
      ValueError: if it is none of them.
    """
    if (value := self.pop(name)) not in choices:
      raise ValueError(
        f"expected {name} in {', '.join(map(repr, choices))}, got {value!r}."
      )
    return value

  def finish(self, kind: str, ignored: Iterable[str] = ()) -> None:
    """Raises a `ValueError` that names what would not be honoured.

    Args:
      kind: of the model, for the message.
      ignored: fields that change nothing in this kind of model.
    """
    known = _IGNORED | set(ignored)
    # What is unknown and switched off changes nothing.
    if unknown := sorted(
      name
      for name, value in self._left.items()
      if value and name not in known and not name.startswith("_")
    ):
      raise ValueError(
        f"config.json has fields that this {kind} does not honour: {unknown}."
        " Computing without them could be wrong, so it is refused."
      )


def label_fields(head: heads.Classifier | None) -> dict[str, Any]:
  """The fields of a config.json that tell of a classifier's labels."""
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
  """The names that a config.json gives to the labels of its classifier."""
  names = json.loads((folder / "config.json").read_text()).get("id2label") or {}
  return tuple(names[key] for key in sorted(names, key=int))


def stored_dtype(folder: pathlib.Path) -> str:
  """The dtype that a folder's config.json names; float32 if none."""
  fields = json.loads((folder / "config.json").read_text())
  return fields.get("dtype") or fields.get("torch_dtype") or "float32"


def end_tokens(folder: pathlib.Path) -> tuple[int, ...]:
  """The tokens that end a text, from generation_config.json or config.json."""
  for name in ("generation_config.json", "config.json"):
    path = folder / name
    fields = json.loads(path.read_text()) if path.is_file() else {}
    if (ids := fields.get("eos_token_id")) is not None:
      return tuple(ids) if isinstance(ids, list) else (ids,)
  return ()
