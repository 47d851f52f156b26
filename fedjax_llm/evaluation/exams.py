"""Exams: multiple-choice questions by subject, with the prompts of the authors.

An `Exam`, such as `ceval.EXAM` or `mmlu.EXAM`, defines how questions are read,
asked and averaged. The questions come from the authors' zip, from its unpacked
folder, or from the hub.
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
  """A question of an exam.

  Attributes:
    text: the question.
    options: the four answers to choose from.
    answer: the letter of the correct answer; empty if unknown.
    id: the id in the authors' files, or the number of the question.
  """

  text: str
  options: tuple[str, ...]
  answer: str
  id: str


class Exam(NamedTuple):
  """The definition of an exam.

  Attributes:
    name: the name of the exam, and of its zip, `NAME.zip`.
    hub: the name on the hub, where every subject is a config.
    groups: the subjects of each category. The category of a subject is the
      first group that has it.
    split: the split that published scores use.
    averaged_over: what has equal weight in an accuracy.
    read: function from the number and the fields of a row to a question.
    header: function from a subject to the start of its prompts.
    ask: function from a question to its prompt, up to the answer.
    answer: function from a letter to the text of the answer in a prompt.
    context: the largest number of tokens in a prompt, for every model; None for
      no limit.
    columns: the column names of files without a header line; None if files have
      one.
    hub_splits: from a split to its name on the hub, where the names differ.
  """

  name: str
  hub: str
  groups: Mapping[str, tuple[str, ...]]
  split: Split
  averaged_over: Literal["questions", "subjects"]
  read: Callable[[int, Mapping[str, Any]], Question]
  header: Callable[[str], str]
  ask: Callable[[Question], str]
  answer: Callable[[str], str]
  context: int | None = None
  columns: tuple[str, ...] | None = None
  hub_splits: Mapping[str, str] = {}

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
  """Loads the questions of an exam, with the first questions of `dev` as shots.

  Args:
    exam: the exam.
    source: the authors' zip, its folder, or its unpacked folder; or a hub name.
      None for the hub name of the exam.
    split: "val" or "test"; None for the split of published scores.
    shots: number of solved questions in a prompt.
    subjects: names of subjects; empty for all.
    limit: largest number of questions per subject; None for all.

  Returns:
    One paper for each subject.

  Raises:
    ValueError: if a subject is unknown, or questions are missing.
  """
  if unknown := [x for x in subjects if x not in exam.subjects]:
    raise ValueError(
      f"expected subjects of {exam.name}, got {', '.join(unknown)}. Choose from"
      f" {', '.join(exam.subjects)}."
    )
  if len(set(subjects)) < len(subjects):
    raise ValueError(f"expected each subject once, got {', '.join(subjects)}.")
  if shots < 0 or (limit is not None and limit < 1):
    raise ValueError(
      f"expected shots >= 0 and limit >= 1, got {shots=} and {limit=}."
    )
  rows = _reader(exam, source or exam.hub)

  def questions(subject, split):
    return [exam.read(*row) for row in enumerate(rows(subject, split))]

  result = []
  for subject in subjects or exam.subjects:
    solved = questions(subject, "dev")[:shots] if shots else []
    asked = questions(subject, split or exam.split)[:limit]
    if len(solved) < shots or not asked:
      raise ValueError(
        f"expected {shots} solved questions of {subject} and one or more to"
        f" ask, got {len(solved)} and {len(asked)}. Take fewer shots or another"
        " split."
      )
    result.append(_paper(exam, subject, solved, asked))
  return result


def _paper(exam, subject, solved, asked) -> multiple_choice.Paper:
  """Returns the paper of a subject, with `solved` questions as shots."""
  return multiple_choice.Paper(
    subject,
    exam.header(subject),
    tuple(f"{exam.ask(x)}{exam.answer(x.answer)}\n\n" for x in solved),
    tuple(map(exam.ask, asked)),
    tuple(x.id for x in asked),
    tuple(x.answer for x in asked),
  )


def lettered(question: Question) -> str:
  """Returns the question and its options, each on its own line."""
  options = zip(LETTERS, question.options, strict=True)
  return "\n".join([question.text, *(f"{x}. {text}" for x, text in options)])


def _reader(
  exam: Exam, source: str | os.PathLike
) -> Callable[[str, str], Iterable[Mapping[str, Any]]]:
  """Makes the function `rows(subject, split)`."""
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
      raise ValueError(
        f"expected a file {file}, found none. Unpack the authors' zip again."
      )
    # Line breaks within cells are kept.
    text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    return list(csv.DictReader(text, fieldnames=exam.columns))

  return from_file


def _root(exam: Exam, path: pathlib.Path) -> Any:
  """Returns the folder with `dev`, `val` and `test`, in a folder or a zip."""
  archive = path if path.is_file() else path / f"{exam.name}.zip"
  root: Any = zipfile.Path(archive) if archive.is_file() else path
  for candidate in (root, root / "data"):
    if (candidate / "dev").is_dir():
      return candidate
  raise ValueError(
    f"expected {exam.name}.zip or its folders dev, val and test in {path},"
    " found neither. Give the folder of the authors' zip."
  )
