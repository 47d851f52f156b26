"""Templates: functions from a row of a data set to a prompt and an answer.

They are made by factories that take the names of the columns; any function of
the same form is one too. A classifier reads prompt and answer as one text.
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
  """What a language model reads and what it is to answer.

  Attributes:
    prompt: read, not learnt; may be empty.
    answer: learnt; follows the prompt with nothing between.
    special_tokens: whether the tokenizer adds its own at the start of the
      prompt; False where the prompt spells them out.
  """

  prompt: str
  answer: str
  special_tokens: bool = True


Template = Callable[[Row], Text]


def plain(column: str = "text") -> Template:
  """A text to learn as a whole."""
  return lambda row: Text("", _text(row, column))


def alpaca(
  instruction: str = "instruction",
  context: str = "input",
  response: str = "output",
) -> Template:
  """The two prompts of Stanford Alpaca, with and without further context.

  https://github.com/tatsu-lab/stanford_alpaca, `train.py`.

  Args:
    instruction: column of what is asked.
    context: column of the further context; the second prompt is taken where it
      is empty.
    response: column of the answer.
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
  """Alpaca's prompts from the columns of `databricks/databricks-dolly-15k`."""
  return alpaca("instruction", "context", "response")


def question_answer(
  question: str = "question", answer: str = "answer"
) -> Template:
  """`Question: ...`, a line `Answer:` and the answer, as for GSM8K."""
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
  """The chat template of a tokenizer; the last assistant message is learnt.

  What the template writes after the tokenizer's end token is left out, so that
  generation stops there.

  Args:
    tokenizer: of the model that is trained.
    messages: column of lists of `{"role": ..., "content": ...}`; what follows
      the last message of the assistant is left out. None if the data has the
      next two columns instead.
    prompt: column of what the user says.
    response: column of what the assistant answers.
    date_string: what a template that writes today's date writes instead, so
      that rows are the same tomorrow.

  Raises:
    ImportError: if Jinja2, which chat templates are written in, is missing.
    ValueError: if the tokenizer has no chat template; of a row, if the
      template writes an answered conversation in another way than it asks for
      the answer.
  """
  if importlib.util.find_spec("jinja2") is None:
    raise ImportError("templates.chat needs Jinja2: pip install jinja2.")
  if not tokenizer.chat_template:
    raise ValueError(
      f"expected a tokenizer with a chat template, got none in"
      f" {tokenizer.name_or_path!r}. Take an instruction-tuned model's, or"
      " another template."
    )

  def template(row):
    if messages is None:
      turns = [
        {"role": "user", "content": _text(row, prompt)},
        {"role": "assistant", "content": _text(row, response)},
      ]
    else:
      turns = list(_value(row, messages) or [])
    while turns and turns[-1]["role"] != "assistant":
      turns.pop()
    if not turns or not turns[-1]["content"]:
      return Text("", "", special_tokens=False)
    apply: Any = functools.partial(
      tokenizer.apply_chat_template, tokenize=False, date_string=date_string
    )
    asked = apply(turns[:-1], add_generation_prompt=True)
    answered = apply(turns)
    if not answered.startswith(asked):
      raise ValueError(
        "expected a chat template whose generation prompt starts the"
        f" assistant's message, got {asked!r}, answered by {answered!r}."
        " Pass a tokenizer whose `chat_template` is mended."
      )
    answer = answered.removeprefix(asked)
    end = tokenizer.eos_token
    if end and end in answer:
      answer = answer[: answer.rindex(end) + len(end)]
    return Text(asked, answer, special_tokens=False)

  return template


def _text(row: Row, column: str) -> str:
  """The text in a column, empty where there is none."""
  value = _value(row, column)
  return "" if value is None else str(value)


def _value(row: Row, column: str) -> Any:
  try:
    return row[column]
  except KeyError:
    raise ValueError(
      f"expected a column {column!r}, got {', '.join(map(repr, row))}. Give the"
      " template the names of this data set's columns."
    ) from None
