"""A base model, with what an adapter adds to it, by the names users give."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import transformers

from fedjax_llm.experiments import tasks
from fedjax_llm.models import (
  adapters,
  families,
  heads,
  lora,
  peft_files,
  pretrained,
)


class Model(NamedTuple):
  """A base model, with what an adapter adds to it.

  Attributes:
    folder: of the base model.
    config: its shape.
    params: its parameters.
    adapter: what the factors were made with; None if there are none.
    trained: the factors, with the head of a classifier.
    head: None for a language model.
  """

  folder: pathlib.Path
  config: Any
  params: dict[str, Any]
  adapter: lora.LoRA | None
  trained: Any
  head: heads.Classifier | None

  def network(self, dtype: Any) -> nn.Module:
    """The model, with its adapter if there is one."""
    return families.model(self.config, self.adapter, self.head, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What every task computes with.

  Attributes:
    dtype: of activations and of the base model.
    sequence_length: tokens that a model is given at once; None for what the
      task has by default.
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
    """Tokens that a model is given at once, by default at most `most`."""
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
  """Loads a base model, by default the one that the adapter is for."""
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
  """What a run has trained: the model or the adapter for `load`.

  Args:
    run: folder of a run, whose export it is; or what that export would be: a
      folder or hub name of an adapter or, after full fine-tuning, of a model.

  Raises:
    ValueError: if the run has not been exported.
  """
  folder = pathlib.Path(run)
  if (folder / "run.json").is_file():
    folder = folder / "adapter"
    if not folder.is_dir():
      raise ValueError(
        f"expected a finished run in {run}, which has no adapter yet. Export"
        " what it has: fedjax-llm export CONFIG --out RUN."
      )
  folder = pretrained.resolve(folder)
  if (folder / peft_files.FILES[0]).is_file():
    return None, str(folder)
  return str(folder), None


def tokenizer_of(loaded: Model) -> transformers.PreTrainedTokenizerBase:
  """The tokenizer of a language model; refuses what is none."""
  families.check_predicts(loaded.config)
  if loaded.head is not None:
    raise ValueError(
      "expected a language model, got the adapter of a classifier, whose task"
      " is classification."
    )
  return tasks.load_tokenizer(loaded.folder)
