"""Loads a base model and an adapter by the names that users give."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import numpy as np

from fedjax_llm.models import (
  adapters,
  families,
  heads,
  lora,
  peft_files,
  pretrained,
)

if TYPE_CHECKING:
  import transformers


class Model(NamedTuple):
  """A base model, with or without an adapter.

  Attributes:
    folder: folder of the base model.
    config: shape of the base model.
    params: parameters of the base model.
    adapter: LoRA settings of the adapter; None without one.
    trained: the factors, with the head of a classifier; None without an
      adapter.
    head: the head of a classifier; None for a language model.
  """

  folder: pathlib.Path
  config: Any
  params: dict[str, Any]
  adapter: lora.LoRA | None
  trained: Any
  head: heads.Classifier | None

  def network(self, dtype: Any) -> nn.Module:
    """Returns the Flax module, with LoRA layers if there is an adapter."""
    return families.model(self.config, self.adapter, self.head, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings that all evaluations share.

  Attributes:
    dtype: dtype of the base model and its activations.
    sequence_length: tokens in a row; None for the default of the evaluation.
    batch_size: rows scored at once.
  """

  dtype: Any
  sequence_length: int | None
  batch_size: int

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(
        f"--batch-size expected at least 1, got {self.batch_size}."
      )

  def length(self, config: Any, most: int | None) -> int:
    """Returns the tokens in a row: by default the context, at most `most`."""
    context = config.max_position_embeddings
    length = self.sequence_length
    if length is None:
      length = min(context, most or context)
    if not 1 <= length <= context:
      raise ValueError(
        f"--sequence-length expected at least 1 and at most {context}, the"
        f" model's context, got {length}."
      )
    return length


def load(model: str | None, adapter: str | None, dtype: Any) -> Model:
  """Loads a base model, by default the one that the adapter names."""
  if model is None and adapter is None:
    raise ValueError("expected --model, --adapter or both, got neither.")
  from_peft = None if adapter is None else pretrained.resolve(adapter)
  folder = pretrained.resolve(model or adapters.base_model(str(from_peft)))
  config = families.read_config(folder)
  settings, trained, head = None, None, None
  if from_peft is not None:
    settings, trained = adapters.load(from_peft, config)
    head = adapters.head_of(from_peft, trained)
  config, params = pretrained.load(folder, head=head, dtype=dtype)
  loaded = Model(folder, config, params, settings, trained, head)
  if trained is not None:
    lora.check(loaded.network(dtype), trained)
  return loaded


def of_run(run: str) -> tuple[str | None, str | None]:
  """Returns the model and the adapter of a run for `load`; one is None.

  Args:
    run: folder of a run; or folder or hub name of an adapter or a model.

  Raises:
    ValueError: if the run has not been exported.
  """
  folder = pathlib.Path(run)
  if (folder / "run.json").is_file():
    folder = folder / "adapter"
    if not folder.is_dir():
      raise ValueError(
        f"expected a finished run, but {run} has no adapter yet. Export its"
        " last checkpoint: fedjax-llm export CONFIG --out RUN."
      )
  folder = pretrained.resolve(folder)
  if (folder / peft_files.FILES[0]).is_file():
    return None, str(folder)
  return str(folder), None


def tokenizer_of(loaded: Model) -> transformers.PreTrainedTokenizerBase:
  """Returns the tokenizer of a language model; refuses other models."""
  families.check_predicts(loaded.config)
  if loaded.head is not None:
    raise ValueError(
      "expected a language model, got the adapter of a classifier, whose task"
      " is classification."
    )
  return load_tokenizer(loaded.folder)


def load_tokenizer(
  folder: pathlib.Path,
) -> transformers.PreTrainedTokenizerBase:
  """Loads the tokenizer of a model folder.

  Raises:
    ValueError: if there is none.
  """
  import transformers

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"cannot load a tokenizer from {folder}: {error}"
    ) from error
  if tokenizer is None:
    raise ValueError(f"expected a tokenizer in {folder}, found none.")
  return tokenizer


def check_tokens(tokens: np.ndarray, config: Any) -> None:
  """Raises a `ValueError` if a model lacks one of `tokens`.

  A tokenizer may have more tokens than its model, as Gemma 3's, for images.
  """
  if tokens.size and tokens.max() >= config.vocab_size:
    raise ValueError(
      f"the tokenizer wrote token {tokens.max()}, the model has only"
      f" {config.vocab_size}. Take the tokenizer that it was trained with."
    )
