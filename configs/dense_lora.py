"""Dense federated LoRA on the standard library: FLASC's baseline.

fedjax-llm run dense_lora
"""

import optax

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import fed_avg, flasc
from fedjax_llm.models import decoder, lora


def experiment(
  *,
  seed: int = 0,
  rounds: int = 50,
  clients_per_round: int = 10,
  clients_per_step: int | None = None,
  rank: int = 8,
  alpha: float = 4.0,
  dropout: float = 0.0,
  targets: tuple[str, ...] = decoder.LINEAR,
  client_learning_rate: float = 1.0,
  server_learning_rate: float = 1e-2,
  local_epochs: int = 1,
  local_steps: int = 8,
  batch_size: int = 4,
  sequence_length: int = 128,
  held_out_rows: int = 4,
  dtype: tasks.Dtype = "float32",
) -> runner.Experiment:
  """Fine-tune the shipped model over clients of Python's library densely.

  Args:
    seed: of everything random.
    rounds: how many rounds.
    clients_per_round: clients that train in a round, of 30 or more.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    rank: of the LoRA factors.
    alpha: the factors' product is scaled by alpha / rank.
    dropout: on the inputs of the factors.
    targets: names of the layers that get factors.
    client_learning_rate: of the clients' SGD with momentum 0.9.
    server_learning_rate: of the server's AdamW with weight decay 0.01.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round.
    batch_size: rows a local step.
    sequence_length: tokens a row.
    held_out_rows: rows evaluated of each client's held-out files.
    dtype: what the base model is computed in.
  """
  task = tasks.language_model(
    records.streams(corpora.standard_library(), held_out_rows),
    adapter=lora.LoRA(rank, alpha, dropout, targets),
    sequence_length=sequence_length,
    dtype=dtype,
    placement=fl.Placement(clients_per_step=clients_per_step),
    seed=seed,
  )
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    optax.sgd(client_learning_rate, momentum=0.9),
    flasc.server_adamw(server_learning_rate),
    aggregate=aggregators.uniform_mean(),
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
