"""Asked to the letter as by the authors' program."""

import json

import pytest

from fedjax_llm.evaluation import exams, mmlu

MMLU_PROMPT = """\
The following are multiple choice questions (with answers) about  \
us foreign policy.

What is
1 + 1?
A. 1
B. 2
C. 0.50
D. None
Answer: B

Which is "so"?
A. a, b
B. NA
C. 
D. d
Answer: D

And now?
A. e
B. f
C. g
D. h
Answer:"""


@pytest.mark.parametrize("layout", range(3), ids=["folders", "zip", "in"])
def test_prompts_of_mmlu_are_the_authors(folders, prompts, layout):
  (paper,) = exams.papers(
    mmlu.EXAM,
    folders["mmlu"][layout],
    shots=2,
    subjects=["us_foreign_policy"],
  )
  assert prompts(paper) == [MMLU_PROMPT]
  assert paper.answers == ("A",) and paper.ids == ("0",)
  assert [mmlu.EXAM.answer(x) for x in "AD"] == [" A", " D"]


def test_categories_are_the_published_ones():
  count = {name: len(x) for name, x in mmlu.EXAM.groups.items()}
  assert len(mmlu.EXAM.subjects) == 57
  assert count == {
    "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14
  }  # fmt: skip


@pytest.mark.parametrize("split, size", {"val": 1531, "test": 14042}.items())
def test_the_real_files_have_all_questions(data, split, size):
  papers = exams.papers(mmlu.EXAM, data / "mmlu", split=split)
  assert len(papers) == 57
  assert sum(len(x.questions) for x in papers) == size
  assert {len(x.shots) for x in papers} == {5}
  assert {letter for x in papers for letter in x.answers} == set("ABCD")


def test_real_categories_are_those_of_others(data):
  # LLaMA-Factory's, which writes the categories otherwise.
  mapping = json.loads((data / "mmlu" / "mapping.json").read_text())
  for category, subjects in mmlu.GROUPS.items():
    named = {
      x
      for x, row in mapping.items()
      if row["category"].lower() == category.lower()
    }
    assert set(subjects) == named
