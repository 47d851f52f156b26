"""The commands on models as functions: evaluation, merging, talking."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import model_commands, tasks
from fedjax_llm.data import batches
from fedjax_llm.models import (
  adapters,
  decoder,
  families,
  generation,
  heads,
  language,
  lora,
  pretrained,
)


@pytest.fixture(scope="module")
def adapter(toy_model, tmp_path_factory):
  """An adapter that moves the toy model: its folder."""
  config = families.read_config(toy_model)
  settings = lora.LoRA(rank=2, targets=decoder.LINEAR)
  factors = lora.init(decoder.Decoder(config, settings), jax.random.key(0))
  factors = jax.tree.map(lambda x: x + 0.1, factors)
  folder = tmp_path_factory.mktemp("adapter")
  adapters.save(
    folder, factors, settings, config=config, base_model=str(toy_model)
  )
  return str(folder)


def evaluate(capsys, **arguments):
  model_commands.evaluate(as_json=True, **arguments)
  return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("count", [10, 100], ids=["one pass", "windows"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_evaluate_is_the_mean_over_all_predicted_tokens(
  toy_model, adapter, tmp_path, capsys, count, adapted
):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(count))))
  config, params = pretrained.load(toy_model)
  tokenizer = tasks.load_tokenizer(toy_model)
  ids = jnp.array(tokenizer(path.read_text())["input_ids"])
  settings, factors = (
    adapters.load(adapter, config) if adapted else (None, None)
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
    adapter=adapter if adapted else None,
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
  evaluator = model_commands.likelihood.evaluator

  def spy(score_fn, rows: batches.Examples, **options):
    seen.append(rows.tokens.shape)
    return evaluator(score_fn, rows, **options)

  monkeypatch.setattr(model_commands.likelihood, "evaluator", spy)
  (tmp_path / "text.txt").write_text("1")
  model_commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
  assert seen == [(1, 2)]


def test_evaluate_prints_lines_for_people(toy_model, tmp_path, capsys):
  (tmp_path / "text.txt").write_text("1 2 3")
  model_commands.evaluate(model=str(toy_model), text=tmp_path / "text.txt")
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
    model_commands.evaluate(model=str(toy_model), text=path)


def test_the_base_model_is_the_one_that_the_adapter_names(
  toy_model, adapter, tmp_path, capsys
):
  path = tmp_path / "text.txt"
  path.write_text("1 2 3 4 5")
  named = evaluate(capsys, text=path, adapter=adapter)
  told = evaluate(capsys, text=path, adapter=adapter, model=str(toy_model))
  assert named == told
  with pytest.raises(ValueError, match="expected --model, --adapter or both"):
    model_commands.evaluate(text=path)


def test_a_merged_model_is_the_adapted_one(
  toy_model, adapter, tmp_path, capsys
):
  out, path = tmp_path / "merged", tmp_path / "text.txt"
  path.write_text("7 14 21 28 35")
  model_commands.merge(adapter=adapter, out=out)
  assert f"Model: {out}" in capsys.readouterr().out
  merged = evaluate(capsys, text=path, model=str(out))
  adapted = evaluate(capsys, text=path, adapter=adapter)
  assert merged["loss"] == pytest.approx(adapted["loss"], rel=1e-4)
  base = evaluate(capsys, text=path, model=str(toy_model))
  assert merged["loss"] != pytest.approx(base["loss"], rel=1e-2)
  with pytest.raises(ValueError, match="expected a new folder"):
    model_commands.merge(adapter=adapter, out=out)


def test_a_merged_model_has_the_dtype_of_its_base_unless_told(
  adapter, tmp_path, capsys
):
  for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
    out = tmp_path / expected
    model_commands.merge(adapter=adapter, out=out, dtype=dtype)
    fields = json.loads((out / "config.json").read_text())
    assert fields["dtype"] == expected


def test_chat_shows_what_the_adapter_changes(toy_model, adapter, capsys):
  model_commands.chat(adapter=adapter, prompt="1 2 3", max_new_tokens=6)
  said = capsys.readouterr().out
  config, params = pretrained.load(toy_model)
  tokenizer = tasks.load_tokenizer(toy_model)
  settings, factors = adapters.load(adapter, config)
  ids = tokenizer("1 2 3")["input_ids"]
  ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
  expected = ""
  for name, given in (("base", None), ("adapter", factors)):
    network = families.model(config, settings if given else None)
    (answer,) = generation.generate(
      network, params, given, [ids], max_new_tokens=6
    )
    text = tokenizer.decode(answer, skip_special_tokens=True)
    expected += f"{name}: {text}\n"
  assert said == expected


def test_every_line_is_a_prompt(toy_model, capsys, monkeypatch):
  lines = iter(["1 2", "", "3 4"])
  asked = []

  def ask(prompt):
    asked.append(prompt)
    try:
      return next(lines)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr("builtins.input", ask)
  model_commands.chat(model=str(toy_model), max_new_tokens=2)
  assert len(asked) == 4
  assert len(capsys.readouterr().out.rstrip("\n").split("\n")) >= 2


def test_the_chat_template_of_a_tokenizer_is_used(
  toy_model, tmp_path, capsys, monkeypatch
):
  prompts = []

  def note(*args, **kwargs):
    prompts.append(args[3])
    return [[]]

  monkeypatch.setattr(generation, "generate", note)
  tokenizer = tasks.load_tokenizer(toy_model)
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
  )
  shared = dict(max_new_tokens=1, prompt="12", system="3")
  load = lambda *_: tokenizer
  monkeypatch.setattr(tasks, "load_tokenizer", load)
  model_commands.chat(model=str(toy_model), **shared)
  shared.pop("system")
  for template in ("plain", "alpaca", "question"):
    model_commands.chat(model=str(toy_model), template=template, **shared)
  said = [tokenizer.decode(ids[0]).strip() for ids in prompts]
  assert "s 3;u 12;a" in said[0] and said[1].endswith("12")
  assert said[2].endswith("### Instruction:\n12\n\n### Response:")
  assert said[3].endswith("Question: 12\nAnswer:")


def test_a_classifier_has_nothing_to_say(toy_model, tmp_path):
  config, head = families.read_config(toy_model), heads.Classifier(3)
  settings = lora.LoRA(rank=2)
  trained = lora.init(families.model(config, settings, head), jax.random.key(0))
  adapters.save(
    tmp_path / "classifier",
    trained,
    settings,
    config=config,
    base_model=str(toy_model),
    head=head,
  )
  with pytest.raises(ValueError, match="is of a classifier"):
    model_commands.chat(adapter=str(tmp_path / "classifier"), prompt="1")
  out = tmp_path / "merged"
  model_commands.merge(adapter=str(tmp_path / "classifier"), out=out)
  _, loaded = pretrained.load(out, head=head)
  np.testing.assert_array_equal(
    loaded["score"]["kernel"], trained["score"]["kernel"]
  )


def test_what_is_no_adapter_is_refused(toy_model, tmp_path):
  with pytest.raises(ValueError, match="no/such/adapter"):
    model_commands.chat(model=str(toy_model), adapter="no/such/adapter")
  with pytest.raises(ValueError, match="expected a PEFT adapter"):
    model_commands.chat(adapter=str(toy_model), prompt="1")


def test_an_answer_ends_with_the_end_token_of_the_tokenizer(
  capsys, monkeypatch
):
  ends = []

  def note(*args, eos_ids, **kwargs):
    ends.append(eos_ids)
    return [[]]

  monkeypatch.setattr(generation, "generate", note)
  # Its config.json names no token that ends a text; its tokenizer does.
  model_commands.chat(model=str(pretrained.SHIPPED), prompt="1")
  tokenizer = tasks.load_tokenizer(pretrained.SHIPPED)
  assert ends == [[tokenizer.eos_token_id]]
  with pytest.raises(ValueError, match="--system expected a chat template"):
    model_commands.chat(model=str(pretrained.SHIPPED), prompt="1", system="2")


def test_windows_are_as_long_as_asked_for(toy_model, tmp_path, capsys):
  path = tmp_path / "text.txt"
  path.write_text(" ".join(map(str, range(30))))
  whole = evaluate(capsys, model=str(toy_model), text=path)
  parts = evaluate(capsys, model=str(toy_model), text=path, sequence_length=4)
  assert whole["tokens"] == parts["tokens"]
  assert whole["loss"] != parts["loss"]
  with pytest.raises(ValueError, match="at most 32"):
    evaluate(capsys, model=str(toy_model), text=path, sequence_length=33)
