"""Federated fine-tuning, as an experiment.

task = tasks.language_model(records.streams(corpora.standard_library()), ...)
algorithm = flasc.flasc(task.loss_fn, optax.sgd(0.1), ...)
experiment = finetuning.federated(task, algorithm, rounds=20, ...)
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from fedjax_llm import experiment, tasks
from fedjax_llm.data import cohorts
from fedjax_llm.federated import rounds


def federated(
  task: tasks.Task,
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
  placement = tasks.replicated(task.mesh)
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
    result = task.evaluate(sent, task.frozen)
    same = jax.tree.all(jax.tree.map(np.array_equal, sent, kept))
    server = result if same else task.evaluate(kept, task.frozen)
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


def _bytes(metrics: Mapping[str, Any], name: str) -> dict[str, int]:
  """Bytes of a direction: all clients together, and the largest message."""
  sizes = metrics[name].astype(np.int64)
  return {name: int(sizes.sum()), f"{name}_per_client": int(sizes.max())}
