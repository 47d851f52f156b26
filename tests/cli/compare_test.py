"""`compare` as a function; tables and plots are in `tests/reporting`."""

import pytest

from fedjax_llm.cli import compare as commands
from fedjax_llm.cli import run
from tests import toy_experiments as toys
from tests import toy_study


def test_compare_shows_all_runs_in_one_table_and_plot(tmp_path, capsys):
  run.run(toys.several, tmp_path / "a", name="a", knobs={})
  run.run(toys.halving, tmp_path / "b", name="b", knobs={})
  capsys.readouterr()
  plot = tmp_path / "compare.png"
  commands.compare((tmp_path / "a", tmp_path / "b"), out=plot)
  out = capsys.readouterr().out
  shown = [line.split("|")[1].strip() for line in out.splitlines()[2:5]]
  assert shown == ["fast", "slow", "b"]
  assert plot.is_file() and f"Plot: {plot}" in out


def test_compare_adds_what_a_target_took_and_how_papers_count(tmp_path, capsys):
  run.run(toys.several, tmp_path, name="several", knobs={})
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


def test_compare_of_a_study_draws_ends_and_ratios(tmp_path, capsys):
  path = toy_study.write(
    tmp_path / "toy.jsonl", [*toy_study.DENSE, *toy_study.SPARSE]
  )
  commands.compare((path,), out=tmp_path / "toy.png")
  told = capsys.readouterr().out.splitlines()[-1]
  plots = tmp_path / "toy.png", tmp_path / "toy_ratios.png"
  assert told == f"Plot: {plots[0]}, {plots[1]}"
  assert all(plot.is_file() for plot in plots)


def test_compare_of_a_study_has_a_target_of_its_own(tmp_path):
  with pytest.raises(ValueError, match="dense runs, got target_loss=0.5, targ"):
    commands.compare((tmp_path / "study.jsonl",), target_loss=0.5)
