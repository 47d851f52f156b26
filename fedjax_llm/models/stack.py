"""Scans over the layers of a model, and computes the output of decoders.

The parameters of all layers are stacked on axis 0, so the layers share one
program.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_llm.models import attention, heads, lora


def layers(block: type[nn.Module], model: Any, in_axes: Sequence[Any]) -> Any:
  """Returns a module that applies the layers of a model one after the other.

  Args:
    block: the module class of a layer. It is called as
      `block(x, *inputs, deterministic)` and returns the new states `x` and an
      output.
    model: the model that has the layers. Its `config`, `adapter`, `dtype` and
      `remat` are used.
    in_axes: the axes of `inputs` and `deterministic`: 0 if every layer has its
      own slice, or `nn.broadcast` if all layers get the same value.
  """
  # prevent_cse is for loops that XLA unrolls; inside a scan it only costs.
  remat = nn.remat(block, prevent_cse=False, static_argnums=(len(in_axes) + 1,))
  return nn.scan(
    remat if model.remat else block,
    variable_axes={"params": 0, "lora": 0},
    split_rngs={"params": True, "lora": True, "dropout": True},
    in_axes=tuple(in_axes),
    length=model.config.num_hidden_layers,
  )(model.config, model.adapter, model.dtype, name="layers")


def cached_layers(
  block: type[nn.Module],
  model: Any,
  x: Float[Array, "batch time d"],
  own: Any,
  shared: Sequence[Any],
  cache: attention.Cache | None,
) -> tuple[Float[Array, "batch time d"], attention.Cache | None]:
  """Applies the layers of a decoder, with a cache of keys and values.

  Args:
    block: the module class of a layer. It is called as
      `block(x, (own, past), *shared)` and returns the new states `x` and the
      new `past`, the layer's cached keys and values.
    model: the model that has the layers.
    x: the embedded tokens.
    own: an array with one slice for each layer, or None.
    shared: the inputs that all layers share; the last is `deterministic`.
    cache: the cache, or None.

  Returns:
    The states after the last layer, and the updated cache.
  """
  past = None if cache is None else (cache.keys, cache.values)
  scanned = layers(block, model, (0, *[nn.broadcast for _ in shared]))
  x, past = scanned(x, (own, past), *shared)
  if cache is not None:
    cache = cache._replace(keys=past[0], values=past[1])
  return x, cache


def output(
  model: Any,
  x: Float[Array, "batch time d"],
  segments: Int[Array, "batch time"] | None,
  embed: nn.Embed,
) -> Float[Array, "..."]:
  """Returns what a decoder predicts from its last states, in float32.

  Args:
    model: the decoder. Its `config`, `adapter`, `head` and `dtype` are used.
    x: the normalised states after the last layer.
    segments: the documents of the tokens; see `models.attention`.
    embed: the embedding of the tokens, used for the output if they are tied.

  Returns:
    Logits [batch, time, vocab], or scores [batch, labels] if there is a head.
  """
  config, head = model.config, model.head
  if head is not None:
    x = heads.pool(x, segments, head.pooling or "last")
    trained = model.adapter is not None
    return heads.Head(head.labels, False, trained, name="score")(x)
  flat = x.reshape(-1, config.hidden_size)
  if config.tie_word_embeddings:
    logits = embed.attend(flat)
  else:
    logits = lora.Dense(config.vocab_size, dtype=model.dtype, name="lm_head")(
      flat
    )
  return jnp.reshape(logits.astype(jnp.float32), (*x.shape[:2], -1))
