"""Asked to the letter as by the authors' program."""

import json

import pytest

from fedjax_llm.evaluation import ceval, exams

CEVAL_PROMPT = """\
以下是中国关于computer_network考试的单项选择题，请选出其中的正确答案。

What is
1 + 1?
A. 1
B. 2
C. 0.50
D. None
答案：B

Why?
A. w
B. x
C. y
D. z
答案："""


@pytest.mark.parametrize("layout", range(3), ids=["folders", "zip", "in"])
def test_prompts_of_c_eval_are_the_authors(folders, prompts, layout):
  arguments = dict(shots=1, subjects=["computer_network"])
  source = folders["ceval"][layout]
  (paper,) = exams.papers(ceval.EXAM, source, **arguments)
  assert prompts(paper)[0] == CEVAL_PROMPT
  assert paper.answers == ("C", "A") and paper.ids == ("0", "1")
  assert ceval.EXAM.answer("A") == "A"
  chinese = ceval.exam(chinese_names=True)
  (paper,) = exams.papers(chinese, source, **arguments)
  named = CEVAL_PROMPT.replace("computer_network", "计算机网络")
  assert prompts(paper)[0] == named
  (paper,) = exams.papers(ceval.EXAM, source, split="test", **arguments)
  assert paper.answers == ("",)


def test_categories_are_the_published_ones():
  count = {name: len(x) for name, x in ceval.EXAM.groups.items()}
  assert len(ceval.EXAM.subjects) == 52
  assert count == {
    "STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11, "Hard": 8
  }  # fmt: skip
  assert set(ceval.HARD) <= set(ceval.GROUPS["STEM"])
  assert ceval.CHINESE.keys() == set(ceval.EXAM.subjects)


@pytest.mark.parametrize("split, size", {"val": 1346, "test": 12342}.items())
def test_the_real_files_have_all_questions(data, split, size):
  papers = exams.papers(ceval.EXAM, data / "ceval", split=split)
  assert len(papers) == 52
  assert sum(len(x.questions) for x in papers) == size
  assert {len(x.shots) for x in papers} == {5}
  letters = {letter for x in papers for letter in x.answers}
  # Those of the test questions are not in the zip.
  assert letters == (set("ABCD") if split == "val" else {""})


def test_real_categories_are_those_of_the_authors(data):
  mapping = json.loads((data / "ceval" / "subject_mapping.json").read_text())
  for category in ("STEM", "Social Science", "Humanities", "Other"):
    own = {x: row[1] for x, row in mapping.items() if row[2] == category}
    assert set(ceval.GROUPS[category]) == set(own)
    assert {x: ceval.CHINESE[x] for x in own} == own
