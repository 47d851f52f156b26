"""FLASC on the standard library: sparse messages, dense local training.

fedjax-llm run flasc --upload-density 0.0625
"""

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, knobs, runner, tasks
from fedjax_llm.models import decoder


def experiment(
  *,
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=50, clients_per_round=10, batch_size=4, local_steps=8
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  rates: knobs.Rates = knobs.Rates(1.0),
  densities: knobs.Densities = knobs.Densities(),
  sequence_length: int = 128,
  held_out_rows: int = 4,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune the shipped model on Python's library with FLASC.

  Args:
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
    densities: the shares of entries that are sent.
    sequence_length: tokens in a row.
    held_out_rows: rows evaluated of each client's held-out files.
    compute: how the model is computed.
  """
  task = tasks.language_model(
    records.streams(corpora.standard_library(), held_out_rows),
    adapter=adapter,
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  algorithm = densities.flasc(task, rates)
  return finetuning.fine_tuning(task, algorithm, schedule)
