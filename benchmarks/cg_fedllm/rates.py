"""The clients' learning rate, of uncompressed rounds, on validation rows.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.rates TASK

All codecs of the study have it: what differs between runs is the codec alone.
"""

import json
import pathlib

from benchmarks import study
from benchmarks.cg_fedllm import methods

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ROUNDS = 10
SEED = 100


def cells(task: str) -> list[study.Cell]:
  """The grid."""
  return [
    study.Cell(task, "dense", 1.0, 16, SEED, rate, 1.0, ROUNDS, validation=True)
    for rate in RATES
  ]


def of(task: str, folder: pathlib.Path = study.RESULTS / "cg_fedllm") -> float:
  """The rate of the lowest validation loss."""
  path = folder / f"{task}_rates.jsonl"
  if not path.exists():
    raise ValueError(f"no rates in {path}: run rates {task} first.")
  records = [json.loads(line) for line in path.read_text().splitlines()]
  best = min(records, key=lambda record: record["lines"][-1]["loss"])
  return best["cell"]["client_rate"]


if __name__ == "__main__":
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}_rates.jsonl"
  study.run(
    cells(given.task), path, methods.experiment, processes=given.processes
  )
  print(given.task, of(given.task, given.out))
