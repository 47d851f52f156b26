"""Studies go on where they stopped, in order, and say how long they take."""

import argparse
import json
import types

import pytest

from benchmarks import study
from benchmarks.flasc import rates, utility
from tests import toy_experiments, toy_study


def cell(seed=0, rate=0.1, rounds=2, method="toy"):
  return study.Cell("toy", method, 1.0, 4, seed, rate, 0.1, rounds)


def make(cell):
  """A task and an experiment of no cost; rate 9 diverges."""
  if cell.client_rate == 9:
    raise FloatingPointError("it is not finite")
  halving = toy_experiments.halving()
  experiment = types.SimpleNamespace(
    rounds=cell.rounds,
    evaluate_every=1,
    init=halving.init,
    round=lambda state, number: (halving.round(state, number)[0], METRICS),
    evaluate=lambda state: {"loss": state["x"], "accuracy": 0.5},
  )
  return types.SimpleNamespace(data={"name": "toy"}), experiment


METRICS = {"download_bytes": 10, "upload_bytes": 1, "trainable": 5}


def test_a_study_computes_what_is_missing_in_order_and_says_so(
  tmp_path, capsys
):
  path = tmp_path / "toy.jsonl"
  first = study.run([cell(0)], path, make, processes=1)
  assert "1 of 1 cells to compute in an unknown time" in capsys.readouterr().out
  assert [line["loss"] for line in first[0]["lines"]] == [1, 0.5, 0.25]
  assert first[0]["versions"].keys() >= {"jax"} and "commit" in first[0]
  with path.open("a") as file:
    file.write('{"cell": {"task"')  # A process was killed here.
  cells = [cell(2), cell(0), cell(1, rate=9), cell(1), cell(2)]
  records = study.run(cells, path, make, processes=1)
  told = capsys.readouterr().out
  assert "3 of 4 cells to compute in about" in told
  assert "left out: it is not finite" in told
  assert [x["cell"]["seed"] for x in records] == [2, 0, 1]
  # The file is in the order of computation.
  assert [x["cell"]["seed"] for x in study.read(path)] == [0, 2, 1]


@pytest.mark.parametrize(
  ("rounds", "processes", "told"), [(60, 1, "2 minutes"), (120, 4, "1 minutes")]
)
def test_a_price_is_that_of_the_rounds_of_the_task(rounds, processes, told):
  seconds = [(10, 1.0), (10, 20.0), (10, 99.0)]  # The median round takes 2.
  records = [
    {"cell": {"task": "toy", "rounds": n}, "seconds": x} for n, x in seconds
  ]
  other = {"cell": {"task": "other", "rounds": 1}, "seconds": 1e9}
  got = study.price([cell(rounds=rounds)], [*records, other], processes)
  assert got == f"about {told}"


def test_a_grid_grows_where_its_best_rates_are_at_the_edge(tmp_path):
  given = argparse.Namespace(task="minilm", out=tmp_path, rounds=None)
  grid = [x for x in rates.cells(given) if x.method == "FLASC"]
  assert len(grid) == 9 and {x.seed for x in grid} == {rates.SEED}

  def record(x, loss):
    return {"cell": json.loads(x.key()), "lines": [{"loss": loss}]}

  best = next(x for x in grid if (x.client_rate, x.server_rate) == (0.1, 0.005))
  toy_study.write(
    tmp_path / "minilm_rates.jsonl",
    [record(x, 1.0 if x is best else 2.0) for x in grid],
  )
  new = set(rates.further(given)) - set(grid)
  assert [(x.client_rate, x.server_rate) for x in new] == [(0.3, 0.005)]
  assert rates.of("minilm", "FLASC", tmp_path) == (0.1, 0.005)
  # Methods that are not asked for need no rates yet.
  given = argparse.Namespace(
    task="minilm", out=tmp_path, rounds=None, seeds=1, methods=["FLASC"]
  )
  cells = utility.cells(given)
  assert {x.client_rate for x in cells} == {0.1}
  assert [x.density for x in cells] == [1 / 4, 1 / 16, 1 / 64]
