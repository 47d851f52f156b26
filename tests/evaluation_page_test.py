"""docs/evaluation.md says what the command and the exams do."""

import dataclasses
import inspect
import pathlib
import re
import typing

import pytest

from fedjax_llm.cli import evaluate, sitting
from fedjax_llm.evaluation import ceval, mmlu

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "evaluation.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMS = {"C-Eval": ceval.EXAM, "MMLU": mmlu.EXAM}


def column(name):
  """What the table of protocols says of an exam."""
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|")
  ]
  number = rows[0].index(name)
  return {row[0]: row[number] for row in rows}


@pytest.mark.parametrize("name", EXAMS)
def test_the_table_is_of_the_exams(name):
  exam, said = EXAMS[name], column(name)
  assert said["subjects"] == str(len(exam.subjects))
  groups = re.findall(r"([A-Za-z ]+?) (\d+)", said["groups"])
  assert {group.strip(): int(size) for group, size in groups} == {
    group: len(subjects) for group, subjects in exam.groups.items()
  }
  assert said["split by default"] == exam.split
  limit = "the model's context" if exam.context is None else str(exam.context)
  assert said["tokens of a prompt at most"] == limit
  assert said["what is scored after the prompt"] == f"`{exam.answer('A')}`"
  assert said["an average counts alike"] == exam.averaged_over
  default = sitting.Options().shots
  assert said["shots by default"] == str(default)


def test_options_and_tasks_are_those_of_the_command():
  parameters = inspect.signature(evaluate.evaluate).parameters
  fields = dataclasses.fields(sitting.Options)
  names = {*parameters, *(field.name for field in fields), "json"}
  options = {f"--{name.replace('_', '-')}" for name in names}
  assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", TEXT)) <= options
  tasks = typing.get_args(parameters["task"].annotation)
  described = re.findall(
    r"^- ((?:\*\*[a-z]+\*\*(?:, )?)+):", TEXT, re.MULTILINE
  )
  assert set(re.findall(r"\w+", " ".join(described))) == set(tasks)
