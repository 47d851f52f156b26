"""The commands as functions: several experiments, comparison, evaluation."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.cli import run as commands
from fedjax_llm.data import batches
from fedjax_llm.experiments import runner


def halving(*, factor: float = 0.5) -> runner.Experiment:
  """An experiment of no cost."""
  return runner.Experiment(
    rounds=2,
    init=lambda: {"x": jnp.float32(1)},
    round=lambda state, number: (
      {"x": factor * state["x"]},
      {"train_loss": state["x"], "download_bytes": 100, "upload_bytes": 10},
    ),
    evaluate=lambda state: {"loss": state["x"]},
    export=lambda state, folder: None,
    data={},
  )


def several(*, factor: float = 0.5) -> dict[str, runner.Experiment]:
  """Two experiments."""
  return {"slow": halving(factor=factor), "fast": halving(factor=factor**2)}


def test_one_experiment_is_in_the_folder_itself(tmp_path, capsys):
  commands.run(halving, tmp_path, name="halving", knobs={})
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["experiment"] == "halving"
  assert record["knobs"] == {"factor": 0.5}  # The default is resolved.
  assert "| halving |" in capsys.readouterr().out
  assert (tmp_path / "loss.png").is_file()


def test_each_of_several_experiments_gets_a_subfolder(tmp_path, capsys):
  commands.run(several, tmp_path, name="several", knobs={"factor": 0.25})
  for name in ("slow", "fast"):
    record = json.loads((tmp_path / name / "run.json").read_text())
    assert record["experiment"] == name
    assert "finished" in record
  out = capsys.readouterr().out
  assert "1.000 → 0.062" in out and "1.000 → 0.004" in out
  assert not (tmp_path / "run.json").exists()


def test_several_experiments_resume(tmp_path):
  def dies(*, factor: float = 0.5):
    made = several(factor=factor)

    def round_fn(state, number):
      raise InterruptedError

    broken = runner.Experiment(**{**vars(made["fast"]), "round": round_fn})
    return made | {"fast": broken}

  with pytest.raises(InterruptedError):
    commands.run(dies, tmp_path, name="several", knobs={})
  before = (tmp_path / "slow" / "metrics.jsonl").read_text()
  commands.run(several, tmp_path, name="several", knobs={})
  # The first was finished, so not even its seconds change.
  assert (tmp_path / "slow" / "metrics.jsonl").read_text() == before


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
  def run(*_, **__):
    raise runner.Interrupted("stopped after round 1")

  monkeypatch.setattr(runner, "run", run)
  message = "halving stopped after round 1.* The same command goes on"
  with pytest.raises(KeyboardInterrupt, match=message):
    commands.run(halving, tmp_path, name="halving", knobs={})


def with_clients(*, clients: int = 3) -> runner.Experiment:
  """An experiment whose clients have four rows each."""
  rows = batches.Examples(
    np.zeros((4 * clients, 3), np.int32), np.ones((4 * clients, 2), bool)
  )
  names = tuple(map(str, range(clients)))
  starts = np.arange(0, 4 * clients + 1, 4)
  people = batches.Population(names, rows, starts)
  return dataclasses.replace(halving(), population=people)


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
    commands.data(halving, tmp_path, name="halving", knobs={})
  assert not list(tmp_path.iterdir())


def test_compare_shows_all_runs_in_one_table_and_plot(tmp_path, capsys):
  commands.run(several, tmp_path / "a", name="a", knobs={})
  commands.run(halving, tmp_path / "b", name="b", knobs={})
  capsys.readouterr()
  plot = tmp_path / "compare.png"
  commands.compare((tmp_path / "a", tmp_path / "b"), out=plot)
  out = capsys.readouterr().out
  shown = [line.split("|")[1].strip() for line in out.splitlines()[2:5]]
  assert shown == ["fast", "slow", "b"]
  assert plot.is_file() and f"Plot: {plot}" in out


def test_compare_adds_what_a_target_took_and_how_papers_count(tmp_path, capsys):
  commands.run(several, tmp_path, name="several", knobs={})
  capsys.readouterr()
  # One is at 1/4 after its last round, the other at 1/16.
  commands.compare(
    (tmp_path,),
    out=tmp_path / "compare.png",
    target_loss=0.1,
    target_accuracy=0.9,
    conventions=True,
  )
  head, _, fast, slow = capsys.readouterr().out.splitlines()[:4]
  assert "MB to loss 0.1" in head and "MB to accuracy 0.9" in head
  assert "not met" in slow
  assert fast.count("not met") == slow.count("not met") - 1


def test_compare_wants_a_run():
  with pytest.raises(ValueError, match="one or more run folders"):
    commands.compare(())


def test_compare_of_a_study_has_a_target_of_its_own(tmp_path):
  with pytest.raises(ValueError, match="target, got target_loss=0.5, targ"):
    commands.compare((tmp_path / "study.jsonl",), target_loss=0.5)


def test_export_writes_what_the_last_checkpoint_is(tmp_path, capsys):
  exported = []

  def experiments():
    note = lambda state, folder: exported.append(
      (folder.name, float(state["x"]))
    )
    return {
      name: dataclasses.replace(made, export=note)
      for name, made in several().items()
    }

  commands.run(experiments, tmp_path, name="both", knobs={})
  first = list(exported)
  exported.clear()
  commands.export(experiments, tmp_path, name="both", knobs={})
  assert exported == first != []
  out = capsys.readouterr().out
  assert f"fast: round 2, exported to {tmp_path / 'fast'}" in out
