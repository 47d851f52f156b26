"""Tables and plots of run folders written by hand."""

import json

import pytest

from fedjax_llm import report


def write(folder, name, *lines):
  folder.mkdir(parents=True)
  (folder / "run.json").write_text(json.dumps({"experiment": name}))
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


def measured(loss):
  return {"loss": loss, "perplexity": 2**loss, "accuracy": loss / 10}


def lines(loss=1.0):
  sent = {"download_bytes": 3_000_000, "upload_bytes": 500_000, "seconds": 2.0}
  return (
    {"round": 0, **measured(3.0)},
    {"round": 1, **sent},
    {"round": 2, **sent, **measured(loss)},
  )


def cells(table):
  """The rows of a Markdown table, by column."""
  head, _, *rows = (
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table.splitlines()
  )
  return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_sums_bytes_and_shows_utility_before_and_after(tmp_path):
  folder = write(tmp_path / "run", "flasc", *lines())
  (row,) = cells(report.table(report.load(folder)))
  assert row == {
    "run": "flasc",
    "rounds": "2",
    "held-out loss": "3.000 → 1.000",
    "perplexity": "8.00 → 2.00",
    "accuracy": "30.0% → 10.0%",
    "MB down": "6.0",
    "MB up": "1.0",
    "MB total": "7.0",
    "seconds": "4.0",
  }


def test_megabytes_are_counted_up_to_a_round(tmp_path):
  (run,) = report.load(write(tmp_path / "run", "flasc", *lines()))
  assert [run.megabytes(x) for x in range(3)] == [0, 3.5, 7]


def test_a_folder_of_runs_is_loaded_in_the_order_of_names(tmp_path):
  for name in ("b", "a"):
    write(tmp_path / name, name, *lines())
  (tmp_path / "no run").mkdir()
  assert [run.name for run in report.load(tmp_path)] == ["a", "b"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
  for seed in ("0", "1"):
    write(tmp_path / seed / "flasc", "flasc", *lines())
  write(tmp_path / "dense", "dense", *lines())
  runs = [
    run for name in ("0", "1", "dense") for run in report.load(tmp_path / name)
  ]
  shown = [row["run"] for row in cells(report.table(runs))]
  assert shown == ["0/flasc", "1/flasc", "dense"]
  twice = cells(report.table(runs[:1] * 2))
  assert [row["run"] for row in twice] == ["flasc", "flasc"]


def test_metrics_that_a_run_lacks_are_left_blank(tmp_path):
  bare = [{"round": 0, "loss": 3.0}, {"round": 1, "loss": 2.0}]
  write(tmp_path / "x", "x", *bare)
  write(tmp_path / "y", "y", *lines())
  first, second = cells(report.table(report.load(tmp_path)))
  assert first["perplexity"] == first["accuracy"] == ""
  assert first["held-out loss"] == "3.000 → 2.000"
  assert second["perplexity"] == "8.00 → 2.00"


def test_metrics_that_all_runs_lack_have_no_column(tmp_path):
  bare = [{"round": 0, "loss": 3.0}, {"round": 1, "loss": 2.0}]
  (row,) = cells(report.table(report.load(write(tmp_path / "x", "x", *bare))))
  assert row["held-out loss"] == "3.000 → 2.000"
  assert not {"perplexity", "accuracy"} & row.keys()


@pytest.mark.parametrize(
  "sent", [True, False], ids=["federated", "pretraining"]
)
def test_the_plot_is_a_picture(tmp_path, sent):
  rows = [
    {k: x for k, x in line.items() if sent or not k.endswith("bytes")}
    for line in lines()
  ]
  runs = report.load(write(tmp_path / "run", "flasc", *rows))
  # Warnings are errors: an empty logarithmic axis would be one.
  report.plot(runs, tmp_path / "loss.png")
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected a run folder"):
    report.load(tmp_path)
  with pytest.raises(ValueError, match="expected a run folder"):
    report.load(tmp_path / "nowhere")


def test_a_run_without_a_round_is_refused(tmp_path):
  folder = write(tmp_path / "run", "flasc", *lines()[:1])
  with pytest.raises(ValueError, match="no finished round"):
    report.load(folder)
