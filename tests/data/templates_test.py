import importlib.util

import pytest
import transformers

from fedjax_llm.data import templates

CHATML = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{{ message.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Capital of France?"},
  {"role": "assistant", "content": "Paris."},
]


@pytest.fixture
def chatty(gpt2) -> transformers.PreTrainedTokenizerFast:
  """GPT-2's tokenizer with ChatML, whose turns end with the end token."""
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=gpt2.backend_tokenizer, eos_token="<|im_end|>"
  )
  tokenizer.chat_template = CHATML
  return tokenizer


def test_a_plain_text_is_all_answer():
  assert templates.plain("body")({"body": "It rains."}) == (
    "",
    "It rains.",
    True,
  )


def test_alpaca_is_stanfords_with_and_without_context():
  row = {"instruction": "Add.", "input": "1 2", "output": "3"}
  assert templates.alpaca()(row) == (
    "Below is an instruction that describes a task, paired with an input that"
    " provides further context. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n###"
    " Response:",
    "3",
    True,
  )
  alone = (
    "Below is an instruction that describes a task. Write a response that"
    " appropriately completes the request.\n\n### Instruction:\nAdd.\n\n###"
    " Response:",
    "3",
    True,
  )
  assert templates.alpaca()(row | {"input": ""}) == alone
  assert templates.alpaca()(row | {"input": None}) == alone
  dolly = {"instruction": "Add.", "context": "", "response": "3"}
  assert templates.dolly()(dolly) == alone


def test_braces_of_a_row_are_text():
  row = {"instruction": "{context}", "input": "{instruction}", "output": "{}"}
  prompt, answer, _ = templates.alpaca()(row)
  assert "### Instruction:\n{context}\n\n### Input:\n{instruction}\n" in prompt
  assert answer == "{}"


def test_questions_and_answers_are_columns_by_name():
  assert templates.question_answer("q", "a")({"q": "1 + 1?", "a": 2}) == (
    "Question: 1 + 1?\nAnswer:",
    " 2",
    True,
  )


def test_a_missing_column_is_named_with_those_there_are():
  with pytest.raises(ValueError, match="'output', got 'instruction', 'input'"):
    templates.alpaca()({"instruction": "Add.", "input": ""})
  with pytest.raises(ValueError, match="'text', got 'body'"):
    templates.plain()({"body": "It rains."})


def test_chat_is_what_the_tokenizer_writes_up_to_the_end_of_the_turn(chatty):
  prompt, answer, special_tokens = templates.chat(chatty)({"messages": TALK})
  asked = chatty.apply_chat_template(
    TALK[:2], add_generation_prompt=True, tokenize=False
  )
  assert prompt == asked
  assert prompt.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
  assert answer == "Paris.<|im_end|>"
  assert not special_tokens


def test_chat_takes_the_last_answer_or_two_columns(chatty):
  expected = templates.chat(chatty)({"messages": TALK[1:]})
  columns = templates.chat(chatty, messages=None, prompt="q", response="a")
  assert columns({"q": "Capital of France?", "a": "Paris."}) == expected
  thanks = [*TALK[1:], {"role": "user", "content": "Thanks!"}]
  assert templates.chat(chatty)({"messages": thanks}) == expected
  for none in (TALK[:2], [], None):
    assert templates.chat(chatty)({"messages": none}) == ("", "", False)
  assert columns({"q": "Capital of France?", "a": None}) == ("", "", False)


def test_chat_keeps_what_follows_a_turn_that_no_end_token_ends(chatty):
  chatty.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
  assert templates.chat(chatty)({"messages": TALK}).answer == "Paris.<|end|>\n"


def test_chat_says_what_it_lacks(chatty, monkeypatch):
  chatty.chat_template = (
    "{{ messages[-1].content }}{% if add_generation_prompt %}Bot:{% endif %}"
  )
  with pytest.raises(ValueError, match="generation prompt.*'Paris.'"):
    templates.chat(chatty)({"messages": TALK})
  chatty.chat_template = None
  with pytest.raises(ValueError, match="chat template, got none"):
    templates.chat(chatty)
  find = lambda name: None
  monkeypatch.setattr(importlib.util, "find_spec", find)
  with pytest.raises(ImportError, match="pip install jinja2"):
    templates.chat(chatty)
