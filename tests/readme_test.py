"""README's Python blocks run, and its tables are those of committed results."""

import pathlib
import re

import pytest

from fedjax_llm.reporting import runs as report
from fedjax_llm.reporting import studies, study_tables

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
  "names",
  [
    ["quickstart"],
    ["flasc_dolly", "flasc_gsm8k"],
    ["flasc_newsgroups"],
  ],
)
def test_tables_are_those_of_the_committed_runs(names):
  runs = [run for name in names for run in report.load(RESULTS / name)]
  assert report.table(runs) in README


STUDIES = sorted(
  path
  for path in (RESULTS / "flasc").glob("*.jsonl")
  if not path.stem.endswith("_rates")
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_committed_studies(path):
  entries = studies.load(path)
  assert study_tables.table(entries) in README
  assert all(run.record["date"] for entry in entries for run in entry.runs)


def test_the_commands_are_one_line_each():
  assert [block.count("\n") for block in blocks("bash")][:2] == [1, 1]


def test_linked_files_exist():
  for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
    assert (ROOT / path).exists(), path
