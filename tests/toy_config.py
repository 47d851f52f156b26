"""FLASC at toy size, run by the tests as a user would run it."""

import dataclasses
import os
import time

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, knobs, runner, tasks
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
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=6,
    clients_per_round=3,
    batch_size=2,
    local_steps=2,
    evaluate_every=2,
    checkpoint_every=2,
  ),
  rates: knobs.Rates = knobs.Rates(0.1),
  densities: knobs.Densities = knobs.Densities(0.5, 0.25),
  sequence_length: int = 16,
  clients_per_step: int | None = None,
) -> runner.Experiment:
  """Fine-tune a tiny random Llama on counting.

  Args:
    model: folder of the base model.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each, of 6 clients.
    rates: the learning rates.
    densities: the share of the entries that is sent.
    sequence_length: tokens in a row.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
  """
  task = tasks.language_model(
    records.streams(corpus(), held_out_rows=1),
    model=model,
    adapter=lora.LoRA(rank=2, alpha=4.0),
    sequence_length=sequence_length,
    placement=fl.Placement(clients_per_step=clients_per_step),
    seed=seed,
  )
  algorithm = densities.flasc(task, rates)
  made = finetuning.fine_tuning(task, algorithm, schedule)

  def slow_round(state, number):
    # So that a test can kill it there.
    time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
    return made.round(state, number)

  return dataclasses.replace(made, round=slow_round)
