"""What a cell of the study runs: fine-tuning on D2 with a codec for uploads.

As in CG-FedLLM, clients train with Adam and the server averages what arrives;
at a server rate of 1 the mean replaces the adapter. Downloads are uncompressed,
and so are uploads if the method is "dense". Knobs:

bits             bits per entry of an upload
error_feedback   whether clients use error feedback
server_decay     whether the server's rate falls to a tenth over the rounds
epsilon, place   for private messages, see `noise`
"""

import optax

from benchmarks import problems, study
from benchmarks.cg_fedllm import codecs, noise, recordings
from fedjax_llm import compression
from fedjax_llm.compression import base
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_avg


def experiment(cell: study.Cell) -> tuple[tasks.Task, runner.Experiment]:
  """Returns the task of a cell, and its experiment."""
  knobs = dict(cell.knobs)
  upload = compression.identity()
  if cell.method == "dense" and "epsilon" not in knobs:
    _, task = recordings.parts(cell)
  else:
    recorded = recordings.of(cell)
    task, upload = recorded.task, _upload(cell, recorded)
  server_rate = cell.server_rate
  if knobs.get("server_decay"):
    server_rate = optax.linear_schedule(
      server_rate, server_rate / 10, cell.rounds
    )
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    recordings.client_optimizer(cell.client_rate),
    optax.sgd(server_rate),
    channel=channels.Channel(upload=upload),
    population=len(task.population.names),
    placement=task.placement,
  )
  return task, finetuning.fine_tuning(
    task, problems.equal_clients(algorithm), problems.schedule(cell, knobs)
  )


def noise_of(cell: study.Cell, recorded: recordings.Recorded) -> noise.Noise:
  """Returns the noise of a cell's messages."""
  return _noise(cell, _codec(cell, recorded), recorded)


def _upload(cell, recorded) -> base.Compressor:
  """The codec of a cell, with its noise and error feedback."""
  knobs, codec = dict(cell.knobs), _codec(cell, recorded)
  if "epsilon" in knobs:
    codec = noise.added(_noise(cell, codec, recorded), codec, knobs["place"])
  return (
    compression.error_feedback(codec) if knobs.get("error_feedback") else codec
  )


def _noise(cell, codec, recorded):
  knobs = dict(cell.knobs)
  return noise.of(
    cell.method,
    codec,
    recorded,
    place=knobs["place"],
    epsilon=knobs["epsilon"],
    rounds=cell.rounds,
  )


def _codec(cell, recorded):
  if cell.method == "dense":
    return compression.identity()
  bits = dict(cell.knobs)["bits"]
  codec = codecs.of(cell.method, bits, recorded)
  if codec is None:
    raise ValueError(f"{cell.method} has no message of {bits} bits an entry.")
  return codec
