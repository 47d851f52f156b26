import json

import numpy as np
import pytest

from fedjax_llm import commands, studies, study_tables


def record(method, seed, losses, *, density=1.0, rank=16, entries=100, **more):
  """A run of 10 clients and 2 rounds between evaluations."""
  cell = dict(task="toy", method=method, density=density, rank=rank, seed=seed)
  cell |= dict(client_rate=0.1, server_rate=0.1, rounds=2 * len(losses))
  cell["knobs"] = list(more.items())
  lines = [{"round": 0, "loss": 5.0, "perplexity": 1.0}]
  lines += [
    {
      "round": 2 * i + 2,
      "loss": loss,
      "perplexity": 1.0,
      "download_bytes": 10 * (4 * entries + 5),
      "upload_bytes": 10 * (4 * entries + 5),
      "download_entries": 10 * entries,
      "upload_entries": 10 * entries,
      "sparse_messages": 20 * (entries < 100),
      "sparse_entries": 20 * entries * (entries < 100),
      "trainable": 100,
    }
    for i, loss in enumerate(losses)
  ]
  return {"cell": cell, "lines": lines}


DENSE = [record("dense", 1, [4.0, 3.0, 2.2]), record("dense", 0, [4.0, 3, 2])]
SPARSE = [
  record("FLASC", seed, [4.5, 3.5, 2.1 + seed / 10], density=1 / 16, entries=6)
  for seed in range(3)
]


@pytest.fixture
def study(tmp_path):
  def write(records):
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return path

  return write


def test_runs_that_differ_in_their_seed_alone_are_one_entry(study):
  dense, sparse = studies.load(study([*DENSE, *SPARSE]))
  assert (dense.method, sparse.method) == ("dense", "FLASC")
  np.testing.assert_array_equal(dense.final("loss"), [2.0, 2.2])  # By seed.
  np.testing.assert_allclose(sparse.final("loss"), [2.1, 2.2, 2.3])
  sent, losses = sparse.curve("loss")
  np.testing.assert_allclose(sent, np.arange(1, 4) * 20 * 29 / 1e6)
  np.testing.assert_allclose(losses, [4.5, 3.5, 2.2])


def test_an_entry_is_measured_by_the_dense_one(study):
  # The target is 2.1 + the deviation sqrt(2) / 10 of 2.0 and 2.2: 2.24. The
  # mean of the sparse runs, 2.2, meets it with its last evaluation.
  entries = studies.load(study([*DENSE, *SPARSE]))
  table = study_tables.table(entries, papers=True)
  header, _, dense, sparse = table.splitlines()
  columns = lambda row: [cell.strip() for cell in row.strip("|").split("|")]
  dense, sparse = (
    dict(zip(columns(header), columns(row), strict=True))
    for row in (dense, sparse)
  )
  assert dense["loss"] == "2.100 ± 0.141"
  assert sparse["loss"] == "2.200 ± 0.100"
  assert (dense["density"], sparse["density"]) == ("1", "1/16")
  assert (dense["seeds"], sparse["seeds"]) == ("2", "3")
  assert dense["× fewer"] == "1"
  ratio = 405 / 29
  assert float(sparse["× fewer"]) == pytest.approx(ratio, abs=0.05)
  assert float(sparse["× fewer to dense"]) == pytest.approx(ratio, abs=0.05)
  # Values alone 24 bytes a message of 400; with 12.5 of bits; with positions.
  assert float(sparse["× fewer, values"]) == pytest.approx(400 / 24, abs=0.05)
  bitmap = 400 / (24 + 12.5)
  assert float(sparse["× fewer, bitmap"]) == pytest.approx(bitmap, abs=0.05)
  assert float(sparse["× fewer, COO"]) == pytest.approx(400 / 48, abs=0.05)
  assert float(sparse["× fewer up"]) == pytest.approx(405 / 29, abs=0.05)
  coo = float(sparse["× fewer to dense, COO"])
  assert coo == pytest.approx(400 / 48, abs=0.05)
  assert "COO" not in study_tables.table(entries)


def test_a_target_that_is_not_met_is_told(study):
  slow = [record("FLASC", 0, [4.5, 3.5, 2.5], density=1 / 16, entries=6)]
  *_, row = study_tables.table(
    studies.load(study([*DENSE, *slow]))
  ).splitlines()
  assert "not met" in row


def test_uploads_alone_are_told_where_downloads_are_alike(study):
  whole, coded = record("dense", 0, [3.0]), record("EDEN", 0, [3.1])
  coded["lines"][1]["upload_bytes"] = 100
  entries = studies.load(study([whole, coded]))
  assert studies.is_of_uploads(entries)
  assert not studies.is_of_uploads(studies.load(study([*DENSE, *SPARSE])))
  sent = [entry.megabytes_up() for entry in entries]
  np.testing.assert_allclose(sent, [4050e-6, 100e-6])


def test_knobs_tell_runs_apart(study):
  runs = [record("dense", 0, [3.0], alpha=a) for a in (0.1, 1.0)]
  entries = studies.load(study(runs))
  assert [x.cell["alpha"] for x in entries] == [0.1, 1.0]
  assert studies.shown(entries) == ["alpha"]
  # Each is its own reference.
  assert [studies.reference_of(x, entries) for x in entries] == entries


def test_compare_sums_a_study_up(study, tmp_path, capsys):
  out = tmp_path / "toy.png"
  commands.compare((study([*DENSE, *SPARSE]),), out=out)
  printed = capsys.readouterr().out
  assert "FLASC" in printed and "until there" in printed
  assert out.read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_a_utility_is_between_evaluations(study):
  dense, sparse = studies.load(study([*DENSE, *SPARSE]))
  # Means 5, 4.0, 3.0, 2.1, and two rounds are 20 messages of 405 bytes.
  levels = np.array([4.5, 4.0, 2.55, 2.0])
  got = studies.cost_to(dense, levels, dense.megabytes)
  expected = np.array([0.5, 1.0, 2.5, np.nan]) * 20 * 405 / 1e6
  np.testing.assert_allclose(got, expected)
  # Means 5, 4.5, 3.5, 2.2 and six values of four bytes.
  values = lambda rounds: sparse.as_papers_count(rounds).get("values", 0)
  got = studies.cost_to(sparse, np.array([4.0]), values)
  np.testing.assert_allclose(got, 1.5 * 20 * 24 / 1e6)


def test_ratios_are_printed_by_utility_the_best_one_first(study):
  # Dense passes 4, 3 and 2.1; sparse, of 29 bytes for 405, 4.5, 3.5 and 2.2.
  entries = studies.load(study([*DENSE, *SPARSE]))
  _, _, *rows = study_tables.ratio_table(entries).splitlines()
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
  assert [row[:2] for row in cells] == [
    ["2.100", "1.0"],
    ["3.000", "1.0"],
    ["4.000", "1.0"],
  ]
  # 3 is five thirteenths of a step after 3.5, and 4 half of one after 4.5.
  expected = [2 / (2 + 5 / 13), 1 / 1.5]
  assert cells[0][2] == ""
  assert [float(row[2]) for row in cells[1:]] == [
    round(ratio * 405 / 29, 1) for ratio in expected
  ]


def test_without_a_dense_run_there_are_no_ratios(study):
  with pytest.raises(ValueError, match="expected entries of dense"):
    studies.ratios(studies.load(study(SPARSE)), studies.Entry.megabytes)


def test_what_was_lost_again_was_still_met_first(study):
  (entry,) = studies.load(study([record("dense", 0, [3.0, 4.0, 2.0])]))
  got = studies.cost_to(entry, np.array([3.5, 3.0, 2.5]), entry.megabytes)
  np.testing.assert_allclose(got, np.array([0.75, 1, 2.5]) * 0.0081)


def test_an_empty_study_is_refused(study):
  with pytest.raises(ValueError, match="expected runs in .*toy.jsonl"):
    studies.load(study([]))


def test_the_reference_is_the_dense_run_of_as_many_rounds(study):
  losses = [4.0, 3.0, 2.5, 2.2, 2.1]
  lengths = lambda method, counts, **knobs: [
    record(method, 0, losses[:count], **knobs) for count in counts
  ]
  dense = lengths("dense", (3, 2))
  others = lengths("FLASC", (1, 2, 3, 5), entries=6)
  steps = lengths("dense", (3,), local_steps=16)
  entries = studies.load(study([*steps, *dense, *others]))
  steps, three, two, *others = entries
  reference = lambda entry: studies.reference_of(entry, entries)
  assert [reference(x) for x in others] == [two, two, three, three]
  assert reference(steps) == three


def test_a_methods_entries_are_together_the_costly_ones_first(study):
  cells = [("FLASC", 1 / 16), ("dense", 1.0), ("FLASC", 1.0), ("FLASC", 1 / 4)]
  runs = [record(method, 0, [3.0], density=x) for method, x in cells]
  got = [(x.method, x.cell["density"]) for x in studies.load(study(runs))]
  assert got == [("FLASC", x) for x in (1.0, 1 / 4, 1 / 16)] + [("dense", 1.0)]
