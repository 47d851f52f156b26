"""Learning rates, on validation rows: of clients, and of the server by codec.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.rates TASK

All codecs of the study have the clients' rate of uncompressed rounds. A code of
small squared error is shorter than what it is of, so a server that takes its
mean for what it is may be too slow: for the codecs that are run with all seeds
a server rate of 2 is tried beside 1. Under error feedback it is always 1.
"""

import dataclasses
import json
import pathlib

from benchmarks import study
from benchmarks.cg_fedllm import methods

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SERVER_RATES = (1.0, 2.0)
ROUNDS = 10
SEED = 100
# At half a bit, by all seeds.
MAIN = ("STC", "EDEN", "trellis", "our transform code")
KNOBS = (("bits", 0.5), ("error_feedback", False))


def of(task: str, folder: pathlib.Path = study.RESULTS / "cg_fedllm") -> float:
  """The clients' rate: that of the lowest validation loss, uncompressed."""
  return _best(task, "dense", folder)["client_rate"]


def of_server(
  task: str, method: str, folder: pathlib.Path = study.RESULTS / "cg_fedllm"
) -> float:
  """The server's rate for a codec; 1 if it was not tuned."""
  return _best(task, method, folder)["server_rate"] if method in MAIN else 1.0


def _best(task, method, folder):
  path = folder / f"{task}_rates.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  records = [json.loads(line) for line in lines]
  records = [x for x in records if x["cell"]["method"] == method]
  if not records:
    raise ValueError(f"no rates of {method} in {path}: run rates {task} first.")
  best = min(records, key=lambda record: record["lines"][-1]["loss"])
  return best["cell"]


def _dense(task):
  cell = study.Cell(
    task, "dense", 1.0, 16, SEED, RATES[0], 1.0, ROUNDS, validation=True
  )
  return [dataclasses.replace(cell, client_rate=rate) for rate in RATES]


def _coded(task, rate):
  return [
    study.Cell(
      task, name, 1.0, 16, SEED, rate, server, ROUNDS, True, knobs=KNOBS
    )
    for name in MAIN
    for server in SERVER_RATES
  ]


if __name__ == "__main__":
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}_rates.jsonl"
  study.run(
    _dense(given.task), path, methods.experiment, processes=given.processes
  )
  rate = of(given.task, given.out)
  # One at a time: the first makes the recordings for the others.
  study.run(_coded(given.task, rate), path, methods.experiment, processes=1)
  print(given.task, rate, *(of_server(given.task, x, given.out) for x in MAIN))
