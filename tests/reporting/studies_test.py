import numpy as np
import pytest

from fedjax_llm.cli import compare as commands
from fedjax_llm.reporting import studies
from tests import toy_study


@pytest.fixture
def study(tmp_path):
  return lambda records: toy_study.write(tmp_path / "toy.jsonl", records)


def test_runs_that_differ_in_their_seed_alone_are_one_entry(study):
  dense, sparse = studies.load(study([*toy_study.DENSE, *toy_study.SPARSE]))
  assert (dense.method, sparse.method) == ("dense", "FLASC")
  np.testing.assert_array_equal(dense.final("loss"), [2.0, 2.2])  # By seed.
  np.testing.assert_allclose(sparse.final("loss"), [2.1, 2.2, 2.3])
  sent = [sparse.megabytes(line["round"]) for line in sparse.runs[0].evaluated]
  np.testing.assert_allclose(sent, np.arange(4) * 20 * 29 / 1e6)
  np.testing.assert_allclose(sparse.curve("loss")[1:], [4.5, 3.5, 2.2])


def test_uploads_alone_are_told_where_downloads_are_alike(study):
  whole, coded = (
    toy_study.record("dense", 0, [3.0]),
    toy_study.record("EDEN", 0, [3.1]),
  )
  coded["lines"][1]["upload_bytes"] = 100
  entries = studies.load(study([whole, coded]))
  assert studies.is_of_uploads(entries)
  assert not studies.is_of_uploads(
    studies.load(study([*toy_study.DENSE, *toy_study.SPARSE]))
  )
  sent = [entry.megabytes_up() for entry in entries]
  np.testing.assert_allclose(sent, [4050e-6, 100e-6])


def test_knobs_tell_runs_apart(study):
  runs = [toy_study.record("dense", 0, [3.0], alpha=a) for a in (0.1, 1.0)]
  entries = studies.load(study(runs))
  assert [x.cell["alpha"] for x in entries] == [0.1, 1.0]
  assert studies.shown(entries) == ["alpha"]
  # Each is its own reference.
  assert [studies.reference_of(x, entries) for x in entries] == entries


def test_learning_rates_are_shown_where_nothing_else_tells_runs_apart(study):
  runs = [toy_study.record(x, 0, [3.0]) for x in ("dense", "FLASC")]
  for rate, run in zip((0.1, 1.0), runs, strict=True):
    run["cell"]["server_rate"] = rate
  assert studies.shown(studies.load(study(runs))) == []
  runs.append(toy_study.record("FLASC", 0, [3.1]))
  runs[-1]["cell"]["server_rate"] = 2.0
  entries = studies.load(study(runs))
  assert studies.shown(entries) == ["server_rate"]
  labels = [x.label(studies.shown(entries)) for x in entries]
  assert labels[1:] == ["FLASC, server_rate 1", "FLASC, server_rate 2"]


def test_compare_sums_a_study_up(study, tmp_path, capsys):
  out = tmp_path / "toy.png"
  commands.compare((study([*toy_study.DENSE, *toy_study.SPARSE]),), out=out)
  printed = capsys.readouterr().out
  assert "FLASC" in printed and "at equal utility" in printed
  assert out.read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_a_utility_is_between_evaluations(study):
  dense, sparse = studies.load(study([*toy_study.DENSE, *toy_study.SPARSE]))
  # Means 5, 4.0, 3.0, 2.1, and two rounds are 20 messages of 405 bytes.
  levels = np.array([4.5, 4.0, 2.55, 2.0])
  got = studies.cost_to(dense, levels, dense.megabytes)
  expected = np.array([0.5, 1.0, 2.5, np.nan]) * 20 * 405 / 1e6
  np.testing.assert_allclose(got, expected)
  # Means 5, 4.5, 3.5, 2.2 and six values of four bytes.
  values = lambda rounds: sparse.as_papers_count(rounds).get("values", 0)
  got = studies.cost_to(sparse, np.array([4.0]), values)
  np.testing.assert_allclose(got, 1.5 * 20 * 24 / 1e6)


def test_without_a_dense_run_there_are_no_ratios(study):
  with pytest.raises(ValueError, match="expected entries of dense"):
    studies.ratios(
      studies.load(study(toy_study.SPARSE)), studies.Entry.megabytes
    )


def test_what_was_lost_again_was_still_met_first(study):
  (entry,) = studies.load(
    study([toy_study.record("dense", 0, [3.0, 4.0, 2.0])])
  )
  got = studies.cost_to(entry, np.array([3.5, 3.0, 2.5]), entry.megabytes)
  np.testing.assert_allclose(got, np.array([0.75, 1, 2.5]) * 0.0081)


def test_an_empty_study_is_refused(study):
  with pytest.raises(ValueError, match="expected runs in .*toy.jsonl"):
    studies.load(study([]))


def test_the_reference_is_the_dense_run_of_as_many_rounds(study):
  losses = [4.0, 3.0, 2.5, 2.2, 2.1]
  lengths = lambda method, counts, **knobs: [
    toy_study.record(method, 0, losses[:count], **knobs) for count in counts
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
  runs = [toy_study.record(method, 0, [3.0], density=x) for method, x in cells]
  got = [(x.method, x.cell["density"]) for x in studies.load(study(runs))]
  assert got == [("FLASC", x) for x in (1.0, 1 / 4, 1 / 16)] + [("dense", 1.0)]
