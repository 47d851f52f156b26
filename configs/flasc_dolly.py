"""FLASC on Dolly-15k: instructions, the ten clients of Shepherd (FedIT).

  FEDJAX_LLM_DATA=folder fedjax-llm run flasc_dolly

The folder holds `dolly15k_fed10/local_training_*.json`, one file for each
client, and `global_test.json`, ten held-out records of each of the eight
categories. With the data from the hub, divided by Shepherd's algorithm, and a
larger model:

  fedjax-llm run flasc_dolly --data databricks/databricks-dolly-15k
    --clients shepherd --model Qwen/Qwen2.5-0.5B --sequence-length 512

2 cores of an AMD EPYC: a minute and a half. Seed 0: held-out loss 5.744 to
4.875 with 16.6 MB sent. 4,019 of 14,931 records are left out, because their
context fills the row. The record is `benchmarks/results/flasc_dolly/`.
"""

from typing import Any, Literal

import fedjax_llm as fl
from fedjax_llm.data import partition, records, sources, templates
from fedjax_llm.experiments import finetuning, knobs, runner, tasks
from fedjax_llm.models import decoder, pretrained


def experiment(
  *,
  model: str | None = None,
  data: str = str(knobs.DATA / "dolly15k_fed10" / "local_training_*.json"),
  held_out: str = str(knobs.DATA / "dolly15k_fed10" / "global_test.json"),
  clients: Literal["files", "shepherd"] = "files",
  init_adapter: str | None = None,
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=20, clients_per_round=5, batch_size=4, local_steps=4
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  rates: knobs.Rates = knobs.Rates(0.5),
  densities: knobs.Densities = knobs.Densities(),
  sequence_length: int = 255,
  held_out_rows: int = 80,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune on Dolly's answers with FLASC; clients differ in categories.

  Args:
    model: Hugging Face folder or hub name of the base model; the shipped one if
      not given.
    data: the records, by a spec of `data.sources.load`.
    held_out: the held-out records, by such a spec, if `clients` is "files".
    clients: "files" if every file of `data` is a client; "shepherd" to divide
      the records as Shepherd's code does, which holds out ten of each category.
    init_adapter: PEFT folder or hub name of an adapter to train further; new
      factors if not given.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors; GPT-2's targets are c_attn, c_proj and c_fc.
    rates: the learning rates.
    densities: the shares of entries that are sent.
    sequence_length: tokens in a row.
    held_out_rows: number of held-out records to evaluate, from the first.
    compute: how the model is computed.
  """
  if clients == "files":
    partitioner = partition.natural()
    division: dict[str, Any] = dict(
      client_column="file", held_out=sources.load(held_out)
    )
  else:
    partitioner = partition.shepherd(clients=10, seed=seed)
    division = dict(held_out="left_out")
  source = records.instructions(
    sources.load(data),
    templates.dolly(),
    partitioner,
    label_column="category",
    held_out_rows=held_out_rows,
    seed=seed,
    **division,
  )
  task = tasks.language_model(
    source,
    model=model or pretrained.SHIPPED,
    adapter=init_adapter or adapter,
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  algorithm = densities.flasc(task, rates)
  return finetuning.fine_tuning(task, algorithm, schedule)
