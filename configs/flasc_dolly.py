"""FLASC on Dolly-15k: instructions, the ten clients of Shepherd (FedIT).

  FEDJAX_LLM_DATA=folder fedjax-llm run flasc_dolly

The folder holds `dolly15k_fed10/local_training_*.json`, a file a client, and
`global_test.json`, ten held-out records of each of the eight categories. The
same from the hub, divided by Shepherd's algorithm, and with a real model:

  fedjax-llm run flasc_dolly --data databricks/databricks-dolly-15k
    --clients shepherd --model Qwen/Qwen2.5-0.5B --sequence-length 512

2 cores of an AMD EPYC: a minute and a half. Seed 0: held-out loss 5.744 to
4.875 with 16.6 MB sent; 4,019 of 14,931 records have no answer within a row,
since their context fills it. The record is `benchmarks/results/flasc_dolly/`.
"""

import os
import pathlib
from typing import Literal

import optax

import fedjax_llm as fl
from fedjax_llm.data import partition, records, sources, templates
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated.algorithms import flasc
from fedjax_llm.models import decoder, lora, pretrained

DATA = pathlib.Path(os.environ.get("FEDJAX_LLM_DATA", "../shared/data"))


def experiment(
  *,
  model: str | None = None,
  data: str = str(DATA / "dolly15k_fed10" / "local_training_*.json"),
  held_out: str = str(DATA / "dolly15k_fed10" / "global_test.json"),
  clients: Literal["files", "shepherd"] = "files",
  init_adapter: str | None = None,
  seed: int = 0,
  rounds: int = 20,
  clients_per_round: int = 5,
  clients_per_step: int | None = None,
  rank: int = 8,
  alpha: float = 4.0,
  dropout: float = 0.0,
  targets: tuple[str, ...] = decoder.LINEAR,
  download_density: float = 0.25,
  upload_density: float = 0.0625,
  client_learning_rate: float = 0.5,
  server_learning_rate: float = 1e-2,
  local_epochs: int = 1,
  local_steps: int = 4,
  batch_size: int = 4,
  sequence_length: int = 255,
  held_out_rows: int = 80,
  dtype: tasks.Dtype = "float32",
  quantize: tasks.Quantize | None = None,
) -> runner.Experiment:
  """Fine-tune on Dolly's answers with FLASC, clients rich in some categories.

  Args:
    model: Hugging Face folder or hub name of the base model; the shipped one if
      not given.
    data: the records, by a spec of `data.sources.load`.
    held_out: the held-out records, where `clients` is "files".
    clients: "files" where every file of `data` is a client; "shepherd" to
      divide the records as Shepherd's code does, which holds out ten of each
      category.
    init_adapter: PEFT folder or hub name of an adapter to go on from, in place
      of new factors.
    seed: of everything random.
    rounds: how many rounds.
    clients_per_round: clients that train in a round, of 10.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    rank: of the LoRA factors.
    alpha: the factors' product is scaled by alpha / rank.
    dropout: on the inputs of the factors.
    targets: names of the layers that get factors; those of GPT-2 are c_attn,
      c_proj and c_fc.
    download_density: share of what is trained that the server sends.
    upload_density: share of an update that a client sends.
    client_learning_rate: of the clients' SGD with momentum 0.9.
    server_learning_rate: of the server's AdamW with weight decay 0.01.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round.
    batch_size: rows a local step.
    sequence_length: tokens a row.
    held_out_rows: held-out records that are evaluated, the first.
    dtype: what the base model is computed in.
    quantize: keep the base model's layers in 8 or about 4.5 bits a weight.
  """
  if clients == "files":
    source = records.instructions(
      sources.load(data),
      templates.dolly(),
      partition.natural(),
      client_column="file",
      label_column="category",
      held_out=sources.load(held_out),
      held_out_rows=held_out_rows,
      seed=seed,
    )
  else:
    source = records.instructions(
      sources.load(data),
      templates.dolly(),
      partition.shepherd(clients=10, seed=seed),
      label_column="category",
      held_out="left_out",
      held_out_rows=held_out_rows,
      seed=seed,
    )
  task = tasks.language_model(
    source,
    model=model or pretrained.SHIPPED,
    adapter=init_adapter or lora.LoRA(rank, alpha, dropout, targets),
    sequence_length=sequence_length,
    dtype=dtype,
    quantize=quantize,
    placement=fl.Placement(clients_per_step=clients_per_step),
    seed=seed,
  )
  algorithm = flasc.flasc(
    task.loss_fn,
    optax.sgd(client_learning_rate, momentum=0.9),
    flasc.server_adamw(server_learning_rate),
    download_density=download_density,
    upload_density=upload_density,
    placement=task.placement,
  )
  return finetuning.federated(
    task,
    algorithm,
    rounds=rounds,
    clients_per_round=clients_per_round,
    batch_size=batch_size,
    local_epochs=local_epochs,
    local_steps=local_steps,
    weighting="examples",
  )
