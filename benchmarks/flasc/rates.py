"""Learning rates: the same small grid for every method, on validation rows.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.rates TASK

At rank 16, over few rounds, with one seed that no figure uses; methods that
have a density at 1/16. The other programs take the best rates of the grid that
`benchmarks/results/flasc/TASK_rates.jsonl` holds.
"""

import itertools
import pathlib
from typing import Any

from benchmarks import study
from benchmarks.flasc import methods

# Client rates of SGD with momentum 0.9, server rates of AdamW.
GRID = {
  "shakespeare": ((0.3, 1.0), (0.01, 0.03)),
  "newsgroups": ((0.1, 0.3), (0.01, 0.03)),
  "library": ((0.1, 0.3), (0.003, 0.01)),
}
ROUNDS = {"shakespeare": 10, "newsgroups": 30, "library": 5}
# Methods with a density, and those without.
SPARSE = (
  "FLASC",
  "FLASC, what moved",
  "SparseAdapter",
  "Adapter-LTH",
  "Federated Select",
)
WHOLE = ("dense", "compact")
# More local steps, at client rates that are lower.
MORE_STEPS = (("local_steps", 16),)
MORE_STEPS_CLIENT_RATES = (0.1, 0.3)
# Those of one task, with their knobs.
OTHERS = {
  "shakespeare": (
    ("compact, b alone", ()),
    ("dense", MORE_STEPS),
    ("compact", MORE_STEPS),
    ("compact, b alone", MORE_STEPS),
    ("FLASC tiers", ()),
    ("zero-padded ranks", ()),
    ("Federated Select, ranks", ()),
    ("HetLoRA", ()),
    ("FlexLoRA", ()),
    ("FFA-LoRA", ()),
  )
}
# Their server replaces its factors, at no rate.
WITHOUT_SERVER_RATE = ("HetLoRA", "FlexLoRA")
# Variants take the rates of their kind.
LIKE = {
  "FLASC, factors apart": "FLASC, what moved",
  "FLASC, download alone": "FLASC",
  "FLASC, upload alone": "dense",
  "quantised": "dense",
  "coarse": "dense",
  "SparseAdapter, one Top-K": "SparseAdapter",
  "Federated Select, one Top-K": "Federated Select",
}
SEED = 100
Knobs = tuple[tuple[str, Any], ...]


def cells(given) -> list[study.Cell]:
  """The grid of every method."""
  task = given.task
  return [
    study.Cell(
      task=task,
      method=method,
      density=1 / 16 if method in SPARSE else 1.0,
      rank=16,
      seed=SEED,
      client_rate=client_rate,
      server_rate=server_rate,
      rounds=given.rounds or ROUNDS[task],
      validation=True,
      knobs=knobs,
    )
    for method, knobs in tuned(task)
    for client_rate, server_rate in _grid(task, method, knobs)
  ]


def tuned(task: str) -> list[tuple[str, Knobs]]:
  """What has rates of its own."""
  everywhere = [(method, ()) for method in WHOLE + SPARSE]
  return [*everywhere, *OTHERS.get(task, ())]


def of(
  task: str, method: str, folder: pathlib.Path, knobs: Knobs = ()
) -> tuple[float, float]:
  """Client and server rate of a method: the lowest validation loss."""
  path = folder / f"{task}_rates.jsonl"
  wanted = [LIKE.get(method, method), [list(pair) for pair in knobs]]
  records = [
    x
    for x in study.read(path)
    if [x["cell"]["method"], x["cell"]["knobs"]] == wanted
  ]
  if not records:
    raise ValueError(
      f"no rates of {wanted} in {path}: run rates {task}, after adding the"
      " method to OTHERS if it is not tuned on this task."
    )
  best = min(records, key=lambda record: record["lines"][-1]["loss"])
  return best["cell"]["client_rate"], best["cell"]["server_rate"]


def _grid(task, method, knobs):
  client_rates, server_rates = GRID[task]
  if knobs == MORE_STEPS:
    client_rates = MORE_STEPS_CLIENT_RATES
  if method in WITHOUT_SERVER_RATE:
    server_rates = (1.0,)
  return itertools.product(client_rates, server_rates)


if __name__ == "__main__":
  given = study.program(__doc__, "flasc", "_rates", cells, methods.experiment)
  for method, knobs in tuned(given.task):
    print(method, dict(knobs), *of(given.task, method, given.out, knobs))
