"""The commands on models as functions: merging and talking."""

import json

import jax
import numpy as np
import pytest

from fedjax_llm.cli import evaluate as commands
from fedjax_llm.cli import models
from fedjax_llm.experiments import loading
from fedjax_llm.models import (
  adapters,
  families,
  generation,
  heads,
  lora,
  pretrained,
)


def evaluate(capsys, **arguments):
  commands.evaluate(as_json=True, **arguments)
  return json.loads(capsys.readouterr().out)


def test_a_merged_model_is_the_adapted_one(
  toy_model, toy_adapter, tmp_path, capsys
):
  out, path = tmp_path / "merged", tmp_path / "text.txt"
  path.write_text("7 14 21 28 35")
  models.merge(adapter=toy_adapter, out=out)
  assert f"Model: {out}" in capsys.readouterr().out
  merged = evaluate(capsys, text=path, model=str(out))
  adapted = evaluate(capsys, text=path, adapter=toy_adapter)
  assert merged["loss"] == pytest.approx(adapted["loss"], rel=1e-4)
  base = evaluate(capsys, text=path, model=str(toy_model))
  assert merged["loss"] != pytest.approx(base["loss"], rel=1e-2)
  with pytest.raises(ValueError, match="expected a new or empty folder"):
    models.merge(adapter=toy_adapter, out=out)


def test_a_merged_model_has_the_dtype_of_its_base_unless_told(
  toy_adapter, tmp_path, capsys
):
  for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
    out = tmp_path / expected
    models.merge(adapter=toy_adapter, out=out, dtype=dtype)
    fields = json.loads((out / "config.json").read_text())
    assert fields["dtype"] == expected


def test_chat_shows_what_the_adapter_changes(toy_model, toy_adapter, capsys):
  models.chat(adapter=toy_adapter, prompt="1 2 3", max_new_tokens=6)
  said = capsys.readouterr().out
  config, params = pretrained.load(toy_model)
  tokenizer = loading.load_tokenizer(toy_model)
  settings, factors = adapters.load(toy_adapter, config)
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
  models.chat(model=str(toy_model), max_new_tokens=2)
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
  tokenizer = loading.load_tokenizer(toy_model)
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
  )
  shared = dict(max_new_tokens=1, prompt="12", system="3")
  load = lambda *_: tokenizer
  monkeypatch.setattr(loading, "load_tokenizer", load)
  models.chat(model=str(toy_model), **shared)
  shared.pop("system")
  for template in ("plain", "alpaca", "question"):
    models.chat(model=str(toy_model), template=template, **shared)
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
  message = "expected a language model, got .* of a classifier"
  with pytest.raises(ValueError, match=message):
    models.chat(adapter=str(tmp_path / "classifier"), prompt="1")
  out = tmp_path / "merged"
  models.merge(adapter=str(tmp_path / "classifier"), out=out)
  _, loaded = pretrained.load(out, head=head)
  np.testing.assert_array_equal(
    loaded["score"]["kernel"], trained["score"]["kernel"]
  )


def test_what_is_no_adapter_is_refused(toy_model, tmp_path):
  with pytest.raises(ValueError, match="no/such/adapter"):
    models.chat(model=str(toy_model), adapter="no/such/adapter")
  with pytest.raises(ValueError, match="expected a PEFT adapter"):
    models.chat(adapter=str(toy_model), prompt="1")


def test_an_answer_ends_with_the_end_token_of_the_tokenizer(
  capsys, monkeypatch
):
  ends = []

  def note(*args, eos_ids, **kwargs):
    ends.append(eos_ids)
    return [[]]

  monkeypatch.setattr(generation, "generate", note)
  # Its config.json names no token that ends a text; its tokenizer does.
  models.chat(model=str(pretrained.SHIPPED), prompt="1")
  tokenizer = loading.load_tokenizer(pretrained.SHIPPED)
  assert ends == [[tokenizer.eos_token_id]]
  with pytest.raises(
    ValueError, match="--system expected a tokenizer with a chat"
  ):
    models.chat(model=str(pretrained.SHIPPED), prompt="1", system="2")
