"""Dense federated LoRA on the standard library: FLASC's baseline.

fedjax-llm run dense_lora
"""

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, knobs, runner, tasks
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.models import decoder


def experiment(
  *,
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=50, clients_per_round=10, batch_size=4, local_steps=8
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  rates: knobs.Rates = knobs.Rates(1.0),
  sequence_length: int = 128,
  held_out_rows: int = 4,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune the shipped model on Python's library with dense messages.

  Args:
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
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
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    rates.client,
    rates.server,
    aggregate=aggregators.uniform_mean(),
    placement=task.placement,
  )
  return finetuning.fine_tuning(task, algorithm, schedule)
