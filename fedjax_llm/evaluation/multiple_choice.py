"""Multiple choice: which of a few tokens a model would write after a prompt.

All questions of a paper begin with the same shots. What their prompts have in
common in tokens is read once, into a cache; the questions then follow on it, a
batch at a time. Lengths are padded to powers of two, so that all papers of an
exam share a few programs.
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
from fedjax_llm.models import attention

if TYPE_CHECKING:
  import transformers

# The shortest lengths that are compiled for: of what is shared, of the rest.
_SHORTEST_PREFIX = 512
_SHORTEST_REST = 64


class Paper(NamedTuple):
  """The questions of a subject, as texts.

  The prompt of a question is the header, shots and the question, with nothing
  between them.

  Attributes:
    subject: its name.
    header: what a prompt starts with.
    shots: solved examples, the last of which are left out where a prompt is
      too long.
    questions: of which each ends where the answer is to begin.
    ids: of the questions.
    answers: a letter each; empty where it is not told.
  """

  subject: str
  header: str
  shots: tuple[str, ...]
  questions: tuple[str, ...]
  ids: tuple[str, ...]
  answers: tuple[str, ...]


class Group(NamedTuple):
  """Questions of a paper that have room for the same number of shots.

  Attributes:
    shots: how many.
    questions: their numbers in the paper.
    prefix: tokens that all their prompts begin with.
    rests: the other tokens of each prompt; at least one.
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
  """The tokens of all prompts, each with as many shots as there is room for.

  Every prompt is tokenised as a whole, after the special tokens that the
  tokenizer puts at a start; what is shared is found in the tokens.

  Args:
    paper: the questions.
    tokenizer: that of the model.
    context: tokens of a prompt at most.

  Returns:
    The groups. A question that is too long without any shots is in none.
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
  # Each keeps a token of its own, the one that predicts the answer.
  shortest = min(map(len, prompts)) - 1
  shared = len(os.path.commonprefix([ids[:shortest] for ids in prompts]))
  return Group(
    shots, tuple(numbers), prompts[0][:shared], [x[shared:] for x in prompts]
  )


def choice_tokens(
  answers: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase
) -> list[int]:
  """The token that stands for each answer, such as " A": its last.

  Raises:
    ValueError: if two answers have the same.
  """
  tokens = [
    tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    for text in answers
  ]
  if len(set(tokens)) < len(tokens):
    raise ValueError(
      f"expected a tokenizer that tells {', '.join(map(repr, answers))} apart"
      f" by their last tokens, got {tokens}."
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
  """Logits of the choices as the next token after every prompt.

  Args:
    model: a language model with an `empty_cache`.
    params: the base model's parameters.
    factors: what was trained; None for a model without an adapter.
    groups: of a paper's questions; none longer than the model's context.
    choices: token ids.
    batch_size: questions scored at once.

  Returns:
    For the number of each question, the logits. The largest is the answer.

  Raises:
    ValueError: for a token that the model does not have.
    FloatingPointError: if logits are not finite, which choose nothing.
  """
  size = model.config.vocab_size
  tokens = [row for group in groups for row in (group.prefix, *group.rests)]
  if (most := max(itertools.chain(choices, *tokens))) >= size:
    raise ValueError(
      f"the tokenizer wrote token {most}, the model has only {size}. Take the"
      " tokenizer that it was trained with."
    )
  variables = {"params": params}
  if factors is not None:
    variables["lora"] = factors
  chosen, result = jnp.array(choices, jnp.int32), {}
  for group in groups:
    cache = _prefill(model, variables, *_prefix(model, group.prefix))
    # Neighbours are of about the same length.
    order = np.argsort([len(x) for x in group.rests], kind="stable").tolist()
    for start in range(0, len(order), batch_size):
      batch = order[start : start + batch_size]
      rests = [group.rests[x] for x in batch]
      rests += rests[:1] * (batch_size - len(batch))
      logits = _ask(model, variables, cache, *_rows(model, rests), chosen)
      logits = jax.device_get(logits)
      if not np.isfinite(logits[: len(batch)]).all():
        raise FloatingPointError(
          "the model has logits that are not finite: it has diverged, or"
          " computes in a type that is too short for it."
        )
      numbers = [group.questions[x] for x in batch]
      result |= dict(zip(numbers, logits, strict=False))
  return result


def _width(model, length, shortest):
  """A power of two, or what the model has positions for."""
  width = max(shortest, 1 << max(length - 1, 0).bit_length())
  return max(length, min(width, model.config.max_position_embeddings))


def _prefix(model, prefix):
  """Tokens and segments [1, width], padded on the left."""
  padding = _width(model, len(prefix), _SHORTEST_PREFIX) - len(prefix)
  tokens = np.array([[0] * padding + prefix], np.int32)
  return tokens, np.array([[0] * padding + [1] * len(prefix)], np.int32)


def _rows(model, rests):
  """All but the last tokens, padded on the right, how many, and the last."""
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
  """The cache with these tokens in it.

  Their logits, of the whole vocabulary at every place, are never computed.
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
  """Logits after the prefix in `cache`, each row's tokens, and its last one."""
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
    # It follows its row's own end: windows count slots, padded or not.
    own = (keys[:, None], values[:, None], segments[None], prefix + length)
    logits, _ = model.apply(
      variables, token[None, None], cache=attention.Cache(*own)
    )
    return logits[0, 0, choices]

  return jax.vmap(after_last, in_axes=(1, 1, 0, 0, 0))(
    cache.keys, cache.values, cache.segments, lengths, last
  )
