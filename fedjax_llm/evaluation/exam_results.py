"""What came out of an exam: accuracies, how sure they are, who is better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tabulate
from jaxtyping import Bool

from fedjax_llm.evaluation import exams, multiple_choice


class Result(NamedTuple):
  """How a model did in a subject.

  Attributes:
    subject: its name.
    ids: of the questions.
    chosen: a letter each; empty where the prompt had no room in the context.
    answers: the right letters; empty where they are not told.
    shots: how many each had; 0 too where there was no room.
  """

  subject: str
  ids: tuple[str, ...]
  chosen: tuple[str, ...]
  answers: tuple[str, ...]
  shots: tuple[int, ...]

  @property
  def right(self) -> Bool[np.ndarray, " questions"]:
    """Which answers are right; a question without room has none."""
    return np.array(self.chosen) == np.array(self.answers)


def result(
  paper: multiple_choice.Paper,
  groups: Sequence[multiple_choice.Group],
  scores: Mapping[int, np.ndarray],
) -> Result:
  """What the scores of a paper's questions choose."""
  shots = {x: group.shots for group in groups for x in group.questions}
  numbers = range(len(paper.questions))
  chosen = {x: exams.LETTERS[int(np.argmax(scores[x]))] for x in scores}
  return Result(
    paper.subject,
    paper.ids,
    tuple(chosen.get(x, "") for x in numbers),
    paper.answers,
    tuple(shots.get(x, 0) for x in numbers),
  )


def accuracy(
  right: Sequence[Bool[np.ndarray, " questions"]],
  averaged_over: Literal["questions", "subjects"],
) -> dict[str, float]:
  """The accuracy of a group of subjects.

  Args:
    right: of each subject, which answers are.
    averaged_over: whether every question counts the same, or every subject.

  Returns:
    `accuracy`; its `standard_error`, the binomial one of all questions or, of
    the mean of subjects, that of the sum of as many independent binomials; and
    the number of `questions`.
  """
  sizes = np.array([len(x) for x in right])
  means = np.array([x.mean() for x in right])
  if averaged_over == "questions":
    mean = float(np.concatenate(right).mean())
    variance = mean * (1 - mean) / sizes.sum()
  else:
    mean = float(means.mean())
    variance = (means * (1 - means) / sizes).sum() / len(sizes) ** 2
  return {
    "accuracy": mean,
    "standard_error": math.sqrt(variance),
    "questions": int(sizes.sum()),
  }


def summary(exam: exams.Exam, results: Sequence[Result]) -> dict[str, Any]:
  """Accuracies of all, of each category and of each subject, as the exam has.

  Returns:
    What `accuracy` tells of all; the other mean as `subject_mean` or
    `question_mean`; how many questions are `unanswered` for want of context;
    and the same for `categories` and `subjects` by name.

  Raises:
    ValueError: if the right answers are not told.
  """
  if untold := [x.subject for x in results if not all(x.answers)]:
    raise ValueError(
      f"expected questions with their answers, got {untold[0]} without. Take"
      " the split val, or write predictions only."
    )
  right = {x.subject: x.right for x in results}
  over = exam.averaged_over
  other = "subjects" if over == "questions" else "questions"
  categories = {}
  for name, members in exam.groups.items():
    if own := [right[x] for x in members if x in right]:
      categories[name] = accuracy(own, over)
  every = list(right.values())
  return {
    **accuracy(every, over),
    f"{other[:-1]}_mean": accuracy(every, other)["accuracy"],
    "unanswered": sum(not letter for x in results for letter in x.chosen),
    "categories": categories,
    "subjects": {
      x.subject: accuracy([x.right], over) | {"shots": min(x.shots)}
      for x in results
    },
  }


def mcnemar(
  first: Bool[np.ndarray, " questions"], second: Bool[np.ndarray, " questions"]
) -> dict[str, float]:
  """McNemar's exact test of two models that answered the same questions.

  Args:
    first: which answers of one model are right.
    second: those of the other.

  Returns:
    How many are right in `only_first` and in `only_second`, and the two-sided
    `p_value` of their being so unequal if each of these questions was as likely
    to be one's as the other's.
  """
  only_first = int((first & ~second).sum())
  only_second = int((second & ~first).sum())
  differing = only_first + only_second
  from scipy import stats

  test = stats.binomtest(only_first, differing) if differing else None
  return {
    "only_first": only_first,
    "only_second": only_second,
    "p_value": float(test.pvalue) if test else 1.0,
  }


def comparison(
  exam: exams.Exam, first: Sequence[Result], second: Sequence[Result]
) -> dict[str, float]:
  """The accuracy of the second model, and `mcnemar` over all questions."""
  right = [np.concatenate([x.right for x in y]) for y in (first, second)]
  every = accuracy([x.right for x in second], exam.averaged_over)
  return {"accuracy": every["accuracy"], **mcnemar(*right)}


def predictions(results: Sequence[Result]) -> dict[str, dict[str, str]]:
  """The chosen letters by subject and id, as C-Eval's site takes them."""
  return {
    x.subject: {
      id: letter for id, letter in zip(x.ids, x.chosen, strict=True) if letter
    }
    for x in results
  }


def table(exam: exams.Exam, shown: Mapping[str, Any]) -> str:
  """A `summary` for people, in per cent; subjects follow their category."""
  lines, left = [("all", "", shown)], set(shown["subjects"])
  for name, category in shown["categories"].items():
    lines.append((name, "", category))
    own = [x for x in exam.groups[name] if x in left]
    left -= set(own)
    lines += [("", x, shown["subjects"][x]) for x in own]
  rows = [
    {
      "category": category,
      "subject": subject,
      "questions": x["questions"],
      "shots": x.get("shots"),
      "accuracy": f"{100 * x['accuracy']:.1f}",
      "±": f"{100 * x['standard_error']:.1f}",
    }
    for category, subject, x in lines
  ]
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", disable_numparse=True
  )
