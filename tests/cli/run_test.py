"""The commands on configs as functions: one experiment, several, resumed."""

import dataclasses
import json

import numpy as np
import pytest

from fedjax_llm.cli import run as commands
from fedjax_llm.data import batches
from fedjax_llm.experiments import runner
from tests import toy_experiments as toys


def test_one_experiment_is_in_the_folder_itself(tmp_path, capsys):
  commands.run(toys.halving, tmp_path, name="halving", knobs={})
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["experiment"] == "halving"
  assert record["knobs"] == {"factor": 0.5}  # The default is resolved.
  assert "| halving |" in capsys.readouterr().out
  assert (tmp_path / "loss.png").is_file()


def test_each_of_several_experiments_gets_a_subfolder(tmp_path, capsys):
  commands.run(toys.several, tmp_path, name="several", knobs={"factor": 0.25})
  for name in ("slow", "fast"):
    record = json.loads((tmp_path / name / "run.json").read_text())
    assert record["experiment"] == name
    assert "finished" in record
  out = capsys.readouterr().out
  assert "1.000 → 0.062" in out and "1.000 → 0.004" in out
  assert not (tmp_path / "run.json").exists()


def test_several_experiments_resume(tmp_path):
  def dies(*, factor: float = 0.5):
    made = toys.several(factor=factor)

    def round_fn(state, number):
      raise InterruptedError

    broken = runner.Experiment(**{**vars(made["fast"]), "round": round_fn})
    return made | {"fast": broken}

  with pytest.raises(InterruptedError):
    commands.run(dies, tmp_path, name="several", knobs={})
  before = (tmp_path / "slow" / "metrics.jsonl").read_text()
  commands.run(toys.several, tmp_path, name="several", knobs={})
  # The first was finished, so not even its seconds change.
  assert (tmp_path / "slow" / "metrics.jsonl").read_text() == before


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
  def run(*_, **__):
    raise runner.Interrupted("stopped after round 1")

  monkeypatch.setattr(runner, "run", run)
  message = "halving stopped after round 1.* The same command goes on"
  with pytest.raises(KeyboardInterrupt, match=message):
    commands.run(toys.halving, tmp_path, name="halving", knobs={})


def with_clients(*, clients: int = 3) -> runner.Experiment:
  """An experiment whose clients have four rows each."""
  rows = batches.Examples(
    np.zeros((4 * clients, 3), np.int32), np.ones((4 * clients, 2), bool)
  )
  names = tuple(map(str, range(clients)))
  starts = np.arange(0, 4 * clients + 1, 4)
  people = batches.Population(names, rows, starts)
  return dataclasses.replace(toys.halving(), population=people)


def test_data_shows_the_clients_and_trains_nothing(tmp_path, capsys):
  out = tmp_path / "new" / "folder"
  commands.data(with_clients, out, name="toy", knobs={"clients": 5})
  shown = " ".join(capsys.readouterr().out.split())
  assert "| clients | 5 |" in shown and "| examples | 20 |" in shown
  assert f"Plot: {out / 'data.png'}" in shown
  assert [path.name for path in out.iterdir()] == ["data.png"]


def test_data_shows_the_first_of_several_experiments(tmp_path, capsys):
  several = lambda: {"a": with_clients(), "b": with_clients(clients=7)}
  commands.data(several, tmp_path, name="toy", knobs={})
  assert "| clients | 3 |" in " ".join(capsys.readouterr().out.split())


def test_data_wants_clients(tmp_path):
  with pytest.raises(ValueError, match="got halving, which has none"):
    commands.data(toys.halving, tmp_path, name="halving", knobs={})
  assert not list(tmp_path.iterdir())


def test_export_writes_what_the_last_checkpoint_is(tmp_path, capsys):
  exported = []

  def experiments():
    note = lambda state, folder: exported.append(
      (folder.name, float(state["x"]))
    )
    return {
      name: dataclasses.replace(made, export=note)
      for name, made in toys.several().items()
    }

  commands.run(experiments, tmp_path, name="both", knobs={})
  first = list(exported)
  exported.clear()
  commands.export(experiments, tmp_path, name="both", knobs={})
  assert exported == first != []
  out = capsys.readouterr().out
  assert f"fast: round 2, exported to {tmp_path / 'fast'}" in out
