"""Multiple choice: compares the logits of a few tokens after a prompt.

The prompts of a paper share their first tokens: the header and the shots. The
model reads these tokens once, into a cache. Then it reads the rest of each
prompt, in batches. Lengths are padded to powers of two, so that all papers of
an exam share a few compiled programs.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedjax_llm.data import tokenised
from fedjax_llm.models import attention, generation, lora

if TYPE_CHECKING:
  import transformers

# The smallest padded lengths of the shared tokens and of the rest.
_SHORTEST_PREFIX = 512
_SHORTEST_REST = 64


class Paper(NamedTuple):
  """The questions of a subject, as texts.

  A prompt is the header, the shots and a question, joined without separators.

  Attributes:
    subject: the name of the subject.
    header: the start of every prompt.
    shots: solved questions. A prompt that is too long leaves out the last ones.
    questions: the texts of the questions, up to the answer.
    ids: the ids of the questions.
    answers: the letter of each correct answer; empty if unknown.
  """

  subject: str
  header: str
  shots: tuple[str, ...]
  questions: tuple[str, ...]
  ids: tuple[str, ...]
  answers: tuple[str, ...]


class Group(NamedTuple):
  """Questions of a paper whose prompts have the same number of shots.

  Attributes:
    shots: the number of shots.
    questions: the numbers of the questions in the paper.
    prefix: the tokens that all prompts of the group start with.
    rests: the remaining tokens of each prompt, at least one.
  """

  shots: int
  questions: tuple[int, ...]
  prefix: list[int]
  rests: list[list[int]]


def tokenise(
  paper: Paper,
  tokenizer: transformers.PreTrainedTokenizerBase,
  *,
  context: int,
) -> list[Group]:
  """Tokenises all prompts of a paper; a long prompt gets fewer shots.

  Each prompt is tokenised as a whole, with the tokenizer's special tokens at
  its start. The shared prefix is found by comparing tokens.

  Args:
    paper: the questions.
    tokenizer: the tokenizer of the model.
    context: largest number of tokens in a prompt.

  Returns:
    The groups. A question that is too long even without shots is left out.
  """
  _, after = tokenised.special_tokens(tokenizer)
  left, groups = list(range(len(paper.questions))), []
  for shots in range(len(paper.shots), -1, -1):
    if not left:
      break
    head = paper.header + "".join(paper.shots[:shots])
    texts = [head + paper.questions[number] for number in left]
    encoded: Any = tokenizer(texts, verbose=False)
    prompts = {
      number: ids[: len(ids) - len(after)]
      for number, ids in zip(left, encoded["input_ids"], strict=True)
    }
    fitting = [x for x in left if len(prompts[x]) <= context]
    left = [x for x in left if len(prompts[x]) > context]
    if fitting:
      groups.append(_group(shots, fitting, [prompts[x] for x in fitting]))
  return groups


def _group(shots, numbers, prompts) -> Group:
  # The prefix excludes the last token of each prompt: it predicts the answer.
  shortest = min(map(len, prompts)) - 1
  shared = len(os.path.commonprefix([ids[:shortest] for ids in prompts]))
  return Group(
    shots, tuple(numbers), prompts[0][:shared], [x[shared:] for x in prompts]
  )


def choice_tokens(
  answers: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase
) -> list[int]:
  """Returns the id of the last token of each answer, such as " A".

  Raises:
    ValueError: if two answers have the same last token.
  """
  tokens = [
    tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    for text in answers
  ]
  if len(set(tokens)) < len(tokens):
    raise ValueError(
      "expected a tokenizer with different last tokens for"
      f" {', '.join(map(repr, answers))}, got {tokens}. Take another model."
    )
  return tokens


def scores(
  model: nn.Module,
  params: Mapping[str, Any],
  factors: Mapping[str, Any] | None,
  groups: Sequence[Group],
  choices: Sequence[int],
  *,
  batch_size: int = 8,
) -> dict[int, Float[np.ndarray, " choices"]]:
  """Computes the next-token logits of the choices after every prompt.

  Args:
    model: a language model with an `empty_cache`.
    params: the parameters of the base model.
    factors: the trained parameters; None for a model without an adapter.
    groups: the tokenised questions of a paper. No prompt is longer than the
      context of the model.
    choices: the token ids of the choices.
    batch_size: number of questions in a batch.

  Returns:
    The logits of the choices, by the number of the question.

  Raises:
    ValueError: if a token id is outside the vocabulary of the model.
    FloatingPointError: if a logit is not finite.
  """
  size = model.config.vocab_size
  tokens = [row for group in groups for row in (group.prefix, *group.rests)]
  if (most := max(itertools.chain(choices, *tokens))) >= size:
    raise ValueError(
      f"expected token ids below {size}, the model's vocabulary size, got"
      f" {most}. Take the tokenizer of the model."
    )
  variables = lora.variables(params, factors)
  chosen, result = jnp.array(choices, jnp.int32), {}
  for group in groups:
    width = _width(model, len(group.prefix), _SHORTEST_PREFIX)
    prefix = generation.pad([group.prefix], width)
    cache = _prefill(model, variables, *prefix)
    # Sorted, so that the rows of a batch have about the same length.
    order = np.argsort([len(x) for x in group.rests], kind="stable").tolist()
    for start in range(0, len(order), batch_size):
      batch = order[start : start + batch_size]
      rests = [group.rests[x] for x in batch]
      rests += rests[:1] * (batch_size - len(batch))
      logits = _ask(model, variables, cache, *_rows(model, rests), chosen)
      logits = jax.device_get(logits)
      if not np.isfinite(logits[: len(batch)]).all():
        raise FloatingPointError(
          "expected finite logits, got NaN or infinity. The model has diverged,"
          " or its dtype has too small a range."
        )
      numbers = [group.questions[x] for x in batch]
      result |= dict(zip(numbers, logits, strict=False))
  return result


def _width(model, length, shortest):
  """Returns the padded length: a power of two within the model's positions."""
  width = max(shortest, 1 << max(length - 1, 0).bit_length())
  return max(length, min(width, model.config.max_position_embeddings))


def _rows(model, rests):
  """Returns the first tokens of each row, their number, and the last token.

  The first tokens are all but the last one. They are padded on the right.
  """
  lengths = np.array([len(x) - 1 for x in rests], np.int32)
  width = _width(model, int(lengths.max()), _SHORTEST_REST)
  tokens = np.zeros((len(rests), width), np.int32)
  for row, rest in zip(tokens, rests, strict=True):
    row[: len(rest) - 1] = rest[:-1]
  return tokens, lengths, np.array([x[-1] for x in rests], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model, variables, tokens, segments) -> attention.Cache:
  cache = model.empty_cache(*tokens.shape)
  return _then(model, variables, tokens, segments, cache)


def _then(model, variables, tokens, segments, cache) -> attention.Cache:
  """Adds the tokens to the cache.

  XLA removes the computation of the unused logits.
  """
  return model.apply(variables, tokens, segments, cache=cache)[1]


@functools.partial(jax.jit, static_argnums=0)
def _ask(
  model: nn.Module,
  variables: Mapping[str, Any],
  cache: attention.Cache,
  tokens: Int[Array, "batch width"],
  lengths: Int[Array, " batch"],
  last: Int[Array, " batch"],
  choices: Int[Array, " choices"],
) -> Float[Array, "batch choices"]:
  """Computes the logits of the choices.

  A prompt consists of the prefix in `cache`, the first `lengths` tokens of its
  row of `tokens`, and its `last` token.
  """
  batch, width = tokens.shape

  def grow(x, rows, slots):
    shape = [batch if axis == rows else n for axis, n in enumerate(x.shape)]
    room = [(0, width + 1 if axis == slots else 0) for axis in range(x.ndim)]
    return jnp.pad(jnp.broadcast_to(x, shape), room)

  prefix = cache.used
  cache = attention.Cache(
    grow(cache.keys, 1, 2),
    grow(cache.values, 1, 2),
    grow(cache.segments, 0, 1),
    prefix,
  )
  segments = (jnp.arange(width)[None] < lengths[:, None]).astype(jnp.int32)
  cache = _then(model, variables, tokens, segments, cache)

  def after_last(keys, values, segments, length, token):
    # The last token overwrites the first padding of its row. So no padding is
    # in between, which a sliding window would count.
    own = (keys[:, None], values[:, None], segments[None], prefix + length)
    logits, _ = model.apply(
      variables, token[None, None], cache=attention.Cache(*own)
    )
    return logits[0, 0, choices]

  return jax.vmap(after_last, in_axes=(1, 1, 0, 0, 0))(
    cache.keys, cache.values, cache.segments, lengths, last
  )
