"""Exams of which every question is about a number, sat by a toy model."""

import csv
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.cli import evaluate, sitting
from fedjax_llm.evaluation import ceval, exam_results, exams, mmlu
from fedjax_llm.experiments import loading
from fedjax_llm.models import adapters, decoder, pretrained

SUBJECTS = {"ceval": ("law", "logic"), "mmlu": ("anatomy", "astronomy")}


@pytest.fixture(scope="module")
def long_model(toy_model, tmp_path_factory):
  """The toy model with room for 512 tokens: its folder."""
  folder = tmp_path_factory.mktemp("models") / "long"
  shutil.copytree(toy_model, folder)
  path = folder / "config.json"
  fields = json.loads(path.read_text()) | {"max_position_embeddings": 512}
  path.write_text(json.dumps(fields))
  return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder of both exams' files, three questions a subject and split."""
  folder = tmp_path_factory.mktemp("exams")
  for name, subjects in SUBJECTS.items():
    for split in ("dev", "val", "test"):
      (folder / name / split).mkdir(parents=True)
      for subject in subjects:
        path = folder / name / split / f"{subject}_{split}.csv"
        lines = [
          [f"{n}{len(split)}?", n, n + 1, n + 2, n + 3, "ABCD"[n % 4]]
          for n in range(len(subject), len(subject) + 3)
        ]
        if name == "ceval":
          lines = [[n, *line] for n, line in enumerate(lines)]
          lines.insert(0, ["id", "question", *"ABCD", "answer"])
          if split == "test":
            lines = [line[:-1] for line in lines]
        with path.open("w", newline="") as file:
          csv.writer(file).writerows(lines)
  return folder


@pytest.fixture
def sit(data):
  """Sits an exam: what it comes to, and what people are told."""

  def fn(exam, model, adapter=None, *, batch_size=8, **changes):
    options = {"shots": 1, "subjects": SUBJECTS[exam.name]} | changes
    return sitting.sit(
      exam,
      sitting.Options(**options),
      str(data / exam.name),
      model,
      adapter,
      loading.Settings(jnp.float32, None, batch_size),
    )

  return fn


def test_an_exam_is_what_whole_prompts_say(
  sit, data, toy_adapter, long_model, tmp_path
):
  path = tmp_path / "chosen.json"
  result, _ = sit(mmlu.EXAM, long_model, toy_adapter, predictions=path)
  config, params = pretrained.load(long_model)
  settings, factors = adapters.load(toy_adapter, config)
  apply = jax.jit(decoder.Decoder(config, settings).apply)
  tokenizer = loading.load_tokenizer(pathlib.Path(long_model))
  expected, right = {}, []
  papers = exams.papers(
    mmlu.EXAM, data / "mmlu", shots=1, subjects=SUBJECTS["mmlu"]
  )
  for paper in papers:
    chosen = expected[paper.subject] = {}
    for id, question, answer in zip(
      paper.ids, paper.questions, paper.answers, strict=True
    ):
      ids = tokenizer(paper.header + paper.shots[0] + question)["input_ids"]
      ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
      tokens = np.zeros((1, 256), np.int32)
      tokens[0, : len(ids)] = ids
      logits = apply({"params": params, "lora": factors}, tokens)
      letters = [tokenizer.convert_tokens_to_ids(x) for x in "ABCD"]
      chosen[id] = "ABCD"[int(logits[0, len(ids) - 1, letters].argmax())]
      right.append(chosen[id] == answer)
  assert json.loads(path.read_text()) == expected
  assert result["accuracy"] == pytest.approx(np.mean(right))
  assert (result["split"], result["shots"]) == ("test", 1)
  assert result["subjects"].keys() == set(SUBJECTS["mmlu"])
  # The same by the command line, but for one of the subjects.
  command = [sys.executable, "-m", "fedjax_llm.cli.main", "evaluate"]
  command += ["--adapter", toy_adapter, "--model", long_model, "--json"]
  command += ["--task", "mmlu", "--data", str(data / "mmlu"), "--shots", "1"]
  command += ["--subjects", "anatomy", "--predictions", str(path)]
  shown = subprocess.run(command, capture_output=True, text=True, check=True)
  alone = json.loads(shown.stdout)
  assert alone["task"] == "mmlu"
  assert alone["subjects"] == {"anatomy": result["subjects"]["anatomy"]}
  assert json.loads(path.read_text()) == {"anatomy": expected["anatomy"]}


def test_two_models_are_compared_question_by_question(
  sit, toy_adapter, long_model, tmp_path
):
  sit = lambda *arguments, sit=sit, **changes: sit(
    ceval.EXAM, *arguments, batch_size=2, limit=2, **changes
  )
  right = {}
  for name, adapter in (("adapter", toy_adapter), ("base", None)):
    path = tmp_path / name
    sit(long_model, adapter, predictions=path)
    right[name] = [
      letter == "ABCD"[(len(subject) + int(id)) % 4]
      for subject, letters in json.loads(path.read_text()).items()
      for id, letter in letters.items()
    ]
  result, shown = sit(long_model, toy_adapter, against=long_model)
  against = result["against"]
  pairs = list(zip(right["adapter"], right["base"], strict=True))
  assert len(pairs) == 4
  assert against == {
    "accuracy": np.mean(right["base"]),
    **exam_results.mcnemar(*map(np.array, right.values())),
  }
  assert against["only_first"] == sum(a and not b for a, b in pairs)
  assert f"Against {long_model}" in shown and "McNemar" in shown


def test_a_table_for_people_and_the_questions_without_room(sit, toy_model):
  _, shown = sit(mmlu.EXAM, str(toy_model))
  lines = [line.split("|") for line in shown.splitlines()[2:7]]
  rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
  assert rows == [
    ["all", "", "6", "", "0.0", "0.0"],
    ["STEM", "", "3", "", "0.0", "0.0"],
    ["", "astronomy", "3", "0", "0.0", "0.0"],
    ["other", "", "3", "", "0.0", "0.0"],
    ["", "anatomy", "3", "0", "0.0", "0.0"],
  ]
  assert "6 questions have no room in the context" in shown


def test_predictions_are_all_that_comes_of_unknown_answers(
  sit, long_model, tmp_path
):
  path = tmp_path / "submission.json"
  result, shown = sit(ceval.EXAM, long_model, split="test", predictions=path)
  assert result == {"split": "test", "shots": 1, "predictions": 6}
  assert shown == f"Predictions: {path}"
  written = json.loads(path.read_text())
  assert written.keys() == set(SUBJECTS["ceval"])
  for letters in written.values():
    assert list(letters) == ["0", "1", "2"]
    assert set(letters.values()) <= set("ABCD")
  for changes in ({}, {"predictions": path, "against": long_model}):
    with pytest.raises(ValueError, match="expected --predictions FILE and no"):
      sit(ceval.EXAM, long_model, split="test", **changes)


def test_what_would_end_an_exam_is_refused_before_it(
  sit, long_model, tmp_path, monkeypatch
):
  answered = []
  monkeypatch.setattr(
    sitting.multiple_choice, "scores", lambda *_, **__: answered.append(1)
  )
  (tmp_path / "run.json").write_text("{}")
  for changes, message in (
    ({"predictions": tmp_path / "no" / "p.json"}, "folder does not exist"),
    ({"against": str(tmp_path)}, "expected a finished run"),
  ):
    with pytest.raises(ValueError, match=message):
      sit(mmlu.EXAM, long_model, **changes)
  assert not answered


def test_subjects_may_be_named_in_chinese(data, long_model, monkeypatch):
  seen = []
  papers = exams.papers

  def spy(*arguments, **changes):
    seen.extend(papers(*arguments, **changes))
    return seen

  monkeypatch.setattr(exams, "papers", spy)
  evaluate.evaluate(
    long_model,
    task="ceval",
    data=str(data / "ceval"),
    exam=sitting.Options(
      shots=0, subjects=SUBJECTS["ceval"], limit=1, chinese_names=True
    ),
  )
  assert [x.header[7:] for x in seen] == [
    f"{ceval.CHINESE[x]}考试的单项选择题，请选出其中的正确答案。\n\n"
    for x in SUBJECTS["ceval"]
  ]
