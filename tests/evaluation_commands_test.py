"""`evaluate` as a function: perplexity, exams, classification."""

import csv
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import cli, evaluation_commands, examination, tasks
from fedjax_llm.data import batches
from fedjax_llm.evaluation import ceval, exam_results, exams, mmlu
from fedjax_llm.models import (
  adapters,
  decoder,
  families,
  heads,
  language,
  lora,
  pretrained,
)

SUBJECTS = {"ceval": ("law", "logic"), "mmlu": ("anatomy", "astronomy")}


def evaluate(capsys, **arguments):
  evaluation_commands.evaluate(as_json=True, **arguments)
  return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("count", [10, 100], ids=["one pass", "windows"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_evaluate_is_the_mean_over_all_predicted_tokens(
  toy_model, toy_adapter, tmp_path, capsys, count, adapted
):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(count))))
  config, params = pretrained.load(toy_model)
  tokenizer = tasks.load_tokenizer(toy_model)
  ids = jnp.array(tokenizer(path.read_text())["input_ids"])
  settings, factors = (
    adapters.load(toy_adapter, config) if adapted else (None, None)
  )
  variables = {"params": params} | ({"lora": factors} if adapted else {})
  apply = jax.jit(decoder.Decoder(config, settings).apply)
  total, context = 0.0, config.max_position_embeddings
  for start in range(0, len(ids) - 1, context):
    window = ids[None, start : start + context + 1]
    logits = apply(variables, window[:, :-1])
    total += language.token_losses(logits, window[:, 1:]).sum()
  result = evaluate(
    capsys,
    model=str(toy_model),
    text=path,
    adapter=toy_adapter if adapted else None,
  )
  assert result["task"] == "perplexity"
  assert result["tokens"] == len(ids) - 1
  assert (result["tokens"] > context) == (count == 100)
  assert result["loss"] == pytest.approx(
    float(total) / (len(ids) - 1), rel=1e-5
  )


def test_a_short_text_does_not_cost_the_whole_context(
  toy_model, tmp_path, monkeypatch
):
  seen = []
  evaluator = evaluation_commands.likelihood.evaluator

  def spy(score_fn, rows: batches.Examples, **options):
    seen.append(rows.tokens.shape)
    return evaluator(score_fn, rows, **options)

  monkeypatch.setattr(evaluation_commands.likelihood, "evaluator", spy)
  (tmp_path / "text.txt").write_text("1")
  evaluation_commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
  assert seen == [(1, 2)]


def test_evaluate_prints_lines_for_people(toy_model, tmp_path, capsys):
  (tmp_path / "text.txt").write_text("1 2 3")
  evaluation_commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
  names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
  assert names == ["loss", "perplexity", "accuracy", "tokens"]


@pytest.mark.parametrize(
  "content, message",
  [(None, "expected a file"), (b"", "got none"), (b"\xff\xfe\x00", "utf-8")],
  ids=["missing", "empty", "binary"],
)
def test_evaluate_refuses_what_is_no_text(
  toy_model, tmp_path, content, message
):
  path = pathlib.Path(tmp_path / "text.txt")
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    evaluation_commands.evaluate(model=str(toy_model), text=path)


def test_the_base_model_is_the_one_that_the_adapter_names(
  toy_model, toy_adapter, tmp_path, capsys
):
  path = tmp_path / "text.txt"
  path.write_text("1 2 3 4 5")
  named = evaluate(capsys, text=path, adapter=toy_adapter)
  told = evaluate(capsys, text=path, adapter=toy_adapter, model=str(toy_model))
  assert named == told
  with pytest.raises(ValueError, match="expected --model, --adapter or both"):
    evaluation_commands.evaluate(text=path)


def test_windows_are_as_long_as_asked_for(toy_model, tmp_path, capsys):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(30))))
  whole = evaluate(capsys, model=str(toy_model), text=path)
  parts = evaluate(capsys, model=str(toy_model), text=path, sequence_length=4)
  assert whole["tokens"] == parts["tokens"]
  assert whole["loss"] != parts["loss"]
  with pytest.raises(ValueError, match="at most 32"):
    evaluate(capsys, model=str(toy_model), text=path, sequence_length=33)


# Exams, of which every question is about a number.


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
def run(toy_adapter, tmp_path_factory):
  """A finished run, as far as evaluation sees it."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  shutil.copytree(toy_adapter, folder / "adapter")
  (folder / "run.json").write_text("{}")
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


def options(name="mmlu", **changes):
  return examination.Options(
    **{"shots": 1, "subjects": SUBJECTS[name]} | changes
  )


def test_an_exam_of_a_run_is_what_whole_prompts_say(
  data, run, toy_adapter, long_model, tmp_path, capsys
):
  path = tmp_path / "chosen.json"
  arguments = dict(task="mmlu", data=str(data / "mmlu"), model=long_model)
  evaluation_commands.evaluate(
    run, as_json=True, exam=options(predictions=path), **arguments
  )
  result = json.loads(capsys.readouterr().out)
  config, params = pretrained.load(long_model)
  settings, factors = adapters.load(toy_adapter, config)
  apply = jax.jit(decoder.Decoder(config, settings).apply)
  tokenizer = tasks.load_tokenizer(pathlib.Path(long_model))
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
  assert (result["task"], result["split"], result["shots"]) == (
    "mmlu", "test", 1
  )  # fmt: skip
  assert result["subjects"].keys() == set(SUBJECTS["mmlu"])
  # The same by the command line, but for one of the subjects.
  cli._command(
    ["evaluate", "--adapter", toy_adapter, "--model", long_model, "--json"]
    + ["--task", "mmlu", "--data", str(data / "mmlu"), "--shots", "1"]
    + ["--subjects", "anatomy", "--predictions", str(path)]
  )
  alone = json.loads(capsys.readouterr().out)["subjects"]
  assert alone == {"anatomy": result["subjects"]["anatomy"]}
  assert json.loads(path.read_text()) == {"anatomy": expected["anatomy"]}


def test_two_models_are_compared_question_by_question(
  data, run, long_model, tmp_path, capsys
):
  arguments = dict(task="ceval", data=str(data / "ceval"), batch_size=2)
  right = {}
  for name, given in (("run", (run, long_model)), ("base", (long_model, None))):
    path = tmp_path / name
    evaluation_commands.evaluate(
      given[0],
      model=given[1],
      exam=options("ceval", predictions=path, limit=2),
      **arguments,
    )
    chosen = json.loads(path.read_text())
    right[name] = [
      letter == "ABCD"[(len(subject) + int(id)) % 4]
      for subject, letters in chosen.items()
      for id, letter in letters.items()
    ]
  capsys.readouterr()
  evaluation_commands.evaluate(
    run,
    model=long_model,
    as_json=True,
    exam=options("ceval", limit=2, against=long_model),
    **arguments,
  )
  against = json.loads(capsys.readouterr().out)["against"]
  pairs = list(zip(right["run"], right["base"], strict=True))
  assert len(pairs) == 4
  assert against == {
    "accuracy": np.mean(right["base"]),
    **exam_results.mcnemar(*map(np.array, right.values())),
  }
  assert against["only_first"] == sum(a and not b for a, b in pairs)


def test_a_table_for_people_and_the_questions_without_room(
  data, toy_model, capsys
):
  evaluation_commands.evaluate(
    str(toy_model), task="mmlu", data=str(data / "mmlu"), exam=options()
  )
  shown = capsys.readouterr().out
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
  data, long_model, tmp_path, capsys
):
  path = tmp_path / "submission.json"
  arguments = dict(task="ceval", data=str(data / "ceval"))
  result = evaluate(
    capsys,
    model=long_model,
    exam=options("ceval", split="test", predictions=path),
    **arguments,
  )
  assert result == {
    "task": "ceval",
    "split": "test",
    "shots": 1,
    "predictions": 6,
  }
  written = json.loads(path.read_text())
  assert written.keys() == set(SUBJECTS["ceval"])
  for letters in written.values():
    assert list(letters) == ["0", "1", "2"]
    assert set(letters.values()) <= set("ABCD")
  with pytest.raises(ValueError, match="expected --predictions FILE"):
    evaluation_commands.evaluate(
      long_model, exam=options("ceval", split="test"), **arguments
    )


def test_a_run_is_what_it_has_exported(toy_model, run, tmp_path):
  with pytest.raises(ValueError, match="expected one model"):
    evaluation_commands.evaluate(str(toy_model), model=str(toy_model))
  with pytest.raises(ValueError, match="expected RUN or --adapter"):
    evaluation_commands.evaluate(run, adapter=run)
  (tmp_path / "run.json").write_text("{}")
  with pytest.raises(ValueError, match="expected a finished run"):
    evaluation_commands.evaluate(str(tmp_path))


def test_subjects_may_be_named_in_chinese(
  data, long_model, monkeypatch, capsys
):
  seen = []
  papers = exams.papers

  def spy(*arguments, **changes):
    seen.extend(papers(*arguments, **changes))
    return seen

  monkeypatch.setattr(exams, "papers", spy)
  evaluation_commands.evaluate(
    long_model,
    task="ceval",
    data=str(data / "ceval"),
    exam=options("ceval", shots=0, limit=1, chinese_names=True),
  )
  assert [x.header[7:] for x in seen] == [
    f"{ceval.CHINESE[x]}考试的单项选择题，请选出其中的正确答案。\n\n"
    for x in SUBJECTS["ceval"]
  ]


def test_options_of_other_tasks_are_refused(toy_model, tmp_path):
  for arguments, message in (
    (dict(exam=options()), "perplexity is no exam"),
    (dict(data="rows.jsonl"), "perplexity expected --text FILE"),
    (dict(task="mmlu", text=tmp_path / "text.txt"), "mmlu expected --data"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluation_commands.evaluate(str(toy_model), **arguments)


# Classification.


@pytest.fixture(scope="module")
def classifier(toy_model, tmp_path_factory):
  """An adapter with a head of three labels, far from its start: its folder.

  Beside it, with names of the labels, is the same without, "unnamed".
  """
  config = families.read_config(toy_model)
  head = heads.Classifier(3, "mean", names=("one", "two", "three"))
  settings = lora.LoRA(rank=2)
  trained = lora.init(families.model(config, settings, head), jax.random.key(0))
  generator = np.random.default_rng(0)
  trained = jax.tree.map(
    lambda x: x + generator.standard_normal(x.shape, np.float32), trained
  )
  folder = tmp_path_factory.mktemp("adapters")
  shared = dict(config=config, base_model=str(toy_model))
  for name, saved in (
    ("classifier", head),
    ("unnamed", heads.Classifier(3, "mean")),
  ):
    adapters.save(folder / name, trained, settings, head=saved, **shared)
  return str(folder / "classifier")


def test_a_classifier_is_evaluated_on_labelled_texts(
  toy_model, classifier, tmp_path, capsys
):
  texts = ["1 2 3", "4", "", "5 6 7 8 9 10 11"]
  labels = ["three", "one", "one", "two"]
  lines = [
    json.dumps({"said": text, "class": label})
    for text, label in zip(texts, labels, strict=True)
  ]
  (tmp_path / "rows.jsonl").write_text("\n".join(lines))
  result = evaluate(
    capsys,
    task="classification",
    adapter=classifier,
    data=str(tmp_path / "rows.jsonl"),
    text_column="said",
    label_column="class",
  )
  config, params = pretrained.load(toy_model)
  settings, trained = adapters.load(classifier, config)
  head = adapters.head_of(classifier, trained)
  apply = jax.jit(families.model(config, settings, head).apply)
  tokenizer = tasks.load_tokenizer(toy_model)
  losses, right = [], []
  for text, label in zip(texts, labels, strict=True):
    if text:
      ids = tokenizer(text)["input_ids"]
      rows = np.zeros((2, 1, 32), np.int32)
      rows[:, 0, : len(ids)] = ids, [1] * len(ids)
      (scores,) = np.asarray(apply({"params": params, "lora": trained}, *rows))
      number = head.names.index(label)
      losses.append(np.log(np.exp(scores).sum()) - scores[number])
      right.append(scores.argmax() == number)
  assert (result["rows"], result["without_text"]) == (3, 1)
  assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
  assert result["accuracy"] == pytest.approx(np.mean(right))
  # Numbers are those of the head, though not all of them occur.
  numbered = tmp_path / "numbers.jsonl"
  numbered.write_text(
    '{"text": "1 2 3", "label": 2}\n{"text": "5 6 7 8 9 10 11", "label": 1}'
  )
  result = evaluate(
    capsys,
    task="classification",
    adapter=str(pathlib.Path(classifier).parent / "unnamed"),
    data=str(numbered),
  )
  assert result["loss"] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-4)


def test_what_does_not_classify_is_refused(toy_model, classifier, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"text": "1", "label": "four"}')
  call = lambda **arguments: evaluation_commands.evaluate(
    task="classification", **arguments
  )
  with pytest.raises(ValueError, match="expected --data"):
    call(adapter=classifier)
  with pytest.raises(ValueError, match="expected the adapter of a classifier"):
    call(model=str(toy_model), data=str(rows))
  with pytest.raises(ValueError, match="four"):
    call(adapter=classifier, data=str(rows))
  with pytest.raises(ValueError, match="whose task is classification"):
    (tmp_path / "text.txt").write_text("1 2")
    evaluation_commands.evaluate(adapter=classifier, text=tmp_path / "text.txt")
