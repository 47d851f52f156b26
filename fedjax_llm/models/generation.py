"""Generates text with a language model: greedy or sampled, in batches.

One compiled program fills a cache with the prompts except their last tokens.
Then it loops: each step reads the last token of every row and chooses the next.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fedjax_llm.models import lora

# The smallest padded length. Lengths are padded to powers of two, so that
# prompts of many lengths share a compiled program.
_SHORTEST = 16


def generate(
  model: nn.Module,
  params: Mapping[str, Any],
  factors: Mapping[str, Any] | None,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  eos_ids: Sequence[int] = (),
  key: PRNGKeyArray | None = None,
) -> list[list[int]]:
  """Continues every prompt.

  Args:
    model: a language model with an `empty_cache`.
    params: the parameters of the base model.
    factors: the trained parameters; None for a model without an adapter.
    prompts: the token ids of each prompt, at least one.
    max_new_tokens: the largest number of new tokens, at least 1.
    temperature: the divisor of the logits before sampling; 0 for the most
      likely token.
    top_p: a probability in (0, 1]. Tokens are sampled from the smallest set
      with at least this probability (Holtzman et al., 2020).
    eos_ids: the tokens that end a row.
    key: the random key; needed if the temperature is not 0. The samples of a
      row depend on the key and the row's index, not on other rows.

  Returns:
    The new tokens of each row, including the end token if there is one.

  Raises:
    ValueError: if an argument is out of range or does not fit the model, or a
      row needs more learned positions than the model has.
  """
  _check(model, factors, prompts)
  _check_settings(max_new_tokens, temperature, top_p, key)
  longest = max(map(len, prompts))
  time = max(_SHORTEST, 1 << (longest - 1).bit_length())
  if time + max_new_tokens > model.config.max_position_embeddings:
    time = longest
  # Raises before compilation if the model has too few learned positions.
  jax.eval_shape(lambda: model.empty_cache(1, time + max_new_tokens))
  rows = pad(prompts, time)
  variables = lora.variables(params, factors)
  settings = (max_new_tokens, float(temperature), float(top_p), tuple(eos_ids))
  new = np.asarray(_run(model, settings, variables, *rows, key))
  return [_until_end(row, eos_ids) for row in new.tolist()]


def _check(model, factors, prompts):
  if model.head is not None:
    raise ValueError(
      f"expected a language model, got one with {model.head}. Take a model"
      " without a head."
    )
  if (factors is None) != (model.adapter is None):
    raise ValueError(
      "expected factors for a model with an adapter and None for one without,"
      f" got {'none' if factors is None else 'factors'} and {model.adapter}."
      " Give both or neither."
    )
  size = model.config.vocab_size
  if not len(prompts) or not all(map(len, prompts)):
    raise ValueError(
      "expected prompts of at least one token each, got an empty prompt or no"
      " prompt. Start empty prompts with the tokenizer's bos token."
    )
  if unknown := sorted({x for row in prompts for x in row} - {*range(size)}):
    raise ValueError(
      f"expected token ids in [0, {size}), got {unknown}. Take the tokenizer of"
      " the model."
    )


def _check_settings(max_new_tokens, temperature, top_p, key):
  if max_new_tokens < 1:
    raise ValueError(f"expected max_new_tokens >= 1, got {max_new_tokens}.")
  if temperature < 0 or not 0 < top_p <= 1:
    raise ValueError(
      f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature=} and"
      f" {top_p=}."
    )
  if temperature > 0 and key is None:
    raise ValueError(
      f"expected a key to sample with {temperature=}, got none. Give a key, or"
      " temperature 0."
    )


def pad(
  prompts: Sequence[Sequence[int]], time: int
) -> tuple[Int[np.ndarray, "batch time"], Int[np.ndarray, "batch time"]]:
  """Returns the tokens and segments of prompts, padded on the left."""
  tokens = np.zeros((len(prompts), time), np.int32)
  segments = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    tokens[row, time - len(prompt) :] = prompt
    segments[row, time - len(prompt) :] = 1
  return tokens, segments


def _until_end(row, eos_ids):
  ends = [number for number, token in enumerate(row, 1) if token in eos_ids]
  return row[: ends[0]] if ends else row


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(model, settings, variables, tokens, segments, key):
  """Returns new tokens [batch, max_new_tokens], arbitrary after a row's end."""
  steps, temperature, top_p, eos_ids = settings
  batch, time = tokens.shape
  cache = model.empty_cache(batch, time + steps)
  if time > 1:
    _, cache = model.apply(
      variables, tokens[:, :-1], segments[:, :-1], cache=cache
    )
  rows = jnp.arange(batch)

  def choose(logits, step):
    if not temperature:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw_key = lambda row: jax.random.fold_in(
      jax.random.fold_in(key, row), step
    )
    return jax.vmap(functools.partial(sample, top_p=top_p))(
      jax.vmap(draw_key)(rows), logits / temperature
    )

  def next_tokens(carry):
    step, last, cache, new, ended = carry
    logits, cache = model.apply(variables, last[:, None], cache=cache)
    last = choose(logits[:, 0], step)
    ended |= jnp.isin(last, jnp.array(eos_ids, jnp.int32))
    return step + 1, last, cache, new.at[:, step].set(last), ended

  unfinished = lambda carry: (carry[0] < steps) & ~carry[-1].all()
  start = (
    jnp.zeros((), jnp.int32),
    tokens[:, -1],
    cache,
    jnp.zeros((batch, steps), jnp.int32),
    jnp.zeros(batch, bool),
  )
  return jax.lax.while_loop(unfinished, next_tokens, start)[3]


def sample(
  key: PRNGKeyArray, logits: Float[Array, " vocab"], top_p: float = 1.0
) -> Array:
  """Samples a token from the smallest set with probability `top_p` or more."""
  if top_p == 1:
    return jax.random.categorical(key, logits).astype(jnp.int32)
  order = jnp.argsort(logits, descending=True)
  logits = logits[order]
  weights = jax.nn.softmax(logits)
  # A token is in the set if the more likely tokens together stay below top_p.
  before = jnp.cumsum(weights) - weights
  logits = jnp.where(before < top_p, logits, -jnp.inf)
  return order[jax.random.categorical(key, logits)].astype(jnp.int32)
