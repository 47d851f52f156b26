"""FLASC at toy size, run by the tests as a user would run it."""

import dataclasses
import os
import time

import optax

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated.algorithms import flasc
from fedjax_llm.models import lora


def corpus() -> corpora.Corpus:
  """Clients that count, each in steps of its own."""
  count = lambda step, start: " ".join(
    str(step * number) for number in range(start, start + 40)
  )
  clients = tuple(
    corpora.Client(f"step{step}", (count(step, 0),), (count(step, 40),))
    for step in range(1, 7)
  )
  return corpora.Corpus("counting", clients, "made in tests/toy_config.py")


def experiment(
  *,
  model: str,
  seed: int = 0,
  rounds: int = 6,
  clients_per_round: int = 3,
  clients_per_step: int | None = None,
  download_density: float = 0.5,
  upload_density: float = 0.25,
  client_learning_rate: float = 0.1,
  sequence_length: int = 16,
) -> runner.Experiment:
  """Fine-tune a tiny random Llama on counting.

  Args:
    model: folder of the base model.
    seed: of everything random.
    rounds: how many rounds.
    clients_per_round: clients that train in a round, of 6.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    download_density: share of the factors' entries that the server sends.
    upload_density: share of an update's entries that a client sends.
    client_learning_rate: of the clients' SGD.
    sequence_length: tokens a row.
  """
  task = tasks.language_model(
    records.streams(corpus(), held_out_rows=1),
    model=model,
    adapter=lora.LoRA(rank=2, alpha=4.0),
    sequence_length=sequence_length,
    placement=fl.Placement(clients_per_step=clients_per_step),
    seed=seed,
  )
  algorithm = flasc.flasc(
    task.loss_fn,
    optax.sgd(client_learning_rate, momentum=0.9),
    flasc.server_adamw(1e-2),
    download_density=download_density,
    upload_density=upload_density,
    placement=task.placement,
  )
  made = finetuning.federated(
    task,
    algorithm,
    rounds=rounds,
    clients_per_round=clients_per_round,
    batch_size=2,
    local_steps=2,
    evaluate_every=2,
    checkpoint_every=2,
  )

  def slow_round(state, number):
    # So that a test can kill it there.
    time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
    return made.round(state, number)

  return dataclasses.replace(made, round=slow_round)
