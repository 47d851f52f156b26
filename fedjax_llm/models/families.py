"""Finds the family of models that a config.json describes."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from fedjax_llm.models import bert, decoder, gpt2, heads, layout, lora, vit


class Family(NamedTuple):
  """A family of models.

  Attributes:
    config: the class of the config, which reads and writes config.json.
    model: the class of the model, a `stack.Model`.
    layout: the names of the parameters in a checkpoint.
    predicts: whether the model without a head is a language model. If False, it
      is an encoder and returns its last hidden states.
    reads_text: whether the input is tokens.
  """

  config: Any
  model: Any
  layout: layout.Layout
  predicts: bool = True
  reads_text: bool = True


_DECODER = Family(decoder.DecoderConfig, decoder.Decoder, decoder.LAYOUT)
_FAMILIES = {
  **dict.fromkeys(decoder.decoder_config.MODEL_TYPES, _DECODER),
  "gpt2": Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.LAYOUT),
  "bert": Family(bert.BertConfig, bert.Bert, bert.LAYOUT, predicts=False),
  "vit": Family(
    vit.ViTConfig, vit.ViT, vit.LAYOUT, predicts=False, reads_text=False
  ),
}


def of(config: Any) -> Family:
  """Returns the family of a config."""
  return next(x for x in _FAMILIES.values() if isinstance(config, x.config))


def check_predicts(config: Any) -> None:
  """Raises a `ValueError` unless the config describes a language model."""
  if not of(config).predicts:
    raise ValueError(
      f"expected a language model, got a {config.model_type}, which predicts no"
      " tokens. Use it as a classifier, or take another model."
    )


def model(
  config: Any,
  adapter: lora.LoRA | None = None,
  head: heads.Classifier | None = None,
  **settings: Any,
) -> nn.Module:
  """Returns the Flax module that a config describes.

  Args:
    config: the shape of the model.
    adapter: the LoRA adapter; None for the base model alone.
    head: the classification head, or None.
    **settings: `dtype` and `remat` of the module.
  """
  return of(config).model(config, adapter, head, **settings)


def from_hugging_face(fields: Mapping[str, Any]) -> Any:
  """Returns the config that the fields of a config.json describe.

  Raises:
    ValueError: if the model or one of the fields is not supported.
  """
  kind = fields.get("model_type")
  if kind not in _FAMILIES:
    raise ValueError(
      f"expected model_type in {', '.join(_FAMILIES)}, got {kind!r}. Take a"
      " model of one of these families."
    )
  return _FAMILIES[kind].config.from_hugging_face(fields)


def read_config(folder: pathlib.Path) -> Any:
  """Reads the `config.json` of a model folder.

  Raises:
    ValueError: if the file is missing or describes an unsupported model.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(
      f"expected a config.json in {folder}, found none. Give the folder of a"
      " Hugging Face model."
    )
  try:
    return from_hugging_face(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
