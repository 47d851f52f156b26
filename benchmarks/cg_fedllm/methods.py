"""What a cell of the study runs: fine-tuning on D2 with a codec in the upload.

As CG-FedLLM does, clients train by Adam, and what arrives is averaged, which
replaces the adapter. Downloads are whole, and so are uploads if the method is
"dense". Knobs are `bits`, of an entry of an upload, and `error_feedback`.
"""

from typing import Any

import optax

from benchmarks import problems, study
from benchmarks.cg_fedllm import codecs, recordings
from fedjax_llm import compression, finetuning, tasks
from fedjax_llm import experiment as experiments
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_avg


def experiment(cell: study.Cell) -> tuple[tasks.Task, experiments.Experiment]:
  """The task of a cell, and its codec in it."""
  knobs = dict(cell.knobs)
  upload = compression.identity()
  if cell.method == "dense":
    _, task = recordings.parts(cell)
  else:
    recorded = recordings.of(cell)
    task, upload = recorded.task, _upload(cell.method, knobs, recorded)
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    recordings.client_optimizer(cell.client_rate),
    optax.sgd(cell.server_rate),
    channel=channels.Channel(upload=upload),
    population=len(task.population.names),
    clients_per_step=1,
    mesh=task.mesh,
  )
  return task, finetuning.federated(
    task, algorithm, rounds=cell.rounds, **problems.training(cell, knobs)
  )


def _upload(
  name: str, knobs: dict[str, Any], recorded: recordings.Recorded
) -> compression.Compressor:
  """The codec of a cell."""
  codec = codecs.of(name, knobs["bits"], recorded)
  if codec is None:
    raise ValueError(f"{name} has no message of {knobs['bits']} bits an entry.")
  return compression.error_feedback(codec) if knobs["error_feedback"] else codec
