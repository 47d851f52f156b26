"""The files of both exams, as their authors and the hub have them."""

import csv
import zipfile

import pytest

from fedjax_llm.evaluation import ceval, mmlu

# Quotes, commas, line breaks and what a parser may take for a missing value.
ROWS = {
  "dev": [
    ["What is\n1 + 1?", "1", "2", "0.50", "None", "B"],
    ['Which is "so"?', "a, b", "NA", "", "d", "D"],
  ],
  "val": [["Why?", "w", "x", "y", "z", "C"], ["Who?", "1", "2", "3", "4", "A"]],
  "test": [["And now?", "e", "f", "g", "h", "A"]],
}


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
def prompts():
  """What a model is asked, as a whole."""

  def of(paper):
    head = paper.header + "".join(paper.shots)
    return [head + question for question in paper.questions]

  return of


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
  datasets = pytest.importorskip("datasets")
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
