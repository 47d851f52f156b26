"""Templates: functions from a row of a data set to a prompt and an answer.

The factories here take the names of the columns. Any function of the type
`Template` works too. A classifier reads prompt and answer as one text.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import transformers


Row = Mapping[str, Any]

_ALPACA = (
  "Below is an instruction that describes a task{paired}. Write a response that"
  " appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
  "{context}### Response:"
)
_PAIRED = ", paired with an input that provides further context"


class Text(NamedTuple):
  """A prompt and its answer.

  Attributes:
    prompt: the text before the answer; it may be empty.
    answer: the text to learn. It follows the prompt with nothing in between.
    special_tokens: whether the tokenizer adds special tokens before the prompt.
      False if the prompt contains them.
  """

  prompt: str
  answer: str
  special_tokens: bool = True


Template = Callable[[Row], Text]


def plain(column: str = "text") -> Template:
  """Returns a template without a prompt: the whole text is learned."""
  return lambda row: Text("", _text(row, column))


def alpaca(
  instruction: str = "instruction",
  context: str = "input",
  response: str = "output",
) -> Template:
  """Returns the template of Stanford Alpaca.

  It has one prompt for records with further context and one for records without
  (https://github.com/tatsu-lab/stanford_alpaca, `train.py`).

  Args:
    instruction: name of the column with the instruction.
    context: name of the column with the further context, which may be empty.
    response: name of the column with the answer.
  """

  def template(row):
    further = _text(row, context)
    prompt = _ALPACA.format(
      paired=_PAIRED if further else "",
      instruction=_text(row, instruction),
      context=f"### Input:\n{further}\n\n" if further else "",
    )
    return Text(prompt, _text(row, response))

  return template


def dolly() -> Template:
  """Returns `alpaca` for the columns of `databricks/databricks-dolly-15k`."""
  return alpaca("instruction", "context", "response")


def question_answer(
  question: str = "question", answer: str = "answer"
) -> Template:
  """Returns a template with the lines `Question: ...` and `Answer: ...`."""
  return lambda row: Text(
    f"Question: {_text(row, question)}\nAnswer:", f" {_text(row, answer)}"
  )


def chat(
  tokenizer: transformers.PreTrainedTokenizerBase,
  *,
  messages: str | None = "messages",
  prompt: str = "prompt",
  response: str = "response",
  date_string: str = "26 Jul 2024",
) -> Template:
  """Returns the chat template of a tokenizer.

  The last message of the assistant is the answer. It ends with the tokenizer's
  end token; text that the chat template writes after it is left out.

  Args:
    tokenizer: the tokenizer of the model.
    messages: name of the column with lists of `{"role": ..., "content": ...}`.
      Messages after the last one of the assistant are left out. None to use the
      columns `prompt` and `response`.
    prompt: name of the column with the user's message.
    response: name of the column with the assistant's message.
    date_string: date that the chat template writes in place of today's date,
      so that rows do not change from day to day.

  Returns:
    A template. It raises a `ValueError` if the generation prompt of a
    conversation is not the start of the answered conversation.

  Raises:
    ImportError: if Jinja2 is missing.
    ValueError: if the tokenizer has no chat template.
  """
  if importlib.util.find_spec("jinja2") is None:
    raise ImportError("templates.chat needs Jinja2: pip install jinja2.")
  if not tokenizer.chat_template:
    raise ValueError(
      "expected a tokenizer with a chat template, got none in"
      f" {tokenizer.name_or_path!r}. Take an instruction-tuned model, or use"
      " another template."
    )
  apply: Any = functools.partial(
    tokenizer.apply_chat_template, tokenize=False, date_string=date_string
  )

  def template(row):
    turns = _turns(row, messages, prompt, response)
    if not turns or not turns[-1]["content"]:
      return Text("", "", special_tokens=False)
    asked = apply(turns[:-1], add_generation_prompt=True)
    answered = apply(turns)
    if not answered.startswith(asked):
      raise ValueError(
        "expected a chat template whose generation prompt is the start of the"
        f" answered conversation, got {asked!r}, answered by {answered!r}."
        " Correct the tokenizer's `chat_template`."
      )
    answer = answered.removeprefix(asked)
    end = tokenizer.eos_token
    if end and end in answer:
      answer = answer[: answer.rindex(end) + len(end)]
    return Text(asked, answer, special_tokens=False)

  return template


def _turns(row, messages, prompt, response) -> list[dict[str, str]]:
  """Returns the messages of a row, up to the last one of the assistant."""
  if messages is None:
    return [
      {"role": "user", "content": _text(row, prompt)},
      {"role": "assistant", "content": _text(row, response)},
    ]
  turns = list(_value(row, messages) or [])
  while turns and turns[-1]["role"] != "assistant":
    turns.pop()
  return turns


def _text(row: Row, column: str) -> str:
  """Returns the text in a column; empty if the value is missing."""
  value = _value(row, column)
  return "" if value is None else str(value)


def _value(row: Row, column: str) -> Any:
  try:
    return row[column]
  except KeyError:
    raise ValueError(
      f"expected a column {column!r}, got {', '.join(map(repr, row))}. Give the"
      " template the column names of this data set."
    ) from None
