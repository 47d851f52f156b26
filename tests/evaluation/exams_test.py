"""Questions are read and asked to the letter as by the authors' programs."""

import csv
import zipfile

import pytest

from fedjax_llm.evaluation import ceval, exams, mmlu

datasets = pytest.importorskip("datasets")

# Quotes, commas, line breaks and what a parser may take for a missing value.
ROWS = {
  "dev": [
    ["What is\n1 + 1?", "1", "2", "0.50", "None", "B"],
    ['Which is "so"?', "a, b", "NA", "", "d", "D"],
  ],
  "val": [["Why?", "w", "x", "y", "z", "C"], ["Who?", "1", "2", "3", "4", "A"]],
  "test": [["And now?", "e", "f", "g", "h", "A"]],
}
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


def write(folder, exam, subject):
  """The files of one subject, as the authors have them."""
  for split, rows in ROWS.items():
    (folder / split).mkdir(parents=True)
    with (folder / split / f"{subject}_{split}.csv").open(
      "w", encoding="utf-8", newline=""
    ) as file:
      writer = csv.writer(file)
      if exam is mmlu.EXAM:
        writer.writerows(rows)
        continue
      told = [] if split == "test" else ["answer"]
      extra = ["explanation"] if split == "dev" else []
      writer.writerow(["id", "question", *"ABCD", *told, *extra])
      for number, row in enumerate(rows):
        answer = row[5:] if told else []
        writer.writerow([number, *row[:5], *answer, *(["so"] if extra else [])])


@pytest.fixture
def folders(tmp_path):
  """By name: the files in folders, in a zip, and the zip's folder."""
  (tmp_path / "zipped").mkdir()
  made = {}
  for exam, subject, inner in (
    (mmlu.EXAM, "us_foreign_policy", "data"),
    (ceval.EXAM, "computer_network", "."),
  ):
    folder = tmp_path / exam.name
    write(folder / inner, exam, subject)
    archive = tmp_path / "zipped" / f"{exam.name}.zip"
    with zipfile.ZipFile(archive, "w") as file:
      for path in sorted(folder.rglob("*")):
        file.write(path, path.relative_to(folder))
    made[exam.name] = [folder, archive, tmp_path / "zipped"]
  return made


def prompts(paper):
  head = paper.header + "".join(paper.shots)
  return [head + question for question in paper.questions]


@pytest.mark.parametrize("layout", range(3), ids=["folders", "zip", "in"])
def test_prompts_of_mmlu_are_the_authors(folders, layout):
  (paper,) = exams.papers(
    mmlu.EXAM,
    folders["mmlu"][layout],
    shots=2,
    subjects=["us_foreign_policy"],
  )
  assert prompts(paper) == [MMLU_PROMPT]
  assert paper.answers == ("A",) and paper.ids == ("0",)
  assert [mmlu.EXAM.answer(x) for x in "AD"] == [" A", " D"]


@pytest.mark.parametrize("layout", range(3), ids=["folders", "zip", "in"])
def test_prompts_of_c_eval_are_the_authors(folders, layout):
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """The exams in the cache of `datasets`, as a download leaves them there.

  With the hub's columns and splits, as cais/mmlu and ceval/ceval-exam have
  them.
  """
  names = {"dev": "dev", "val": "validation", "test": "test"}
  splits = {
    "mmlu": {
      names[split]: [
        {
          "question": text,
          "subject": "us_foreign_policy",
          "choices": choices,
          "answer": "ABCD".index(answer),
        }
        for text, *choices, answer in rows
      ]
      for split, rows in ROWS.items()
    },
    "ceval-exam": {
      split: [
        dict(zip(["id", "question", *"ABCD", "answer"], [i, *row], strict=True))
        | {"explanation": ""}
        for i, row in enumerate(rows)
      ]
      for split, rows in ROWS.items()
    },
  }
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
  for owner, name, subject in (
    ("cais", "mmlu", "us_foreign_policy"),
    ("ceval", "ceval-exam", "computer_network"),
  ):
    repository = tmp_path / "repositories" / name
    for split, rows in splits[name].items():
      file = repository / subject / f"{split}-00000-of-00001.parquet"
      datasets.Dataset.from_list(rows).to_parquet(file)
    (repository / "README.md").write_text(
      f"---\nconfigs:\n- config_name: {subject}\n  data_files:\n"
      + "".join(
        f"  - split: {split}\n    path: {subject}/{split}-*\n"
        for split in splits[name]
      )
      + "---\n"
    )
    datasets.load_dataset(str(repository), subject)
    cached = tmp_path / "cache" / name
    cached.rename(cached.with_name(f"{owner}___{name}"))


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


def test_categories_are_the_published_ones():
  count = lambda exam: {name: len(x) for name, x in exam.groups.items()}
  assert len(ceval.EXAM.subjects) == 52
  assert count(ceval.EXAM) == {
    "STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11, "Hard": 8
  }  # fmt: skip
  assert set(ceval.HARD) <= set(ceval.GROUPS["STEM"])
  assert ceval.CHINESE.keys() == set(ceval.EXAM.subjects)
  assert len(mmlu.EXAM.subjects) == 57
  assert count(mmlu.EXAM) == {
    "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14
  }  # fmt: skip


@pytest.mark.parametrize(
  "exam, sizes",
  [
    (ceval.EXAM, {"val": 1346, "test": 12342}),
    (mmlu.EXAM, {"val": 1531, "test": 14042}),
  ],
  ids=["ceval", "mmlu"],
)
def test_the_real_files_have_all_questions_and_categories(data, exam, sizes):
  for split, size in sizes.items():
    papers = exams.papers(exam, data / exam.name, split=split)
    assert len(papers) == len(exam.subjects)
    assert sum(len(x.questions) for x in papers) == size
    assert {len(x.shots) for x in papers} == {5}
    letters = {letter for x in papers for letter in x.answers}
    told = split == "val" or exam is mmlu.EXAM
    assert letters == (set("ABCD") if told else {""})


def test_real_categories_are_those_of_the_authors(data):
  import json

  mapping = json.loads((data / "ceval" / "subject_mapping.json").read_text())
  for category in ("STEM", "Social Science", "Humanities", "Other"):
    own = {x: row[1] for x, row in mapping.items() if row[2] == category}
    assert set(ceval.GROUPS[category]) == set(own)
    assert {x: ceval.CHINESE[x] for x in own} == own
  # LLaMA-Factory's, which writes the categories otherwise.
  mapping = json.loads((data / "mmlu" / "mapping.json").read_text())
  for category, subjects in mmlu.GROUPS.items():
    named = {
      x
      for x, row in mapping.items()
      if row["category"].lower() == category.lower()
    }
    assert set(subjects) == named


def test_the_first_questions_of_each_subject(folders):
  arguments = dict(shots=0, subjects=["computer_network"], limit=1)
  (paper,) = exams.papers(ceval.EXAM, folders["ceval"][0], **arguments)
  assert paper.shots == () and len(paper.questions) == 1


def test_what_is_not_there_is_refused(folders, tmp_path):
  source = folders["mmlu"][0]
  with pytest.raises(ValueError, match="expected subjects of mmlu, got law"):
    exams.papers(mmlu.EXAM, source, subjects=["law"])
  with pytest.raises(ValueError, match="expected a file"):
    exams.papers(mmlu.EXAM, source, subjects=["anatomy"])
  with pytest.raises(ValueError, match="expected 3 solved questions.*got 2"):
    exams.papers(mmlu.EXAM, source, shots=3, subjects=["us_foreign_policy"])
  with pytest.raises(ValueError, match="limit >= 1"):
    exams.papers(mmlu.EXAM, source, limit=0)
  with pytest.raises(ValueError, match="expected mmlu.zip or its folders"):
    exams.papers(mmlu.EXAM, tmp_path)
