"""README's Python blocks run; tables are those of the committed results."""

import pathlib
import re

import pytest

from benchmarks import study
from fedjax_llm.reporting import runs as report
from fedjax_llm.reporting import studies, study_tables

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "results.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
  "names, text",
  [
    (["quickstart"], README),
    (["flasc_dolly", "flasc_gsm8k"], PAGE),
    (["flasc_newsgroups"], PAGE),
  ],
  ids=["quickstart", "language", "classification"],
)
def test_tables_are_those_of_the_committed_runs(names, text):
  runs = [run for name in names for run in report.load(RESULTS / name)]
  assert report.table(runs) in text


STUDIES = sorted(
  path
  for path in (RESULTS / "flasc").glob("*.jsonl")
  if not path.stem.endswith("_rates")
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_committed_studies(path):
  entries = studies.load(path)
  marked = re.search(f"<!-- {path.stem} -->(.*?)<!-- end -->", PAGE, re.DOTALL)
  assert marked and study_tables.table(entries) in marked[1]
  assert all(run.record["date"] for entry in entries for run in entry.runs)


def test_the_figures_of_minilm_are_those_of_its_records():
  records = study.read(RESULTS / "flasc" / "minilm.jsonl")

  def result(method, density):
    (lines,) = [
      x["lines"]
      for x in records
      if (x["cell"]["method"], x["cell"]["density"]) == (method, density)
      and x["cell"]["rank"] == 16
    ]
    sent = [line["download_bytes"] + line["upload_bytes"] for line in lines[1:]]
    return lines[-1]["accuracy"], sum(sent)

  text = README.replace("\n", " ")
  dense, most = result("dense", 1)
  assert f"dense LoRA ends at {dense:.1%}" in text
  for method, density in (("quantised", 1 / 8), ("FLASC", 1 / 64)):
    accuracy, sent = result(method, density)
    assert f"at {accuracy:.1%} with {most / sent:.1f} times fewer" in text


def test_the_commands_are_one_line_each():
  assert [block.count("\n") for block in blocks("bash")][:2] == [1, 1]


def test_it_is_read_in_one_go():
  assert README.count("\n") <= 200


def test_no_plot_is_missing():
  for path in STUDIES:
    assert f"results/flasc/{path.stem}.png" in PAGE


@pytest.mark.parametrize(
  "text, folder", [(README, ROOT), (PAGE, ROOT / "docs")], ids=["home", "page"]
)
def test_linked_files_exist(text, folder):
  for path in re.findall(r"\]\((?!http)([^)#]+)", text):
    assert (folder / path).exists(), path
