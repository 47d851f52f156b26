"""A run is resumed to the bit, whatever the moment at which it died."""

import json
import os
import pathlib
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.experiments import checkpoints, run_folder, runner

ROUNDS = 5
PROGRAM = {"round": "a", "start": "x"}


class Death(Exception):
  """What stands for the end of the process."""


class Lives:
  """Calls until death: None for ever."""

  def __init__(self, calls=None):
    self.calls = calls

  def spend(self):
    if self.calls == 0:
      raise Death
    if self.calls is not None:
      self.calls -= 1


def made(lives=None, **changes):
  """Newton's iteration for a root of two, which is soon at its last bit."""
  lives = lives or Lives()

  def advance(state, number):
    lives.spend()
    x = (state["x"] + 2 / state["x"]) / 2
    return {"x": x, "sum": state["sum"] + number}, {
      "train_loss": x,
      "tokens": 3,
    }

  def evaluate(state):
    lives.spend()
    return {"loss": jnp.abs(state["x"] ** 2 - 2)}

  def export(state, folder):
    lives.spend()
    (folder / "result").write_bytes(np.asarray(state["x"]).tobytes())

  fields = {
    "rounds": ROUNDS,
    "init": lambda: {"x": jnp.float32(100), "sum": jnp.int32(0)},
    "round": advance,
    "evaluate": evaluate,
    "export": export,
    "data": {"name": "root"},
    "program": lambda state: PROGRAM,
    "evaluate_every": 2,
    "checkpoint_every": 2,
  }
  return runner.Experiment(**fields | changes)


def lines(folder):
  kept = run_folder.read_metrics(folder / "metrics.jsonl")
  return [{k: x for k, x in line.items() if k != "seconds"} for line in kept]


def assert_same_run(folder, other):
  assert lines(folder) == lines(other)
  assert (folder / "result").read_bytes() == (other / "result").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
  """The folder of a run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  runner.run(made(), folder, name="root", knobs={"rate": 0.5})
  return folder


def test_the_record_tells_what_ran_on_what(whole):
  record = json.loads((whole / "run.json").read_text())
  assert record["experiment"] == "root"
  assert record["knobs"] == {"rate": 0.5}
  assert record["data"] == {"name": "root"}
  assert {"python", "jax", "fedjax-llm"} <= record["versions"].keys()
  assert record["device"] == "2 x cpu"
  assert record["peak_memory_bytes"] > 1e6
  assert record["started"] <= record["finished"]


def test_metrics_have_a_line_a_round_and_one_before(whole):
  log = run_folder.read_metrics(whole / "metrics.jsonl")
  assert [line["round"] for line in log] == list(range(ROUNDS + 1))
  assert [line["round"] for line in log if "loss" in line] == [0, 2, 4, 5]
  assert all(line["seconds"] > 0 for line in log[1:])


# 5 rounds, 4 evaluations, 1 export.
@pytest.mark.parametrize("calls", range(10))
def test_a_death_at_any_call_changes_nothing(whole, tmp_path, calls):
  with pytest.raises(Death):
    runner.run(made(Lives(calls)), tmp_path, name="root")
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_dying_again_and_again_still_arrives(whole, tmp_path):
  # An evaluation and two rounds reach a checkpoint; fewer never would.
  for _ in range(10):
    try:
      runner.run(made(Lives(4)), tmp_path, name="root")
      break
    except Death:
      continue
  assert_same_run(tmp_path, whole)


def test_a_death_before_the_checkpoint_is_saved(whole, tmp_path, monkeypatch):
  def die(self, number, state):
    raise Death

  with monkeypatch.context() as patch, pytest.raises(Death):
    patch.setattr(checkpoints.Checkpoints, "save", die)
    runner.run(made(), tmp_path, name="root")
  assert [line["round"] for line in lines(tmp_path)] == [0, 1, 2]
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_a_death_while_the_log_is_cut_back(whole, tmp_path, monkeypatch):
  with pytest.raises(Death):
    runner.run(made(Lives(5)), tmp_path, name="root")
  before = lines(tmp_path)
  assert before[-1]["round"] == 3  # The checkpoint is of round 2.

  def die(self, target):
    raise Death

  with monkeypatch.context() as patch, pytest.raises(Death):
    patch.setattr(pathlib.Path, "replace", die)
    runner.run(made(), tmp_path, name="root")
  assert lines(tmp_path) == before
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_half_a_line_is_forgotten(whole, tmp_path):
  with pytest.raises(Death):
    runner.run(made(Lives(5)), tmp_path, name="root")
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"round": 4, "train_lo')
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_half_a_checkpoint_is_forgotten(whole, tmp_path):
  with pytest.raises(Death):
    runner.run(made(Lives(5)), tmp_path, name="root")
  half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp" / "default"
  half.mkdir(parents=True)
  (half / "manifest.ocdbt").write_bytes(b"half")
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_a_finished_run_is_not_computed_again(tmp_path):
  runner.run(made(), tmp_path)
  record = (tmp_path / "run.json").read_text()
  runner.run(made(Lives(1)), tmp_path)  # The export alone.
  assert (tmp_path / "run.json").read_text() == record


@pytest.mark.parametrize(
  "change, message",
  [
    ({"knobs": {"rate": 1.0}}, "rate: 0.5 there, 1.0 now"),
    ({"program": {"round": "b", "start": "x"}}, "its code or a number in it"),
    ({"program": {"round": "a", "start": "y"}}, "starts from another state"),
    ({"knobs": {}}, "rate: 0.5 there, None now"),
    ({"name": "cube"}, "experiment: 'root' there, 'cube' now"),
    ({"data": {"name": "other"}}, "name: 'root' there, 'other' now"),
  ],
  ids=[
    *("other knob", "other round", "other start"),
    *("no knob", "other experiment", "other data"),
  ],
)
def test_a_run_of_something_else_is_refused(whole, change, message):
  fields = {"data", "program"} & change.keys()
  changed = made(
    **{name: change[name] for name in fields - {"program"}},
    program=lambda state: change.get("program", PROGRAM),
  )
  settings = {"name": "root", "knobs": {"rate": 0.5}}
  settings |= {name: change[name] for name in change.keys() - fields}
  with pytest.raises(ValueError, match=message):
    runner.run(changed, whole, **settings)


def test_rounds_may_grow(tmp_path):
  knobs = lambda rounds: {"rounds": rounds, "rate": 0.5}
  runner.run(made(rounds=3), tmp_path / "x", knobs=knobs(3))
  runner.run(made(), tmp_path / "x", knobs=knobs(ROUNDS))
  runner.run(made(), tmp_path / "whole", name="x", knobs=knobs(ROUNDS))
  results = [(tmp_path / x / "result").read_bytes() for x in ("x", "whole")]
  assert results[0] == results[1]
  record = json.loads((tmp_path / "x" / "run.json").read_text())
  assert record["rounds"] == record["knobs"]["rounds"] == ROUNDS
  assert "finished" in record


def test_rounds_may_not_shrink(tmp_path):
  runner.run(made(), tmp_path)
  with pytest.raises(ValueError, match="has 5 rounds, got rounds=4. A run may"):
    runner.run(made(rounds=4), tmp_path)


def test_a_run_of_an_earlier_version_is_refused_with_the_reason(tmp_path):
  runner.run(made(), tmp_path)
  path = tmp_path / "run.json"
  record = json.loads(path.read_text())
  del record["program"], record["rounds"]
  record["knobs"]["clients_per_step"] = 1
  path.write_text(json.dumps(record))
  with pytest.raises(ValueError, match="by an earlier version of fedjax-llm"):
    runner.run(made(), tmp_path)


ELSEWHERE = {
  "devices": ("device", "8 x cpu", "allow_other_devices"),
  "versions": ("versions", {"jax": "0.1"}, "allow_other_versions"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_run_begun_elsewhere_goes_on_only_if_that_is_allowed(
  what, tmp_path, capsys
):
  part, other, option = ELSEWHERE[what]
  runner.run(made(rounds=2), tmp_path)
  path = tmp_path / "run.json"
  record = json.loads(path.read_text())
  here = record[part]
  there = here | other if isinstance(other, dict) else other
  # What a round computes is compiled otherwise there.
  program = {**record["program"], "round": "other"}
  path.write_text(json.dumps(record | {part: there, "program": program}))
  message = f"begun with other {what}.*\n.* there, .* now\n.*{option}=True"
  with pytest.raises(ValueError, match=message):
    runner.run(made(), tmp_path)
  runner.run(made(), tmp_path, **{option: True})
  shown = capsys.readouterr()
  assert "is trusted" in shown.out + shown.err
  record = json.loads(path.read_text())
  assert record[part] == here and record["earlier"][0][part] == there
  runner.run(made(), tmp_path)  # It is of this place now.


def test_a_run_begun_elsewhere_is_exported(tmp_path):
  runner.run(made(), tmp_path)
  path = tmp_path / "run.json"
  text = json.dumps(json.loads(path.read_text()) | {"device": "8 x cpu"})
  path.write_text(text)
  assert runner.export(made(), tmp_path) == ROUNDS
  assert path.read_text() == text


def test_sigint_finishes_the_round_and_saves(whole, tmp_path):
  whole_round = made().round

  def interrupted_round(state, number):
    if number == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return whole_round(state, number)

  handler = signal.getsignal(signal.SIGINT)
  with pytest.raises(runner.Interrupted, match="after round 3"):
    runner.run(made(round=interrupted_round), tmp_path, name="root")
  assert signal.getsignal(signal.SIGINT) is handler
  assert lines(tmp_path) == lines(whole)[:4]
  assert (tmp_path / "checkpoints" / "3").is_dir()
  runner.run(made(), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_sigint_in_the_last_round_ends_the_run_as_ever(whole, tmp_path):
  whole_round = made().round

  def interrupted_round(state, number):
    if number == ROUNDS - 1:
      os.kill(os.getpid(), signal.SIGINT)
    return whole_round(state, number)

  runner.run(made(round=interrupted_round), tmp_path, name="root")
  assert_same_run(tmp_path, whole)


def test_a_second_sigint_stops_at_once(tmp_path):
  def interrupted_round(state, number):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("not reached")

  with pytest.raises(KeyboardInterrupt):
    runner.run(made(round=interrupted_round), tmp_path)


def test_a_run_need_not_be_in_the_main_thread(whole, tmp_path):
  call = lambda: runner.run(made(), tmp_path, name="root")
  thread = threading.Thread(target=call)
  thread.start()
  thread.join()
  assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("metric", ["train_loss", "loss"])
def test_what_is_not_finite_stops_the_run(tmp_path, metric):
  step, score = made().round, made().evaluate

  def broken_round(state, number):
    state, metrics = step(state, number)
    bad = metric == "train_loss" and number == 2
    return state, metrics | ({"train_loss": jnp.nan} if bad else {})

  def broken_evaluate(state):
    bad = metric == "loss" and state["sum"] > 0
    return {"loss": jnp.inf} if bad else score(state)

  changed = made(round=broken_round, evaluate=broken_evaluate)
  with pytest.raises(FloatingPointError, match=f"{metric} not finite"):
    runner.run(changed, tmp_path)
  assert all(map(np.isfinite, (x["round"] for x in lines(tmp_path))))


@pytest.mark.parametrize(
  "name", ["rounds", "evaluate_every", "checkpoint_every"]
)
def test_counts_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
    made(**{name: 0})


def test_what_is_exported_is_the_last_checkpoint(whole, tmp_path):
  with pytest.raises(Death):
    # Evaluated twice and four rounds done, of which two are saved... and four.
    runner.run(made(Lives(7)), tmp_path, name="root")
  assert not (tmp_path / "result").exists()
  done = runner.export(made(), tmp_path, name="root")
  assert done == 4
  shorter = tmp_path / "shorter"
  runner.run(made(rounds=4), shorter, name="root")
  assert (tmp_path / "result").read_bytes() == (shorter / "result").read_bytes()


def test_only_a_run_of_its_own_is_exported(whole, tmp_path):
  with pytest.raises(ValueError, match="expected a run with checkpoints"):
    runner.export(made(), tmp_path / "nowhere", name="root")
  with pytest.raises(ValueError, match="other settings"):
    runner.export(made(), whole, name="root", knobs={"rate": 0.1})


def test_what_writes_into_the_folder_is_told_of_it_first(tmp_path):
  told = []

  def prepare(folder):
    assert (folder / "run.json").exists()
    assert (folder / "result").exists() == bool(told)
    told.append(folder)

  runner.run(made(prepare=prepare), tmp_path, name="root")
  runner.export(made(prepare=prepare), tmp_path, name="root")
  assert told == [tmp_path, tmp_path]
