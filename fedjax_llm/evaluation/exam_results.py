"""Results of exams: accuracies, standard errors, and comparisons of models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tabulate
from jaxtyping import Bool

from fedjax_llm.evaluation import exams, multiple_choice


class Result(NamedTuple):
  """The answers of a model to the questions of a subject.

  Attributes:
    subject: the name of the subject.
    ids: the ids of the questions.
    chosen: the letter chosen for each question; empty if the prompt was longer
      than the context.
    answers: the correct letter of each question; empty if unknown.
    shots: the number of shots in each prompt; 0 if the prompt was too long.
  """

  subject: str
  ids: tuple[str, ...]
  chosen: tuple[str, ...]
  answers: tuple[str, ...]
  shots: tuple[int, ...]

  @property
  def right(self) -> Bool[np.ndarray, " questions"]:
    """Whether each answer is correct; a missing answer counts as wrong."""
    return np.array(self.chosen) == np.array(self.answers)


def result(
  paper: multiple_choice.Paper,
  groups: Sequence[multiple_choice.Group],
  scores: Mapping[int, np.ndarray],
) -> Result:
  """Chooses the letter with the highest score for each question.

  Args:
    paper: the questions of a subject.
    groups: the tokenised questions of the paper.
    scores: the scores of the letters, by the number of the question.
  """
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
  """Returns the accuracy of a group of subjects.

  Args:
    right: whether each answer is correct, one array for each subject.
    averaged_over: what has equal weight, "questions" or "subjects".

  Returns:
    `accuracy`; its `standard_error`, as if answers were independent; and the
    number of `questions`.
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
  """Returns the accuracies of the exam, its categories and its subjects.

  Returns:
    What `accuracy` returns for the whole exam. Also the mean that the exam does
    not use, as `subject_mean` or `question_mean`; and the number of questions
    that were `unanswered` because the prompt was too long. `categories` and
    `subjects` map a name to what `accuracy` returns for it. A subject also has
    `shots`, the smallest number of shots in its prompts.

  Raises:
    ValueError: if correct answers are unknown.
  """
  if unknown := [x.subject for x in results if not all(x.answers)]:
    raise ValueError(
      "expected questions with known answers, got none for some questions of"
      f" {unknown[0]}. Take the split val, or write predictions only."
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
  """Compares two models on the same questions by McNemar's exact test.

  Args:
    first: whether each answer of the first model is correct.
    second: whether each answer of the second model is correct.

  Returns:
    `only_first` and `only_second`, the numbers of questions that only one model
    answered correctly; and `p_value`, two-sided, for the hypothesis that the
    expected values of both numbers are equal.
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
  """Returns the accuracy of the second model and the values of `mcnemar`."""
  right = [np.concatenate([x.right for x in y]) for y in (first, second)]
  every = accuracy([x.right for x in second], exam.averaged_over)
  return {"accuracy": every["accuracy"], **mcnemar(*right)}


def predictions(results: Sequence[Result]) -> dict[str, dict[str, str]]:
  """Returns the chosen letters by subject and id, as C-Eval's site expects."""
  return {
    x.subject: {
      id: letter for id, letter in zip(x.ids, x.chosen, strict=True) if letter
    }
    for x in results
  }


def table(exam: exams.Exam, shown: Mapping[str, Any]) -> str:
  """Returns a `summary` as a Markdown table, in per cent.

  Each subject is listed once, below the first category that has it.
  """
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
