"""Exams: multiple-choice questions by subject, asked as their authors do.

An `Exam` says how questions are read, asked and averaged: `ceval.EXAM`,
`mmlu.EXAM`. Its files are the authors' zip, that zip unpacked, or the hub's.
"""

import csv
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedjax_llm.data import sources
from fedjax_llm.evaluation import multiple_choice

LETTERS = "ABCD"
Split = Literal["val", "test"]


class Question(NamedTuple):
  """A question as it is stored.

  Attributes:
    text: what is asked.
    options: the four answers to choose from.
    answer: the letter of the right one; empty where it is not told.
    id: in the authors' files, its number where they have none.
  """

  text: str
  options: tuple[str, ...]
  answer: str
  id: str


class Exam(NamedTuple):
  """What tells an exam from others.

  Attributes:
    name: and that of the zip, `NAME.zip`.
    hub: its name on the hub, where every subject is a config.
    groups: the subjects of each category; a subject's category is the first
      group that it is in.
    split: which its scores are published for.
    context: tokens of a prompt at most, whatever the model; None for no limit.
    averaged_over: what counts as one in the accuracy of a group.
    columns: of files without a line that names them.
    hub_splits: what the hub calls a split otherwise.
    read: a row with its number -> the question.
    header: a subject -> what its prompts start with.
    ask: a question -> its text, up to where the answer begins.
    answer: of a letter, what follows that.
  """

  name: str
  hub: str
  groups: Mapping[str, tuple[str, ...]]
  split: Split
  context: int | None
  averaged_over: Literal["questions", "subjects"]
  columns: tuple[str, ...] | None
  hub_splits: Mapping[str, str]
  read: Callable[[int, Mapping[str, Any]], Question]
  header: Callable[[str], str]
  ask: Callable[[Question], str]
  answer: Callable[[str], str]

  @property
  def subjects(self) -> tuple[str, ...]:
    """All subjects, sorted."""
    return tuple(sorted({x for group in self.groups.values() for x in group}))


def papers(
  exam: Exam,
  source: str | os.PathLike | None = None,
  *,
  split: Split | None = None,
  shots: int = 5,
  subjects: Sequence[str] = (),
  limit: int | None = None,
) -> list[multiple_choice.Paper]:
  """The questions of an exam, with the first questions of `dev` as shots.

  Args:
    exam: which.
    source: folder of the authors' zip, or of what is in it; or a hub name, by
      default the exam's.
    split: "val" or "test", by default the exam's.
    shots: solved examples of a prompt.
    subjects: all, if none are named.
    limit: the first so many questions of each subject; None for all.

  Raises:
    ValueError: if there are no such questions.
  """
  if unknown := [x for x in subjects if x not in exam.subjects]:
    raise ValueError(
      f"expected subjects of {exam.name}, got {', '.join(unknown)}. It has"
      f" {', '.join(exam.subjects)}."
    )
  if len(set(subjects)) < len(subjects):
    raise ValueError(f"expected each subject once, got {', '.join(subjects)}.")
  if shots < 0 or (limit is not None and limit < 1):
    raise ValueError(f"expected shots >= 0 and limit >= 1: {shots=}, {limit=}.")
  rows = _reader(exam, source or exam.hub)

  def questions(subject, split):
    return [exam.read(*row) for row in enumerate(rows(subject, split))]

  result = []
  for subject in subjects or exam.subjects:
    solved = questions(subject, "dev")[:shots] if shots else []
    asked = questions(subject, split or exam.split)[:limit]
    if len(solved) < shots or not asked:
      raise ValueError(
        f"expected {shots} solved questions of {subject} and some to ask, got"
        f" {len(solved)} and {len(asked)}."
      )
    result.append(
      multiple_choice.Paper(
        subject,
        exam.header(subject),
        tuple(f"{exam.ask(x)}{exam.answer(x.answer)}\n\n" for x in solved),
        tuple(map(exam.ask, asked)),
        tuple(x.id for x in asked),
        tuple(x.answer for x in asked),
      )
    )
  return result


def lettered(question: Question) -> str:
  """The question and its options, a line each, as both exams write them."""
  options = zip(LETTERS, question.options, strict=True)
  return "\n".join([question.text, *(f"{x}. {text}" for x, text in options)])


def _reader(
  exam: Exam, source: str | os.PathLike
) -> Callable[[str, str], Iterable[Mapping[str, Any]]]:
  """Makes `rows(subject, split)`."""
  path = pathlib.Path(source).expanduser()
  if not path.exists():

    def from_hub(subject, split):
      split = exam.hub_splits.get(split, split)
      rows: Any = sources.load(f"{source}:{subject}@{split}")
      return rows

    return from_hub
  root = _root(exam, path)

  def from_file(subject, split):
    file = root / split / f"{subject}_{split}.csv"
    if not file.is_file():
      raise ValueError(f"expected a file {file}, found none.")
    # Cells may hold line breaks, which stay as they are.
    text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    return list(csv.DictReader(text, fieldnames=exam.columns))

  return from_file


def _root(exam: Exam, path: pathlib.Path) -> Any:
  """What `dev`, `val` and `test` are in, in a folder or a zip."""
  archive = path if path.is_file() else path / f"{exam.name}.zip"
  root: Any = zipfile.Path(archive) if archive.is_file() else path
  for candidate in (root, root / "data"):
    if (candidate / "dev").is_dir():
      return candidate
  raise ValueError(
    f"expected {exam.name}.zip or its folders dev, val and test in {path},"
    " found neither."
  )
