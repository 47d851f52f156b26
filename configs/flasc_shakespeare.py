"""FLASC on tiny Shakespeare: a trained Llama, speakers as clients.

  FEDJAX_LLM_DATA=folder fedjax-llm run flasc_shakespeare

The folder holds `stories260k`, a Llama that knows children's stories, and
`tinyshakespeare/input.txt`, where 105 speakers have 2,000 characters or more.

2 cores of an AMD EPYC: a minute and a half. Seed 0: held-out loss 4.532 to
3.029 with 32.9 MB sent; the record is `benchmarks/results/flasc_shakespeare/`.
"""

import os
import pathlib

import optax

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated.algorithms import flasc
from fedjax_llm.models import decoder, lora

DATA = pathlib.Path(os.environ.get("FEDJAX_LLM_DATA", "../shared/data"))


def experiment(
  *,
  model: str = str(DATA / "stories260k"),
  text: str = str(DATA / "tinyshakespeare" / "input.txt"),
  seed: int = 0,
  rounds: int = 50,
  clients_per_round: int = 10,
  clients_per_step: int | None = None,
  rank: int = 8,
  alpha: float = 4.0,
  dropout: float = 0.0,
  targets: tuple[str, ...] = decoder.LINEAR,
  download_density: float = 0.25,
  upload_density: float = 0.0625,
  client_learning_rate: float = 1.0,
  server_learning_rate: float = 1e-2,
  local_epochs: int = 1,
  local_steps: int = 4,
  batch_size: int = 6,
  sequence_length: int = 96,
  held_out_rows: int = 2,
  dtype: tasks.Dtype = "float32",
) -> runner.Experiment:
  """Fine-tune a small Llama over the speakers of Shakespeare with FLASC.

  Args:
    model: Hugging Face folder or hub name of the base model.
    text: the plays.
    seed: of everything random.
    rounds: how many rounds.
    clients_per_round: clients that train in a round, of 105.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    rank: of the LoRA factors.
    alpha: the factors' product is scaled by alpha / rank.
    dropout: on the inputs of the factors.
    targets: names of the layers that get factors.
    download_density: share of the factors' entries that the server sends.
    upload_density: share of an update's entries that a client sends.
    client_learning_rate: of the clients' SGD with momentum 0.9.
    server_learning_rate: of the server's AdamW with weight decay 0.01.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round.
    batch_size: rows a local step.
    sequence_length: tokens a row.
    held_out_rows: rows evaluated of each speaker's held-out speeches.
    dtype: what the base model is computed in.
  """
  task = tasks.language_model(
    records.streams(corpora.shakespeare(text), held_out_rows),
    model=model,
    adapter=lora.LoRA(rank, alpha, dropout, targets),
    sequence_length=sequence_length,
    dtype=dtype,
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
  )
