"""Means, errors and tests, by hand."""

import itertools
import math

import numpy as np
import pytest

from fedjax_llm.evaluation import ceval, exam_results, mmlu, multiple_choice


def result(subject, letters, answers):
  ids = tuple(map(str, range(len(letters))))
  shots = (5,) * len(letters)
  return exam_results.Result(
    subject, ids, tuple(letters), tuple(answers), shots
  )


# Right are 1 of 4, 1 of 1, and 1 of 2, of which the other has no answer.
def results(*subjects):
  return [
    result(subjects[0], "AAAA", "ABCD"),
    result(subjects[1], "B", "B"),
    result(subjects[2], ("", "C"), "CC"),
  ]


def test_every_question_of_mmlu_counts_the_same():
  shown = exam_results.summary(
    mmlu.EXAM, results("college_physics", "international_law", "anatomy")
  )
  assert shown["accuracy"] == pytest.approx(3 / 7)
  assert shown["standard_error"] == pytest.approx(math.sqrt(3 / 7 * 4 / 7 / 7))
  assert shown["subject_mean"] == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)
  assert shown["unanswered"] == 1
  assert shown["questions"] == 7
  assert shown["categories"].keys() == {"STEM", "humanities", "other"}
  assert shown["categories"]["STEM"] == {
    "accuracy": 0.25,
    "standard_error": pytest.approx(math.sqrt(0.25 * 0.75 / 4)),
    "questions": 4,
  }


def test_every_subject_of_c_eval_counts_the_same():
  shown = exam_results.summary(
    ceval.EXAM, results("college_physics", "logic", "operating_system")
  )
  assert shown["accuracy"] == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)
  variances = 1 / 4 * 3 / 4 / 4, 0, 1 / 2 * 1 / 2 / 2
  assert shown["standard_error"] == pytest.approx(math.sqrt(sum(variances)) / 3)
  assert shown["question_mean"] == pytest.approx(3 / 7)
  assert shown["categories"]["STEM"]["accuracy"] == pytest.approx(
    (1 / 4 + 1 / 2) / 2
  )
  assert shown["categories"]["Hard"]["accuracy"] == 1 / 4
  assert shown["subjects"]["operating_system"]["shots"] == 5


def test_the_error_is_the_deviation_of_many_exams():
  generator = np.random.default_rng(0)
  chances, sizes = [0.3, 0.8, 0.5], [40, 10, 25]
  for over in ("questions", "subjects"):
    means, errors = [], []
    for _ in range(2000):
      right = [
        generator.random(size) < chance
        for size, chance in zip(sizes, chances, strict=True)
      ]
      found = exam_results.accuracy(right, over)
      means.append(found["accuracy"])
      errors.append(found["standard_error"])
    # That of all questions ignores that subjects differ: it is 9 % too much.
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.12)


def test_answers_that_are_not_told_have_no_accuracy():
  with pytest.raises(ValueError, match="some questions of law"):
    exam_results.summary(ceval.EXAM, [result("law", "AB", ("", ""))])


def by_hand(only_first, only_second):
  """All ways in which the differing questions could have fallen, counted."""
  differing = only_first + only_second
  observed = abs(only_first - only_second)
  ways = itertools.product((0, 1), repeat=differing)
  extreme = [abs(2 * sum(way) - differing) >= observed for way in ways]
  return sum(extreme) / len(extreme)


@pytest.mark.parametrize(
  "only_first, only_second", [(0, 0), (1, 0), (7, 2), (3, 3), (0, 9), (5, 6)]
)
def test_mcnemar_is_exact(only_first, only_second):
  same = [True] * 3 + [False] * 4
  first = np.array([True] * only_first + [False] * only_second + same)
  second = np.array([False] * only_first + [True] * only_second + same)
  found = exam_results.mcnemar(first, second)
  assert found == {
    "only_first": only_first,
    "only_second": only_second,
    "p_value": pytest.approx(by_hand(only_first, only_second)),
  }
  assert exam_results.mcnemar(second, first)["p_value"] == found["p_value"]


def test_models_are_compared_over_all_questions():
  first = results("college_physics", "logic", "operating_system")
  second = [
    result("college_physics", "ABAA", "ABCD"),
    result("logic", "A", "B"),
    result("operating_system", "CC", "CC"),
  ]
  assert exam_results.comparison(ceval.EXAM, first, second) == {
    "accuracy": (2 / 4 + 0 + 1) / 3,
    "only_first": 1,
    "only_second": 2,
    "p_value": 1.0,
  }


def test_the_largest_score_is_the_answer():
  paper = multiple_choice.Paper(
    "law", "", (), ("", "", ""), ("7", "8", "9"), ("D", "A", "B")
  )
  groups = [multiple_choice.Group(3, (2, 0), [], [[1], [2]])]
  scores = {0: np.array([0, 1, 2, 3]), 2: np.array([0, 5, 2, 3])}
  made = exam_results.result(paper, groups, scores)
  assert made.chosen == ("D", "", "B") and made.shots == (3, 0, 3)
  assert made.right.tolist() == [True, False, True]
  assert exam_results.predictions([made]) == {"law": {"7": "D", "9": "B"}}
