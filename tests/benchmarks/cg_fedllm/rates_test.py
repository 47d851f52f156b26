"""Which rates a study takes, of what was seen on validation rows."""

import json
import types

import pytest

from benchmarks import study
from benchmarks.cg_fedllm import rates, utility

HALF = rates.knobs(0.5)


@pytest.fixture
def seen(tmp_path):
  """Writes what a task's rates came to; returns the folder."""

  def write(*runs):
    lines = []
    for name, own, (server, decay), loss, *client in runs:
      rounds = rates.ROUNDS_OF_CLIENT_RATES if client else 30
      cell = study.Cell(
        *("shakespeare", name, 1.0, 16, rates.SEED, *(client or [0.01])),
        *(server, rounds, True, (*own, *decay)),
      )
      record = {"cell": json.loads(cell.key()), "lines": [{"loss": loss}]}
      lines.append(json.dumps(record) + "\n")
    (tmp_path / "shakespeare_rates.jsonl").write_text("".join(lines))
    return tmp_path

  return write


def test_clients_have_the_best_rate_of_uncompressed_rounds(seen, tmp_path):
  with pytest.raises(ValueError, match="run rates shakespeare first"):
    rates.of("shakespeare", tmp_path)
  folder = seen(
    ("dense", (), (1.0, ()), 3.0, 0.001),
    ("dense", (), (1.0, ()), 2.9, 0.003),
    # Of all rounds: what is best after these is not asked.
    ("dense", (), (1.0, ()), 2.5),
  )
  assert rates.of("shakespeare", folder) == 0.003


def test_servers_are_the_best_of_the_same_codec_and_feedback(seen):
  fed = rates.knobs(0.5, feedback=True)
  folder = seen(
    ("STC", HALF, (1.0, ()), 3.0),
    ("STC", HALF, (4.0, rates.DECAY), 2.9),
    ("STC", HALF, (2.0, rates.DECAY), 2.95),
    ("STC", fed, (2.0, rates.DECAY), 2.5),
    ("EDEN", HALF, (1.0, ()), 2.4),
  )
  best = lambda name, knobs: rates.of_server("shakespeare", name, knobs, folder)
  assert best("STC", HALF) == (4.0, rates.DECAY)
  assert best("STC", fed) == (2.0, rates.DECAY)
  assert best("EDEN", HALF) == (1.0, ())
  # Not tuned: as CG-FedLLM has it.
  assert best("EDEN", fed) == (1.0, ())


def test_one_more_is_tried_beside_the_best(seen):
  folder = seen(
    ("dense", (), (2.0, rates.DECAY), 2.8),
    ("STC", HALF, (4.0, rates.DECAY), 2.9),
    ("EDEN", HALF, (1.0, ()), 2.4),
  )
  cells = rates._further("shakespeare", 0.01, folder)
  found = {(cell.method, cell.server_rate) for cell in cells}
  assert found == {("dense", 3.0), ("STC", 8.0)}
  assert all(cell.validation for cell in cells)


def test_what_is_tuned_on_validation_rows_is_run_on_test_rows(seen):
  folder = seen(
    ("dense", (), (1.0, ()), 3.0, 0.003),
    ("trellis", HALF, (4.0, rates.DECAY), 2.9),
  )
  given = types.SimpleNamespace(
    task="shakespeare", out=folder, seeds=2, rounds=None
  )
  cells = utility.cells(given)
  assert len(cells) == len(set(cells))
  assert not any(cell.validation for cell in cells)
  assert {cell.client_rate for cell in cells} == {0.003}
  trellis = [
    cell
    for cell in cells
    if cell.method == "trellis" and cell.knobs == (*HALF, *rates.DECAY)
  ]
  assert {cell.seed for cell in trellis} == {0, 1}
  assert {cell.server_rate for cell in trellis} == {4.0}
