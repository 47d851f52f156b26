"""Tasks: what is fine-tuned on what.

A base model, what is trained of it, the clients' rows and the held-out rows.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import transformers

from fedjax_llm.data import batches, records
from fedjax_llm.experiments import objectives
from fedjax_llm.federated import clients, draws
from fedjax_llm.models import (
  adapters,
  families,
  heads,
  hub_config,
  lora,
  pretrained,
  quantized,
)

Dtype = Literal["float32", "bfloat16"]
Quantize = quantized.Format


@dataclasses.dataclass(frozen=True)
class Task:
  """What is fine-tuned, on what.

  Attributes:
    loss_fn: for `federated.clients.local_update`.
    trainable: the LoRA factors to start from, with the head of a classifier;
      or in full fine-tuning all parameters, in float32.
    frozen: the base model's parameters; nothing in full fine-tuning.
    population: the clients and their training rows.
    evaluate: (trainable, frozen) -> `loss`, `accuracy` and more on held-out
      rows.
    save_adapter: (trainable, folder, residual=None) -> None; writes a PEFT
      adapter, with what a method has added to the base model if it has, see
      `rounds.FederatedAlgorithm`. In full fine-tuning, a model folder.
    placement: the devices that clients train on, and how many at once.
    seed: of everything random.
    data: what identifies the rows and the base model.
    adapter: the LoRA that the factors are of; None in full fine-tuning.
  """

  loss_fn: Callable[..., Any]
  trainable: Any
  frozen: Any
  population: batches.Population
  evaluate: Callable[[Any, Any], dict[str, float]]
  save_adapter: Callable[..., None]
  placement: clients.Placement
  seed: int
  data: Mapping[str, str]
  adapter: lora.LoRA | None = None


def language_model(
  data: records.RowSource,
  *,
  model: str | os.PathLike = pretrained.SHIPPED,
  adapter: lora.LoRA | str | os.PathLike | None,
  sequence_length: int,
  dtype: Dtype = "float32",
  quantize: Quantize | None = None,
  remat: bool = False,
  placement: clients.Placement | None = None,
  seed: int = 0,
) -> Task:
  """Fine-tuning of a causal language model on federated texts.

  Args:
    data: the clients' rows, such as `records.streams(corpus)` or
      `records.instructions(...)`.
    model: Hugging Face folder or hub name; the shipped Llama if not given.
    adapter: which layers get LoRA factors, and how; or the folder or hub name
      of a PEFT adapter, to go on training from. None for full fine-tuning:
      all parameters are trained and sent.
    sequence_length: tokens predicted a row, at most the model's context.
    dtype: what the base model is kept and computed in. What is trained, its
      gradients and optimizers are float32 always.
    quantize: keep the kernels of the base model's layers in 8 or about 4.5
      bits a weight instead (QLoRA, Dettmers et al., 2023).
    remat: recompute activations to save memory.
    placement: the devices that clients train on, and how many at once; all
      devices if not given.
    seed: of the factors, the cohorts, the dropout and the compressors.

  Raises:
    ValueError: if the model or adapter cannot be loaded, a row does not fit, or
      quantised kernels were to be trained.
  """
  folder = pretrained.resolve(model)
  families.check_predicts(families.read_config(folder))
  rows = _rows(data, folder, sequence_length)
  kind = objectives.LANGUAGE
  return _task(
    rows, model, adapter, None, kind, dtype, quantize, remat, placement, seed
  )


def classifier(
  data: records.RowSource,
  *,
  model: str | os.PathLike,
  adapter: lora.LoRA | str | os.PathLike | None,
  sequence_length: int,
  pooling: Literal["last", "first", "mean"] | None = None,
  dtype: Dtype = "float32",
  quantize: Quantize | None = None,
  remat: bool = False,
  placement: clients.Placement | None = None,
  seed: int = 0,
) -> Task:
  """Fine-tuning of a classifier on federated texts.

  Its head is trained and sent with the rest. Arguments and errors are those
  of `language_model`, but for:

  Args:
    data: the clients' rows, `records.classified(...)`.
    model: Hugging Face folder or hub name of a decoder or encoder. Where it has
      a head of as many labels, training starts from that.
    adapter: as in `language_model`.
    sequence_length: tokens a row.
    pooling: what of a row is classified, see `models.heads.Classifier`.
    dtype: as in `language_model`.
    quantize: as in `language_model`.
    remat: as in `language_model`.
    placement: as in `language_model`.
    seed: as in `language_model`.
  """
  folder = pretrained.resolve(model)
  rows = _rows(data, folder, sequence_length)
  examples: Any = rows.train.examples
  head = heads.Classifier(
    labels=len(rows.train.label_names),
    pooling=pooling,
    multi_label=examples.labels.ndim > 1,
    names=rows.train.label_names,
  )
  stored = hub_config.label_names(folder)
  if sorted(stored) == sorted(head.names) and stored != head.names:
    raise ValueError(
      f"the head in {folder} scores {stored}, the data number their labels as"
      f" {head.names}. Give the data a datasets.ClassLabel of the head's order."
    )
  kind = objectives.CLASSIFICATION
  return _task(
    rows, model, adapter, head, kind, dtype, quantize, remat, placement, seed
  )


def _rows(
  data: records.RowSource, folder: pathlib.Path, sequence_length: int
) -> records.Split:
  """The rows of `data` in tokens of the model in `folder`."""
  config = families.read_config(folder)
  if not families.of(config).reads_text:
    raise ValueError(
      f"expected a model of texts, got {folder.name}, a {config.model_type}; no"
      " task reads images."
    )
  if sequence_length > config.max_position_embeddings:
    raise ValueError(
      f"expected sequence_length <= {config.max_position_embeddings}, the"
      f" context of {folder.name}, got {sequence_length}."
    )
  rows = data(load_tokenizer(folder), sequence_length)
  for population in (rows.train, rows.held_out):
    check_tokens(population.examples.tokens, config)
  return rows


def _task(
  rows: records.Split,
  model: str | os.PathLike,
  adapter: lora.LoRA | str | os.PathLike | None,
  head: heads.Classifier | None,
  kind: objectives.Objective,
  dtype: Dtype,
  quantize: Quantize | None,
  remat: bool,
  placement: clients.Placement | None,
  seed: int,
) -> Task:
  """Loads what is fine-tuned; see `language_model`."""
  is_full = adapter is None
  if is_full and quantize:
    raise ValueError(
      f"full fine-tuning trains the kernels, got {quantize=}. Leave it out, or"
      " give an adapter."
    )
  folder = pretrained.resolve(model)
  placement = placement or clients.Placement()
  config, frozen = pretrained.load(
    folder,
    head=head,
    dtype=jnp.dtype("float32" if is_full else dtype),
    quantize=quantize,
    sharding=placement.everywhere,
  )
  trainable = None
  data = {
    **rows.identity,
    "base_model": pathlib.Path(model).name,
    "base_model_fingerprint": pretrained.fingerprint(folder),
  }
  if isinstance(adapter, (str, os.PathLike)):
    start = pretrained.resolve(adapter)
    data["adapter_fingerprint"] = pretrained.fingerprint(start)
    adapter, trainable = adapters.load(start, config)
  network = families.model(
    config, adapter, head, dtype=jnp.dtype(dtype), remat=remat
  )
  if is_full:
    shapes = lora.abstract_variables(network)["params"]
    params = heads.complete(frozen, shapes, draws.key(seed))
    trainable, frozen, kind = params, {}, kind.of_all_parameters()
  elif trainable is None:
    trainable = lora.init(network, draws.key(seed), frozen)
  else:
    lora.check(network, trainable)
  return Task(
    loss_fn=kind.loss_fn(network),
    trainable=trainable,
    frozen=frozen,
    population=rows.train,
    evaluate=kind.evaluator(kind.score_fn(network), rows.held_out.examples),
    save_adapter=_saver(adapter, config, str(model), head),
    placement=placement,
    seed=seed,
    data=data,
    adapter=adapter,
  )


def _saver(adapter, config, model, head):
  """Makes what writes a PEFT adapter, or a model if there is no adapter."""

  def save(trained, folder, residual=None):
    if adapter is not None:
      named = dict(config=config, base_model=model, head=head)
      adapters.save(folder, trained, adapter, residual=residual, **named)
      return
    like = pretrained.resolve(model)
    pretrained.save(
      folder, config, trained, head=head, dtype=jnp.float32, like=like
    )

  return save


def load_tokenizer(
  folder: pathlib.Path,
) -> transformers.PreTrainedTokenizerBase:
  """The tokenizer of a model folder.

  Raises:
    ValueError: if there is none.
  """
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

  Tokenizers may have more than their model has, as Gemma 3's, for images.
  """
  if tokens.size and tokens.max() >= config.vocab_size:
    raise ValueError(
      f"the tokenizer wrote token {tokens.max()}, the model has only"
      f" {config.vocab_size}. Take the tokenizer that it was trained with."
    )
