import pytest

from fedjax_llm.reporting import studies, study_tables
from tests import toy_study


@pytest.fixture
def study(tmp_path):
  return lambda records: toy_study.write(tmp_path / "toy.jsonl", records)


def test_an_entry_is_measured_by_the_dense_one(study):
  # The target is 2.1 + the deviation sqrt(2) / 10 of 2.0 and 2.2: 2.24. The
  # mean of the sparse runs, 2.2, meets it with its last evaluation.
  entries = studies.load(study([*toy_study.DENSE, *toy_study.SPARSE]))
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
  slow = [
    toy_study.record("FLASC", 0, [4.5, 3.5, 2.5], density=1 / 16, entries=6)
  ]
  *_, row = study_tables.table(
    studies.load(study([*toy_study.DENSE, *slow]))
  ).splitlines()
  assert "not met" in row


def test_ratios_are_printed_by_utility_the_best_one_first(study):
  # Dense passes 4, 3 and 2.1; sparse, of 29 bytes for 405, 4.5, 3.5 and 2.2.
  entries = studies.load(study([*toy_study.DENSE, *toy_study.SPARSE]))
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
