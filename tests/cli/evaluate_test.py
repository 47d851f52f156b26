"""`evaluate` as a function; exams are in `sitting_test`."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.cli import evaluate as commands
from fedjax_llm.cli import sitting
from fedjax_llm.data import batches
from fedjax_llm.experiments import loading
from fedjax_llm.models import (
  adapters,
  decoder,
  families,
  heads,
  language,
  lora,
  pretrained,
)


def evaluate(capsys, **arguments):
  commands.evaluate(as_json=True, **arguments)
  return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("count", [10, 100], ids=["one pass", "windows"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_evaluate_is_the_mean_over_all_predicted_tokens(
  toy_model, toy_adapter, tmp_path, capsys, count, adapted
):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(count))))
  config, params = pretrained.load(toy_model)
  tokenizer = loading.load_tokenizer(toy_model)
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
  evaluator = commands.likelihood.evaluator

  def spy(score_fn, rows: batches.Examples, **options):
    seen.append(rows.tokens.shape)
    return evaluator(score_fn, rows, **options)

  monkeypatch.setattr(commands.likelihood, "evaluator", spy)
  (tmp_path / "text.txt").write_text("1")
  commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
  assert seen == [(1, 2)]


def test_evaluate_prints_lines_for_people(toy_model, tmp_path, capsys):
  (tmp_path / "text.txt").write_text("1 2 3")
  commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
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
    commands.evaluate(model=str(toy_model), text=path)


def test_windows_are_as_long_as_asked_for(toy_model, tmp_path, capsys):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(30))))
  whole = evaluate(capsys, model=str(toy_model), text=path)
  parts = evaluate(capsys, model=str(toy_model), text=path, sequence_length=4)
  assert whole["tokens"] == parts["tokens"]
  assert whole["loss"] != parts["loss"]
  with pytest.raises(ValueError, match="at most 32"):
    evaluate(capsys, model=str(toy_model), text=path, sequence_length=33)


def test_a_run_is_what_it_has_exported(
  toy_model, toy_adapter, tmp_path, capsys
):
  path, run = tmp_path / "text.txt", tmp_path / "run"
  path.write_text("1 2 3 4 5")
  shutil.copytree(toy_adapter, run / "adapter")
  (run / "run.json").write_text("{}")
  commands.evaluate(str(run), text=path, as_json=True)
  told = json.loads(capsys.readouterr().out)
  assert told == evaluate(capsys, text=path, adapter=toy_adapter)
  with pytest.raises(ValueError, match="expected one model"):
    commands.evaluate(str(toy_model), model=str(toy_model))
  with pytest.raises(ValueError, match="expected RUN or --adapter"):
    commands.evaluate(str(run), adapter=toy_adapter)


def test_options_of_other_tasks_are_refused(toy_model, tmp_path):
  for arguments, message in (
    (dict(exam=sitting.Options(shots=1)), "perplexity expected no options"),
    (dict(data="rows.jsonl"), "perplexity expected --text FILE"),
    (
      dict(task="mmlu", exam=sitting.Options(chinese_names=True)),
      "--chinese-names expected task ceval",
    ),
    (dict(task="mmlu", text=tmp_path / "text.txt"), "mmlu expected --data"),
  ):
    with pytest.raises(ValueError, match=message):
      commands.evaluate(str(toy_model), **arguments)


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
  tokenizer = loading.load_tokenizer(toy_model)
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
  call = lambda **arguments: commands.evaluate(
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
    commands.evaluate(adapter=classifier, text=tmp_path / "text.txt")
