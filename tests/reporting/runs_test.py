"""Tables and plots of run folders written by hand."""

import json

import pytest

from fedjax_llm.reporting import runs as report


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


def simulated():
  """Four rounds of 100 s and 1.5 MB, evaluated after the first and the last."""
  sent = {
    "download_bytes": 1_000_000,
    "upload_bytes": 500_000,
    "seconds": 2.0,
    "simulated_seconds": 100.0,
    "selected": 10,
    "answered": 9,
  }
  return (
    {"round": 0, "loss": 3.0, "accuracy": 0.2},
    {"round": 1, **sent},
    {"round": 2, **sent, "loss": 2.0, "accuracy": 0.5},
    {"round": 3, **sent},
    {"round": 4, **sent, "loss": 2.5, "accuracy": 0.7, "epsilon": 3.5},
  )


@pytest.mark.parametrize(
  "metric, target, rounds",
  [
    ("loss", 2.0, 2),  # Exactly.
    ("loss", 2.2, 2),  # Not interpolated.
    ("loss", 3.5, 0),
    ("loss", 1.9, None),
    ("accuracy", 0.5, 2),
    ("accuracy", 0.51, 4),
    ("accuracy", 0.71, None),
  ],
)
def test_targets_are_met_by_the_first_evaluation_at_or_beyond(
  tmp_path, metric, target, rounds
):
  (run,) = report.load(write(tmp_path / "run", "flasc", *simulated()))
  sent = report.bytes_to(run, target, metric)
  seconds = report.seconds_to(run, target, metric)
  if rounds is None:
    assert sent is seconds is None
  else:
    assert (sent, seconds) == (rounds * 1_500_000, rounds * 100.0)


def test_targets_are_of_known_metrics(tmp_path):
  (run,) = report.load(write(tmp_path / "run", "flasc", *lines()))
  with pytest.raises(ValueError, match="got metric='seconds'"):
    report.bytes_to(run, 1.0, "seconds")


def test_a_run_without_a_network_takes_no_simulated_time(tmp_path):
  (run,) = report.load(write(tmp_path / "run", "flasc", *lines()))
  assert report.bytes_to(run, 1.0) == 7_000_000
  assert report.seconds_to(run, 1.0) is None


def test_the_table_shows_what_targets_took_and_who_answered(tmp_path):
  write(tmp_path / "a", "a", *simulated())
  write(tmp_path / "b", "b", *lines())
  targets = {"loss": 1.5, "accuracy": 0.4}
  first, second = cells(report.table(report.load(tmp_path), targets=targets))
  expected = {
    "answered": "90.0%",
    "simulated seconds": "400.0",
    "epsilon": "3.5",
    "MB to loss 1.5": "not met",
    "MB to accuracy 0.4": "3.0",
    "simulated seconds to accuracy 0.4": "200.0",
  }
  assert {name: first[name] for name in expected} == expected
  # Its accuracy goes down: it was 30% before, and is 10% after.
  expected = dict.fromkeys(expected, "") | {
    "MB to loss 1.5": "7.0",
    "MB to accuracy 0.4": "not met",
  }
  assert {name: second[name] for name in expected} == expected
  assert "simulated seconds to loss 1.5" not in first


def test_papers_count_numbers_bitmaps_and_positions(tmp_path):
  # 2 clients get all of 1,000,000 numbers and send 62,500 each, in 2 rounds.
  counted = {
    "trainable": 1_000_000,
    "download_entries": 2_000_000,
    "upload_entries": 125_000,
    "sparse_messages": 2,
    "sparse_entries": 125_000,
  }
  rows = [line | counted if line["round"] else line for line in lines()]
  folder = write(tmp_path / "run", "flasc", *rows)
  (run,) = runs = report.load(folder)
  dense, sparse = 2 * 2 * 4_000_000, 2 * 2 * 250_000
  assert report.conventions(run) == {
    "values": dense + sparse,
    "bitmap": dense + sparse + 2 * 2 * 125_000,
    "COO": dense + 2 * sparse,
  }
  (row,) = cells(report.table(runs, papers=True))
  shown = [row[f"MB, {x}"] for x in ("values only", "+ bitmap", "+ COO")]
  assert shown == ["17.0", "17.5", "18.0"]
  assert row["MB total"] == "7.0"  # Of the real messages still.


def test_a_run_that_has_not_counted_numbers_has_no_conventions(tmp_path):
  runs = report.load(write(tmp_path / "run", "flasc", *lines()))
  assert report.conventions(runs[0]) == {}
  (row,) = cells(report.table(runs, papers=True))
  assert "MB, values only" not in row


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
  with pytest.raises(ValueError, match="expected a finished round"):
    report.load(folder)
