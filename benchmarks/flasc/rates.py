"""Learning rates: the same small grid for every method, on validation rows.

  FEDJAX_LLM_DATA=folder python benchmarks/flasc/rates.py TASK

At rank 16, over few rounds, with one seed that no figure uses; methods that
have a density at 1/16. The other programs take the best rates of the grid that
`benchmarks/results/flasc/TASK_rates.jsonl` holds.
"""

import itertools
import json
import pathlib

import study

# Client rates of SGD with momentum 0.9, server rates of AdamW.
GRID = {
  "shakespeare": ((0.3, 1.0), (0.01, 0.03)),
  "newsgroups": ((0.01, 0.03), (0.003, 0.01)),
  "library": ((0.1, 0.3), (0.003, 0.01)),
}
ROUNDS = {"shakespeare": 10, "newsgroups": 12, "library": 5}
METHODS = (
  "dense",
  "FLASC",
  "FLASC, what moved",
  "SparseAdapter",
  "Adapter-LTH",
  "Federated Select",
  "compact",
)
# Variants take the rates of their kind.
LIKE = {
  "FLASC, factors apart": "FLASC, what moved",
  "FLASC, download alone": "FLASC",
  "FLASC, upload alone": "dense",
  "quantised": "compact",
  "SparseAdapter, one Top-K": "SparseAdapter",
  "Federated Select, one Top-K": "Federated Select",
}
SEED = 100


def cells(task: str, rounds: int) -> list[study.Cell]:
  """The grid of every method."""
  return [
    study.Cell(
      task=task,
      method=method,
      density=1.0 if method == "dense" else 1 / 16,
      rank=16,
      seed=SEED,
      client_rate=client_rate,
      server_rate=server_rate,
      rounds=rounds,
      validation=True,
    )
    for method in METHODS
    for client_rate, server_rate in itertools.product(*GRID[task])
  ]


def of(task: str, method: str, folder: pathlib.Path) -> tuple[float, float]:
  """Client and server rate of a method: the lowest validation loss."""
  path = folder / f"{task}_rates.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  method = LIKE.get(method, method)
  records = [x for x in records if x["cell"]["method"] == method]
  if not records:
    raise ValueError(f"no rates of {method} in {path}: run rates.py {task}.")
  best = min(records, key=lambda record: record["lines"][-1]["loss"])
  return best["cell"]["client_rate"], best["cell"]["server_rate"]


if __name__ == "__main__":
  given = study.arguments(__doc__)
  made = cells(given.task, given.rounds or ROUNDS[given.task])
  study.run(
    made, given.out / f"{given.task}_rates.jsonl", processes=given.processes
  )
  for method in METHODS:
    print(method, *of(given.task, method, given.out))
