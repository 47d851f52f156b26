"""Scores on a shared cache are those of whole prompts, here and in torch."""

import csv
import dataclasses
import io
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.cli import evaluate, sitting
from fedjax_llm.evaluation import ceval, mmlu, multiple_choice
from fedjax_llm.experiments import loading
from fedjax_llm.models import decoder, gpt2, lora

BASE = decoder.DecoderConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=8,
  max_position_embeddings=256,
)
WINDOW = {"model_type": "mistral", "sliding_window": 5}
MODELS = {
  "llama": decoder.Decoder(BASE),
  "window": decoder.Decoder(
    dataclasses.replace(BASE, windowed=(True, False), **WINDOW),
    lora.LoRA(rank=2),
  ),
  "gpt2": gpt2.GPT2(
    gpt2.GPT2Config(
      vocab_size=300,
      hidden_size=16,
      num_hidden_layers=2,
      num_attention_heads=2,
      max_position_embeddings=70,
    )
  ),
}
CHOICES = [3, 50, 120, 7]
# Questions of several lengths, of which one is nothing but its last token.
GROUPS = [
  multiple_choice.Group(
    shots,
    numbers,
    list(range(10, 10 + prefix)),
    [
      [(7 * number + place) % 300 for place in range(length)]
      for number, length in zip(numbers, lengths, strict=True)
    ],
  )
  for shots, numbers, prefix, lengths in (
    (2, (0, 3, 4, 1), 25, (9, 33, 1, 20)),
    (1, (2,), 0, (40,)),
  )
]


def variables(model):
  """Random parameters and factors, all of them far from zero."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  generator = np.random.default_rng(0)
  noise = lambda x: 0.3 * generator.standard_normal(x.shape, np.float32)
  return jax.tree.map(noise, shapes)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_whole_prompts(name):
  model = MODELS[name]
  made = variables(model)
  apply = jax.jit(model.apply)
  expected = {}
  for group in GROUPS:
    for number, rest in zip(group.questions, group.rests, strict=True):
      tokens = np.zeros((1, 70), np.int32)
      prompt = group.prefix + rest
      tokens[0, : len(prompt)] = prompt
      expected[number] = apply(made, tokens)[0, len(prompt) - 1, CHOICES]
  scores = multiple_choice.scores(
    model, made["params"], made.get("lora"), GROUPS, CHOICES, batch_size=3
  )
  assert sorted(scores) == [0, 1, 2, 3, 4]
  for number, logits in scores.items():
    np.testing.assert_allclose(logits, expected[number], rtol=1e-4, atol=1e-5)


def test_many_papers_share_a_few_programs():
  model = decoder.Decoder(dataclasses.replace(BASE, num_hidden_layers=1))
  params = variables(model)["params"]
  before = multiple_choice._ask._cache_size()
  for length in (1, 9, 30, 61, 62, 90, 120):
    rests = [[1] * (length + x) for x in range(5)]
    group = multiple_choice.Group(0, (0, 1, 2, 3, 4), [2] * length, rests)
    multiple_choice.scores(model, params, None, [group], [0, 1], batch_size=2)
  assert multiple_choice._ask._cache_size() - before == 2


def test_a_model_that_diverged_chooses_nothing():
  made = variables(MODELS["llama"])
  params = jax.tree.map(lambda x: np.full_like(x, np.nan), made["params"])
  with pytest.raises(FloatingPointError, match="expected finite logits"):
    multiple_choice.scores(
      *(MODELS["llama"], params, made.get("lora"), GROUPS, CHOICES),
      batch_size=3,
    )


def test_tokens_that_the_model_does_not_have_are_refused():
  group = multiple_choice.Group(0, (0,), [1], [[300]])
  with pytest.raises(ValueError, match="token ids below .*, got 300"):
    multiple_choice.scores(MODELS["llama"], {}, None, [group], [0, 1])


def paper(shots, questions):
  count = len(questions)
  return multiple_choice.Paper(
    "sums", "Sums:\n", shots, questions, ("",) * count, ("A",) * count
  )


def test_shots_are_left_out_one_by_one_until_a_prompt_fits(toy_model):
  tokenizer = loading.load_tokenizer(toy_model)
  ids = lambda text: tokenizer(text, verbose=False)["input_ids"]
  end = ids("1")[-1:] == [tokenizer.eos_token_id]
  shots = ("1 2 3\n", "11 12 13 14\n", "21 22\n")
  questions = tuple(
    " ".join(map(str, range(40, 40 + n))) for n in (1, 4, 2, 9, 30, 3)
  )
  context = 24
  expected = {}
  for number, question in enumerate(questions):
    kept = len(shots)
    while kept >= 0:
      prompt = ids("Sums:\n" + "".join(shots[:kept]) + question)
      prompt = prompt[:-1] if end else prompt
      if len(prompt) <= context:
        expected[number] = kept, prompt
        break
      kept -= 1
  groups = multiple_choice.tokenise(
    paper(shots, questions), tokenizer, context=context
  )
  got = {
    number: (group.shots, group.prefix + rest)
    for group in groups
    for number, rest in zip(group.questions, group.rests, strict=True)
  }
  assert got == expected
  assert 4 not in got and len({kept for kept, _ in got.values()}) > 2
  assert all(rest for group in groups for rest in group.rests)


def test_a_token_over_the_border_is_not_cut(toy_model):
  tokenizer = loading.load_tokenizer(toy_model)
  # "5 6" and "5 67" are no prefix of each other where "67" is one token.
  (group,) = multiple_choice.tokenise(
    paper(("5 ",), ("6", "67", "678")), tokenizer, context=32
  )
  for question, rest in zip(("6", "67", "678"), group.rests, strict=True):
    whole = tokenizer("Sums:\n5 " + question)["input_ids"]
    assert (group.prefix + rest) == whole[: len(group.prefix + rest)]


def test_answers_are_told_apart_by_their_last_tokens(toy_model):
  tokenizer = loading.load_tokenizer(toy_model)
  tokens = multiple_choice.choice_tokens([" A", " B"], tokenizer)
  assert tokenizer.convert_ids_to_tokens(tokens) == ["A", "B"]
  with pytest.raises(ValueError, match="last tokens for 'A', 'CA', got"):
    multiple_choice.choice_tokens(["A", "CA"], tokenizer)


# The command on real questions, against a plain loop in torch. A number in
# FEDJAX_LLM_EXAM_LIMIT asks that many questions of every subject.

LIMIT = int(os.environ.get("FEDJAX_LLM_EXAM_LIMIT", 0))


def rows(archive, file, header):
  text = io.StringIO(archive.read(file).decode("utf-8"), newline="")
  lines = list(csv.reader(text))
  # Without the id, and without the explanation.
  return [x[1:7] for x in lines[1:]] if header else lines


def official(data, exam, subject, model, tokenizer, limit, context):
  """The letters that the authors' programs choose, {id: letter}."""
  import torch

  prompts = {
    "mmlu": ("data/", "test", "\nAnswer:", " "),
    "ceval": ("", "val", "\n答案：", ""),
  }
  root, split, ask, space = prompts[exam]
  if exam == "mmlu":
    name = "".join(f" {word}" for word in subject.split("_"))
    header = (
      "The following are multiple choice questions (with answers) about"
      f" {name}.\n\n"
    )
  else:
    header = (
      f"以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
    )

  def example(row, answered):
    text = row[0]
    for letter, option in zip("ABCD", row[1:5], strict=True):
      text += f"\n{letter}. {option}"
    return text + ask + (f"{space}{row[5]}\n\n" if answered else "")

  with zipfile.ZipFile(data / exam / f"{exam}.zip") as archive:
    read = lambda split: rows(
      archive, f"{root}{split}/{subject}_{split}.csv", exam == "ceval"
    )
    dev, asked = read("dev")[:5], read(split)[:limit]
  answers = [
    tokenizer.encode(space + x, add_special_tokens=False)[-1] for x in "ABCD"
  ]
  result = {}
  for number, row in enumerate(asked):
    shots = 5
    while True:
      prompt = header + "".join(example(x, True) for x in dev[:shots])
      ids = tokenizer(prompt + example(row, False), verbose=False).input_ids
      if len(ids) <= context or not shots:
        break
      shots -= 1
    if len(ids) > context:
      continue
    with torch.no_grad():
      logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    result[str(number)] = "ABCD"[int(logits[answers].argmax())]
  return result


@pytest.fixture(scope="module")
def random_llama(data, tmp_path_factory):
  """A random Llama of 4,096 positions with GPT-2's tokenizer: its folder."""
  torch = pytest.importorskip("torch", reason="the oracle needs torch")
  import transformers

  folder = tmp_path_factory.mktemp("models") / "random_llama"
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=50257,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.3,
    tie_word_embeddings=True,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  tokenizer = data / "gpt2_tokenizer"
  transformers.GPT2Tokenizer.from_pretrained(tokenizer).save_pretrained(folder)
  return folder


@pytest.mark.oracle
@pytest.mark.parametrize(
  "exam, subjects, limit, context",
  [
    ("mmlu", ("high_school_us_history", "abstract_algebra"), 6, None),
    ("ceval", ("law", "computer_network"), 4, None),
    ("mmlu", ("global_facts",), 12, 512),  # Of stories260k.
  ],
  ids=["mmlu", "ceval", "trained"],
)
def test_every_answer_is_that_of_transformers(
  data, request, tmp_path, exam, subjects, limit, context
):
  pytest.importorskip("torch", reason="the oracle needs torch")
  import transformers

  folder = data / "stories260k"
  if context is None:
    folder = request.getfixturevalue("random_llama")
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  most = context or (2048 if exam == "mmlu" else 4096)
  if LIMIT:
    limit, subjects = LIMIT, {"ceval": ceval, "mmlu": mmlu}[exam].EXAM.subjects
  expected = {
    subject: official(data, exam, subject, model, tokenizer, limit, most)
    for subject in subjects
  }
  evaluate.evaluate(
    str(folder),
    task=exam,
    data=str(data / exam),
    exam=sitting.Options(
      subjects=subjects, limit=limit, predictions=tmp_path / "chosen.json"
    ),
  )
  assert json.loads((tmp_path / "chosen.json").read_text()) == expected
  count = sum(map(len, expected.values()))
  assert count >= 8
  print(f"\n{exam}: all {count} answers agree.")
