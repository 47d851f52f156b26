"""Learning rates: the same small grid for every method, on validation rows.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.rates TASK

At rank 16, over few rounds, with one seed that no figure uses; methods that
have a density at 1/16. Where the best rates lie at the edge of the grid, it
grows there, if the task has `LADDERS`. The other programs take the best rates
that `benchmarks/results/flasc/TASK_rates.jsonl` holds.
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
  "minilm": ((0.01, 0.03, 0.1), (0.0016, 0.005, 0.016)),
}
# The rates that a grid may grow to.
LADDERS = {
  "minilm": (
    (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    (0.00016, 0.0005, 0.0016, 0.005, 0.016, 0.05, 0.16),
  ),
}
GROWTHS = 3  # In a run of the program; the next one goes on.
ROUNDS = {"shakespeare": 10, "newsgroups": 30, "library": 5, "minilm": 20}
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
  ),
  "minilm": (("FFA-LoRA", ()), ("linear probe", ())),
}
# Their server replaces its factors, at no rate.
WITHOUT_SERVER_RATE = ("HetLoRA", "FlexLoRA")
# Variants take the rates of their kind.
LIKE = {
  "FLASC, factors apart": "FLASC, what moved",
  "FLASC, 4 bits": "FLASC",
  "FLASC, 2 bits": "FLASC",
  "FLASC, 4 bits, EDEN up": "FLASC",
  "FLASC, 4 bits, trellis up": "FLASC",
  "FLASC, download alone": "FLASC",
  "FLASC, upload alone": "dense",
  "quantised": "dense",
  "coarse": "dense",
  "SparseAdapter, one Top-K": "SparseAdapter",
  "Federated Select, one Top-K": "Federated Select",
  "Federated Select, no warm-up": "Federated Select",
}
SEED = 100
Knobs = tuple[tuple[str, Any], ...]


def cells(given) -> list[study.Cell]:
  """The grid of every method."""
  return [
    _cell(given, method, knobs, pair)
    for method, knobs in tuned(given.task)
    for pair in _grid(given.task, method, knobs)
  ]


def further(given) -> list[study.Cell]:
  """The neighbours of every method's best rates; most are there already."""
  task = given.task
  return [
    _cell(given, method, knobs, pair)
    for method, knobs in tuned(task)
    if task in LADDERS and (best := _best(task, method, given.out, knobs))
    for pair in _neighbours(best, LADDERS[task])
  ]


def _cell(given, method, knobs, pair):
  return study.Cell(
    task=given.task,
    method=method,
    density=1 / 16 if method in SPARSE else 1.0,
    rank=16,
    seed=SEED,
    client_rate=pair[0],
    server_rate=pair[1],
    rounds=given.rounds or ROUNDS[given.task],
    validation=True,
    knobs=knobs,
  )


def _neighbours(pair, ladders):
  """The pairs that have one of the rates, and the other one step away."""
  for which, ladder in enumerate(ladders):
    step = ladder.index(pair[which])
    for rate in ladder[max(0, step - 1) : step] + ladder[step + 1 : step + 2]:
      yield tuple(rate if i == which else x for i, x in enumerate(pair))


def tuned(task: str) -> list[tuple[str, Knobs]]:
  """What has rates of its own."""
  everywhere = [(method, ()) for method in WHOLE + SPARSE]
  return [*everywhere, *OTHERS.get(task, ())]


def of(
  task: str, method: str, folder: pathlib.Path, knobs: Knobs = ()
) -> tuple[float, float]:
  """Client and server rate of a method: the lowest validation loss."""
  best = _best(task, LIKE.get(method, method), folder, knobs)
  if best is None:
    raise ValueError(
      f"no rates of {method} {dict(knobs)} in {_path(task, folder)}: run rates"
      f" {task}, after adding the method to OTHERS if it is not tuned there."
    )
  return best


def _path(task, folder):
  return folder / f"{task}_rates.jsonl"


def _best(task, method, folder, knobs):
  """The rates of the lowest validation loss, or None."""
  wanted = [method, [list(pair) for pair in knobs]]
  found = [
    (x["lines"][-1]["loss"], x["cell"])
    for x in study.read(_path(task, folder))
    if [x["cell"]["method"], x["cell"]["knobs"]] == wanted
  ]
  if not found:
    return None
  _, cell = min(found, key=lambda x: x[0])
  return cell["client_rate"], cell["server_rate"]


def _grid(task, method, knobs):
  client_rates, server_rates = GRID[task]
  if knobs == MORE_STEPS:
    client_rates = MORE_STEPS_CLIENT_RATES
  if method in WITHOUT_SERVER_RATE:
    server_rates = (1.0,)
  return itertools.product(client_rates, server_rates)


if __name__ == "__main__":
  stages = [cells, *[further] * GROWTHS]
  given = study.program(__doc__, "flasc", "_rates", stages, methods.experiment)
  for method, knobs in tuned(given.task):
    print(method, dict(knobs), *of(given.task, method, given.out, knobs))
