"""The files of a run: what is recorded, and what a killed process leaves."""

import dataclasses
import json
import pathlib

import pytest

from fedjax_llm.experiments import run_folder


def record(**changes):
  settings = {
    "name": "x",
    "knobs": {"rate": 0.5},
    "data": {"name": "rows"},
    "program": {"round": "r"},
    "rounds": 3,
  }
  return run_folder.record(**settings | changes)


def read(folder):
  return json.loads((folder / "run.json").read_text())


def test_a_record_tells_what_runs_on_what():
  made = record()
  assert made["experiment"] == "x" and made["rounds"] == 3
  assert {"python", "jax", "fedjax-llm"} <= made["versions"].keys()
  assert made["device"] == "2 x cpu"
  assert record(knobs=None)["knobs"] == {}


def test_knobs_in_groups_are_recorded_flat():
  @dataclasses.dataclass
  class Group:
    rate: float = 0.5

  made = record(knobs={"group": Group(), "seed": 0})
  assert made["knobs"] == {"rate": 0.5, "seed": 0}


def test_knobs_may_be_paths_and_tuples(tmp_path):
  knobs = {"text": pathlib.Path("a/b"), "targets": ("q", "v")}
  for _ in range(2):  # What was read is what was written.
    run_folder.claim(tmp_path, record(knobs=knobs))
  assert read(tmp_path)["knobs"] == {"text": "a/b", "targets": ["q", "v"]}


def test_a_claimed_folder_keeps_its_record(tmp_path):
  run_folder.claim(tmp_path / "new", record())
  first = read(tmp_path / "new")
  run_folder.claim(tmp_path / "new", record())
  assert read(tmp_path / "new") == first
  with pytest.raises(ValueError, match="rate: 0.5 there, 1.0 now"):
    run_folder.claim(tmp_path / "new", record(knobs={"rate": 1.0}))
  assert read(tmp_path / "new") == first


def test_a_run_that_grows_is_no_longer_finished(tmp_path):
  run_folder.claim(tmp_path, record())
  run_folder.finish(tmp_path)
  finished = read(tmp_path)
  assert finished["finished"] and finished["peak_memory_bytes"] > 1e6
  run_folder.finish(tmp_path)
  assert read(tmp_path) == finished
  run_folder.claim(tmp_path, record(rounds=9))
  assert read(tmp_path)["rounds"] == 9
  assert "finished" not in read(tmp_path)


def test_a_log_goes_on_after_the_rounds_that_are_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = run_folder.Log(path, rounds=0)
  for number in range(4):
    log.append({"round": number})
  with path.open("a") as file:
    file.write('{"round": 4, "lo')  # A process was killed here.
  assert [x["round"] for x in run_folder.read_metrics(path)] == [0, 1, 2, 3]
  log = run_folder.Log(path, rounds=2)
  log.append({"round": 3, "again": True})
  kept = run_folder.read_metrics(path)
  assert kept == log.lines
  assert kept == [
    *({"round": x} for x in range(3)),
    {"round": 3, "again": True},
  ]
  assert run_folder.Log(path, rounds=0).lines == []


def test_without_a_log_there_are_no_metrics(tmp_path):
  assert run_folder.read_metrics(tmp_path / "metrics.jsonl") == []
