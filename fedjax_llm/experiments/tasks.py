"""Tasks: a model and the data to fine-tune it on.

A task has the model's trained and frozen parameters, the clients' examples, and
a function that evaluates the model on held-out examples. `language_model` and
`classifier` are for texts and models of the hub, `custom` for everything else.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from fedjax_llm.data import arrays, batches, records
from fedjax_llm.experiments import base_models, loading, objectives, programs
from fedjax_llm.federated import clients, draws
from fedjax_llm.models import families, heads, hub_config, lora, pretrained

Dtype = base_models.Dtype
Quantize = base_models.Quantize


@dataclasses.dataclass(frozen=True)
class Task:
  """A model and data to fine-tune it on.

  Attributes:
    loss_fn: the loss of a batch, see `federated.clients.local_update`.
    trainable: the parameters that are trained and sent: LoRA factors, with the
      head of a classifier; all parameters, in float32, in full fine-tuning.
    frozen: the parameters that every client has and nobody trains.
    population: the clients and their training examples.
    evaluate: (trainable, frozen) -> `loss` and other metrics on held-out
      examples.
    save_adapter: (trainable, folder, residual=None) -> None; writes a PEFT
      adapter, or a model folder in full fine-tuning. `residual` is what a
      method has added to the base model, see `rounds.FederatedAlgorithm`.
    placement: the devices that clients train on, and how many at once.
    seed: seed of every random draw.
    data: names and fingerprints of the data and the base model.
    adapter: the LoRA settings of the factors; None if there are none.
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


def custom(
  loss_fn: Callable[..., Any],
  trainable: Any,
  frozen: Any,
  examples: Any,
  *,
  starts: Sequence[int] | np.ndarray,
  evaluate: Callable[[Any, Any], dict[str, float]],
  seed: int = 0,
  names: Sequence[str] | None = None,
  save: Callable[..., None] | None = None,
  placement: clients.Placement | None = None,
) -> Task:
  """Makes a task from any model and any arrays.

  Args:
    loss_fn: `(trainable, frozen, examples, mask, key) -> (total, count)`, see
      `federated.clients.local_update`; `examples` is a batch of rows.
    trainable: tree of the parameters that are trained and sent.
    frozen: tree of the parameters that every client has; {} if there are none.
    examples: tree of arrays [rows, ...]. The rows of a client are consecutive.
    starts: the first row of each client, and the number of rows at the end.
    evaluate: (trainable, frozen) -> metrics on held-out data, with a `loss`. A
      resumed run does not detect another `evaluate`: use another folder then.
    seed: seed of the cohorts, and of the draws of clients and compressors.
    names: the names of the clients; numbers if not given.
    save: (trainable, folder) -> None; writes the trained parameters. For
      methods that add to the frozen parameters, it gets `residual=` too. If not
      given, they are written to `trainable.safetensors`.
    placement: the devices that clients train on, and how many at once; all
      devices if not given.

  Raises:
    ValueError: if `examples`, `starts` and `names` do not fit each other; at
      the first evaluation, if `evaluate` returns no `loss`.
  """
  population = arrays.population(examples, starts, names)
  placement = placement or clients.Placement()

  def checked_evaluate(trained, frozen):
    metrics = evaluate(trained, frozen)
    if "loss" not in metrics:
      raise ValueError(
        'expected evaluate to return a dictionary with "loss", got the keys'
        f" {list(metrics)}."
      )
    return dict(metrics)

  def save_adapter(trained, folder, residual=None):
    if save is None and residual is not None:
      raise ValueError(
        "the method adds to the frozen parameters: expected tasks.custom to be"
        " given a `save` with a parameter `residual`."
      )
    options = {} if residual is None else {"residual": residual}
    (save or arrays.save)(trained, folder, **options)

  return Task(
    loss_fn=loss_fn,
    trainable=trainable,
    frozen=jax.device_put(frozen, placement.everywhere),
    population=population,
    evaluate=checked_evaluate,
    save_adapter=save_adapter,
    placement=placement,
    seed=draws.check_seed(seed),
    data={
      "name": "arrays",
      "fingerprint": programs.of_arrays((examples, population.starts)),
      "frozen_fingerprint": programs.of_arrays(frozen),
    },
  )


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
  """Makes a task from a causal language model and the clients' texts.

  Args:
    data: the clients' rows, such as `records.streams(corpus)` or
      `records.instructions(...)`.
    model: Hugging Face folder or hub name; the shipped Llama if not given.
    adapter: the LoRA settings; or the folder or hub name of a PEFT adapter to
      train further. None for full fine-tuning: all parameters are trained and
      sent.
    sequence_length: tokens predicted in a row, at most the model's context.
    dtype: dtype of the base model and its activations. Trained parameters,
      their gradients and optimizers are always float32.
    quantize: format of the base model's layers: "int8", about 8 bits a weight,
      or "nf4", about 4.5 (QLoRA, Dettmers et al., 2023); None for `dtype`.
    remat: whether to recompute activations to save memory.
    placement: the devices that clients train on, and how many at once; all
      devices if not given.
    seed: seed of every random draw.

  Raises:
    ValueError: if the model or the adapter cannot be loaded, rows are longer
      than the context, or `quantize` is given without an adapter.
  """
  folder = pretrained.resolve(model)
  families.check_predicts(families.read_config(folder))
  rows = _rows(data, folder, sequence_length)
  loaded = base_models.load(
    model,
    adapter,
    None,
    dtype=dtype,
    quantize=quantize,
    remat=remat,
    placement=placement,
    seed=seed,
  )
  return _task(rows, loaded, objectives.LANGUAGE, seed)


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
  """Makes a task from a classifier and the clients' texts.

  Its head is trained and sent too. Errors are those of `language_model`.

  Args:
    data: the clients' rows, `records.classified(...)`.
    model: Hugging Face folder or hub name of a decoder or encoder. If it has a
      head with the same number of labels, training starts from that head.
    adapter: as in `language_model`.
    sequence_length: tokens in a row.
    pooling: which state of a row is classified, see `models.heads.Classifier`.
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
      f"the head in {folder} has the labels {stored}, the data order them as"
      f" {head.names}. Give the data a datasets.ClassLabel in the head's order."
    )
  loaded = base_models.load(
    model,
    adapter,
    head,
    dtype=dtype,
    quantize=quantize,
    remat=remat,
    placement=placement,
    seed=seed,
  )
  return _task(rows, loaded, objectives.CLASSIFICATION, seed)


def _rows(
  data: records.RowSource, folder: pathlib.Path, sequence_length: int
) -> records.Split:
  """Makes the rows of `data` with the tokenizer of the model in `folder`."""
  config = families.read_config(folder)
  if not families.of(config).reads_text:
    raise ValueError(
      f"expected a text model, got {folder.name}, a {config.model_type}; no"
      " task reads images."
    )
  if sequence_length > config.max_position_embeddings:
    raise ValueError(
      f"expected sequence_length <= {config.max_position_embeddings}, the"
      f" context of {folder.name}, got {sequence_length}."
    )
  rows = data(loading.load_tokenizer(folder), sequence_length)
  for population in (rows.train, rows.held_out):
    loading.check_tokens(population.examples.tokens, config)
  return rows


def _task(
  rows: records.Split,
  loaded: base_models.Loaded,
  kind: objectives.Objective,
  seed: int,
) -> Task:
  """Makes a task from its rows and its model."""
  network = loaded.network
  if loaded.adapter is None:
    kind = kind.of_all_parameters()
  return Task(
    loss_fn=kind.loss_fn(network),
    trainable=loaded.trainable,
    frozen=loaded.frozen,
    population=rows.train,
    evaluate=kind.evaluator(kind.score_fn(network), rows.held_out.examples),
    save_adapter=loaded.save,
    placement=loaded.placement,
    seed=seed,
    data={**rows.identity, **loaded.identity},
    adapter=loaded.adapter,
  )
