"""docs/learned_compression.md has the tables of the committed results."""

import json
import pathlib
import re

import pytest

from benchmarks.cg_fedllm import analyses, distortion
from fedjax_llm.reporting import runs, studies, study_tables

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cg_fedllm"
TEXT = (ROOT / "docs" / "learned_compression.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "path", sorted(RESULTS.glob("*_distortion.jsonl")), ids=lambda x: x.stem
)
def test_errors_of_codecs(path):
  assert distortion.table(distortion.read(path)) in TEXT


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
  assert runs.table(runs.load(RESULTS / "embedded")) in TEXT


def test_there_is_something_to_check():
  assert len(list(RESULTS.glob("*.json*"))) > 3


def test_linked_files_exist():
  for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
    assert (ROOT / "docs" / path).exists(), path
