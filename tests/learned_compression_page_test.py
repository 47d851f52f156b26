"""docs/learned_compression*.md have the tables of the committed results."""

import json
import pathlib
import re

import pytest

from benchmarks import study
from benchmarks.cg_fedllm import analyses, distortion
from fedjax_llm.reporting import runs, studies, study_tables

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cg_fedllm"
PAGE = ROOT / "docs" / "learned_compression.md"
STUDY = ROOT / "docs" / "learned_compression_study.md"
TEXT = STUDY.read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "path", sorted(RESULTS.glob("*_distortion.jsonl")), ids=lambda x: x.stem
)
def test_errors_of_codecs(path):
  assert distortion.table(study.read(path)) in TEXT


@pytest.mark.parametrize(
  "path",
  [
    path
    for path in sorted(RESULTS.glob("*.jsonl"))
    if not path.stem.endswith(("_distortion", "_rates"))
  ],
  ids=lambda x: x.stem,
)
def test_losses_after_tuning_through_codecs(path):
  assert study_tables.table(studies.load(path)) in TEXT


@pytest.mark.parametrize(
  "path", sorted(RESULTS.glob("*_analyses.json")), ids=lambda x: x.stem
)
def test_analyses(path):
  for table in analyses.tables(json.loads(path.read_text())).values():
    assert table in TEXT


def test_the_two_commands():
  assert runs.table(runs.load(RESULTS / "embedded")) in PAGE.read_text()


def test_the_page_sums_up_what_the_study_has():
  """Losses of the short table are in the study, with their deviations."""
  losses = re.findall(r"\d\.\d{3} ± \d\.\d{3}", PAGE.read_text())
  assert len(losses) == 24
  tables = [line for line in TEXT.splitlines() if "× fewer" not in line]
  rows = [line for line in tables if line.count("|") > 8]
  assert not {x for x in losses if not any(x in row for row in rows)}


def test_the_page_is_one_that_a_reader_can_use():
  assert PAGE.read_text().count("\n") <= 250


def test_there_is_something_to_check():
  assert len(list(RESULTS.glob("*.json*"))) > 3


@pytest.mark.parametrize("page", [PAGE, STUDY], ids=lambda x: x.stem)
def test_linked_files_exist(page):
  text = page.read_text(encoding="utf-8")
  for path in re.findall(r"\]\((?!http)([^)#]+)", text):
    assert (ROOT / "docs" / path).exists(), path
