"""Which model a config.json describes."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from fedjax_llm.models import bert, decoder, gpt2, heads, layout, lora, vit


class Family(NamedTuple):
  """A family of models.

  Attributes:
    config: its shape; reads and writes config.json.
    model: the module: `model(config, adapter, head, dtype, remat)`.
    layout: where its parameters are in a checkpoint.
    layers: dotted paths of a block's dense layers, what LoRA can target.
    predicts: whether it is a language model where it has no head, as opposed
      to an encoder, whose last states it then returns.
    reads_text: whether its input is tokens.
  """

  config: Any
  model: Any
  layout: layout.Layout
  layers: tuple[str, ...]
  predicts: bool = True
  reads_text: bool = True


_DECODER = Family(
  decoder.DecoderConfig, decoder.Decoder, decoder.LAYOUT, decoder.LAYERS
)
_FAMILIES = {
  **dict.fromkeys(decoder.decoder_config.MODEL_TYPES, _DECODER),
  "gpt2": Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.LAYOUT, gpt2.LAYERS),
  "bert": Family(
    bert.BertConfig, bert.Bert, bert.LAYOUT, bert.LAYERS, predicts=False
  ),
  "vit": Family(
    vit.ViTConfig,
    vit.ViT,
    vit.LAYOUT,
    vit.LAYERS,
    predicts=False,
    reads_text=False,
  ),
}


def of(config: Any) -> Family:
  """The family of a config."""
  return next(x for x in _FAMILIES.values() if isinstance(config, x.config))


def check_predicts(config: Any) -> None:
  """Raises a `ValueError` unless a config is of a language model."""
  if not of(config).predicts:
    raise ValueError(
      f"expected a language model, got a {config.model_type}, which predicts no"
      " tokens: it can be a classifier."
    )


def model(
  config: Any,
  adapter: lora.LoRA | None = None,
  head: heads.Classifier | None = None,
  **settings: Any,
) -> nn.Module:
  """The module of a config.

  Args:
    config: the model's shape.
    adapter: what gets LoRA factors.
    head: what classifies a row; None for a language model.
    **settings: `dtype` and `remat`.
  """
  return of(config).model(config, adapter, head, **settings)


def from_hugging_face(fields: Mapping[str, Any]) -> Any:
  """The config that the fields of a config.json describe.

  Raises:
    ValueError: for a model that is not supported, or not all of it.
  """
  kind = fields.get("model_type")
  if kind not in _FAMILIES:
    raise ValueError(
      f"expected model_type in {', '.join(_FAMILIES)}, got {kind!r}."
    )
  return _FAMILIES[kind].config.from_hugging_face(fields)


def read_config(folder: pathlib.Path) -> Any:
  """Reads the `config.json` of a model folder.

  Raises:
    ValueError: if there is none, or it describes a model not supported here.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"expected a config.json in {folder}, found none.")
  try:
    return from_hugging_face(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
