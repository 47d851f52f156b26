"""Questions are read from files, zips and the hub; what is not there is not."""

import pytest

from fedjax_llm.evaluation import ceval, exams, mmlu


def test_rows_of_the_hub_make_the_same_papers(folders, hub):
  for exam, subject in (
    (mmlu.EXAM, "us_foreign_policy"),
    (ceval.EXAM, "computer_network"),
  ):
    arguments = dict(shots=2, split="val", subjects=[subject])
    assert exams.papers(exam, **arguments) == exams.papers(
      exam, folders[exam.name][0], **arguments
    )
  with pytest.raises(ValueError, match="on the hub.*or cached.*anatomy"):
    exams.papers(mmlu.EXAM, subjects=["anatomy"])


def test_the_first_questions_of_each_subject(folders):
  arguments = dict(shots=0, subjects=["computer_network"], limit=1)
  (paper,) = exams.papers(ceval.EXAM, folders["ceval"][0], **arguments)
  assert paper.shots == () and len(paper.questions) == 1


def test_what_is_not_there_is_refused(folders, tmp_path):
  source = folders["mmlu"][0]
  with pytest.raises(ValueError, match="expected subjects of mmlu, got law"):
    exams.papers(mmlu.EXAM, source, subjects=["law"])
  with pytest.raises(ValueError, match="expected each subject once"):
    exams.papers(mmlu.EXAM, source, subjects=["us_foreign_policy"] * 2)
  with pytest.raises(ValueError, match="expected a file"):
    exams.papers(mmlu.EXAM, source, subjects=["anatomy"])
  with pytest.raises(ValueError, match="expected 3 solved questions.*got 2"):
    exams.papers(mmlu.EXAM, source, shots=3, subjects=["us_foreign_policy"])
  with pytest.raises(ValueError, match="limit >= 1, got"):
    exams.papers(mmlu.EXAM, source, limit=0)
  with pytest.raises(ValueError, match="expected mmlu.zip or its folders"):
    exams.papers(mmlu.EXAM, tmp_path)
