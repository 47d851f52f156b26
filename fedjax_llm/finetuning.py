"""Federated fine-tuning of a language model, as an experiment.

A `Task` is what is fine-tuned on what: a base model, its LoRA factors, the
clients' rows and the held-out rows. `federated` runs an algorithm on it:

  task = finetuning.language_model(corpora.standard_library(), ...)
  algorithm = flasc.flasc(task.loss_fn, optax.sgd(0.1), ...)
  experiment = finetuning.federated(task, algorithm, rounds=20, ...)
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from fedjax_llm import experiment
from fedjax_llm.data import batches, cohorts, corpora
from fedjax_llm.evaluation import likelihood
from fedjax_llm.federated import rounds
from fedjax_llm.models import adapters, families, language, lora, pretrained

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Task:
  """What is fine-tuned, on what.

  Attributes:
    loss_fn: for `federated.clients.local_update`.
    trainable: the LoRA factors to start from.
    frozen: the base model's parameters.
    population: the clients and their training rows.
    evaluate: factors -> `loss`, `perplexity` and `accuracy` on held-out rows.
    save_adapter: (factors, folder) -> None; writes a PEFT adapter.
    mesh: the devices that clients are shared out over.
    seed: of everything random.
    data: what identifies the corpus and the base model.
  """

  loss_fn: Callable[..., Any]
  trainable: Any
  frozen: Any
  population: batches.Population
  evaluate: Callable[[Any], dict[str, float]]
  save_adapter: Callable[[Any, pathlib.Path], None]
  mesh: jax.sharding.Mesh
  seed: int
  data: Mapping[str, str]


def language_model(
  corpus: corpora.Corpus,
  *,
  model: str | os.PathLike = pretrained.SHIPPED,
  adapter: lora.LoRA,
  sequence_length: int,
  held_out_rows: int | None = None,
  dtype: Dtype = "float32",
  remat: bool = False,
  seed: int = 0,
) -> Task:
  """LoRA fine-tuning of a causal language model on a federated corpus.

  Args:
    corpus: the clients' texts.
    model: Hugging Face folder or hub name of a Llama; the shipped one if not
      given.
    adapter: which layers get LoRA factors, and how.
    sequence_length: tokens predicted a row, at most the model's context.
    held_out_rows: rows evaluated of each client's held-out text; None for all.
    dtype: what the base model is kept and computed in. Factors, their
      gradients and optimizers are float32 always.
    remat: recompute activations to save memory.
    seed: of the factors, the cohorts, the dropout and the compressors.

  Raises:
    ValueError: if the model cannot be loaded, or a row does not fit it.
  """
  folder = pretrained.resolve(model)
  config, frozen = pretrained.load(folder, dtype=jnp.dtype(dtype))
  tokenizer = load_tokenizer(folder, config)
  if sequence_length > config.max_position_embeddings:
    raise ValueError(
      f"expected sequence_length <= {config.max_position_embeddings}, the"
      f" context of {folder.name}, got {sequence_length}."
    )
  network = families.model(config, adapter, dtype=jnp.dtype(dtype), remat=remat)
  held_out = batches.held_out(corpus, tokenizer, sequence_length, held_out_rows)
  evaluate = likelihood.evaluator(language.score_fn(network), held_out.examples)
  mesh = device_mesh()
  frozen = jax.device_put(frozen, replicated(mesh))
  return Task(
    loss_fn=language.loss_fn(network),
    trainable=lora.init(network, jax.random.key(seed)),
    frozen=frozen,
    population=batches.population(corpus, tokenizer, sequence_length),
    evaluate=lambda factors: evaluate(factors, frozen),
    save_adapter=lambda factors, folder: adapters.save(
      folder, factors, adapter, config=config, base_model=str(model)
    ),
    mesh=mesh,
    seed=seed,
    data={
      **corpora.identity(corpus),
      "base_model": pathlib.Path(model).name,
      "base_model_fingerprint": pretrained.fingerprint(folder),
    },
  )


def federated(
  task: Task,
  algorithm: rounds.FederatedAlgorithm,
  *,
  rounds: int,
  clients_per_round: int,
  batch_size: int,
  local_epochs: int = 1,
  local_steps: int | None = None,
  weighting: Literal["uniform", "examples"] = "uniform",
  evaluate_every: int = 5,
  checkpoint_every: int = 5,
) -> experiment.Experiment:
  """Runs a federated algorithm on a task.

  Args:
    task: what is fine-tuned, on what.
    algorithm: how.
    rounds: how many rounds.
    clients_per_round: how many clients train in each.
    batch_size: rows a local step.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round; None for no limit.
    weighting: of the clients, see `data.cohorts.cohort_sampler`.
    evaluate_every: rounds between evaluations.
    checkpoint_every: rounds between checkpoints.

  Returns:
    An experiment. Its `loss` and the PEFT folder `adapter` that it exports are
    of the model as clients receive it, which for FLASC is the masked one;
    `server_loss` is that of the parameters the server keeps. Bytes are of all
    clients of the round together, and of the one with the largest message.
  """
  sample = cohorts.cohort_sampler(
    task.population,
    clients_per_round=clients_per_round,
    batch_size=batch_size,
    local_epochs=local_epochs,
    local_steps=local_steps,
    weighting=weighting,
    seed=task.seed,
  )
  key = jax.random.key(task.seed)
  placement = replicated(task.mesh)
  examples = jax.device_put(task.population.examples, placement)
  advance = jax.jit(
    algorithm.round, donate_argnums=0, out_shardings=(placement, None)
  )
  received = jax.jit(algorithm.received)

  def init():
    return jax.device_put(algorithm.init(task.trainable), placement)

  def round_fn(state, number):
    cohort = sample(number)
    state, metrics = advance(state, task.frozen, examples, cohort, key)
    metrics = jax.device_get(metrics)
    if not metrics["finite"].all():
      diverged = cohort.clients[~metrics["finite"]]
      names = ", ".join(task.population.names[client] for client in diverged)
      raise FloatingPointError(
        f"round {number + 1}: the update of {names} is not finite and was not"
        " sent. Lower client_learning_rate; the last checkpoint is kept."
      )
    return state, {
      "train_loss": metrics["train_loss"],
      "tokens": metrics["tokens"],
      **_bytes(metrics, "download_bytes"),
      **_bytes(metrics, "upload_bytes"),
    }

  def evaluate(state):
    sent, kept = received(state, key), state.trainable
    result = task.evaluate(sent)
    same = jax.tree.all(jax.tree.map(np.array_equal, sent, kept))
    server = result if same else task.evaluate(kept)
    return result | {f"server_{name}": x for name, x in server.items()}

  def export(state, folder):
    task.save_adapter(received(state, key), folder / "adapter")

  return experiment.Experiment(
    rounds=rounds,
    init=init,
    round=round_fn,
    evaluate=evaluate,
    export=export,
    data=task.data,
    population=task.population,
    evaluate_every=evaluate_every,
    checkpoint_every=checkpoint_every,
  )


def load_tokenizer(
  folder: pathlib.Path, config: Any
) -> transformers.PreTrainedTokenizerBase:
  """The tokenizer of a model folder, checked against the model's vocabulary.

  Raises:
    ValueError: if there is none, or it has tokens that the model lacks.
  """
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"cannot load a tokenizer from {folder}: {error}"
    ) from error
  if tokenizer is None:
    raise ValueError(f"expected a tokenizer in {folder}, found none.")
  if len(tokenizer) > config.vocab_size:
    raise ValueError(
      f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model only"
      f" {config.vocab_size}."
    )
  return tokenizer


def device_mesh() -> jax.sharding.Mesh:
  """All devices, on an axis "clients"."""
  return jax.make_mesh(
    (jax.device_count(),),
    ("clients",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Placement of an array on every device of `mesh`."""
  return jax.sharding.NamedSharding(mesh, jax.P())


def _bytes(metrics: Mapping[str, Any], name: str) -> dict[str, int]:
  """Bytes of a direction: all clients together, and the largest message."""
  sizes = metrics[name].astype(np.int64)
  return {name: int(sizes.sum()), f"{name}_per_client": int(sizes.max())}
