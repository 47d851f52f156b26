"""GPT-2: learned positions, norms with biases, one projection for q, k and v.

It is LoRA-parametrised and scanned over its layers, like `models.decoder`.
Modules have the names of transformers, which stores the kernels of GPT-2
[in, out] (`Conv1D`), as this package does.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedjax_llm.models import (
  attention,
  encoder,
  gpt2_config,
  heads,
  layout,
  lora,
  stack,
)

# The dense layers of a block.
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LAYOUT = layout.Layout(
  base="transformer",
  layers="h",
  heads=("lm_head", "score"),
  transposed=False,
  # The causal mask, which older checkpoints hold.
  ignored=(r"\.attn\.(masked_)?bias$",),
)

GPT2Config = gpt2_config.GPT2Config
_ACTIVATIONS = {**encoder.ACTIVATIONS, "swish": nn.silu}


class Layer(nn.Module):
  """A part of a block, with the config, adapter and dtype of the model."""

  config: GPT2Config
  adapter: lora.LoRA | None
  dtype: Any

  def dense(self, name: str, features: int) -> lora.Dense:
    """Returns a dense layer with a bias, and LoRA factors if it is a target."""
    return lora.Dense(features, self.adapter, True, self.dtype, name=name)


class Attention(Layer):
  """Causal multi-head attention."""

  @nn.compact
  def __call__(self, x, depth, mask, past, slots, deterministic):
    """Attends from `x` [batch, time, hidden] to `x` and to `past`.

    Returns:
      The update of the residual stream; and the layer's keys and values, or
      None without a cache.
    """
    config = self.config
    qkv = self.dense("c_attn", 3 * config.hidden_size)
    y = qkv(x, deterministic=deterministic)
    y = y.reshape(*x.shape[:2], 3, config.num_attention_heads, -1)
    query, key, value = y[:, :, 0], y[:, :, 1], y[:, :, 2]
    if depth is not None:
      query = query / depth.astype(self.dtype)
    key, value = attention.remember(past, key, value, slots)
    scale = None if config.scale_attn_weights else 1.0
    y = attention.attend(query, key, value, mask, scale=scale)
    output = self.dense("c_proj", config.hidden_size)
    y = output(y.reshape(x.shape), deterministic=deterministic)
    return y, None if past is None else (key, value)


class FeedForward(Layer):
  """`c_proj(act(c_fc(x)))`."""

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config
    width = config.intermediate_size or 4 * config.hidden_size
    x = self.dense("c_fc", width)(x, deterministic=deterministic)
    x = _ACTIVATIONS[config.hidden_act](x)
    output = self.dense("c_proj", config.hidden_size)
    return output(x, deterministic=deterministic)


class Block(Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, own, mask, slots, deterministic) -> tuple[Any, Any]:
    """Applies the layer; one step of the scan over layers.

    Args:
      x: the residual stream, [batch, time, hidden].
      own: a pair: the number of the layer, from 1, or None if the config does
        not use it; and the layer's cached keys and values, or None.
      mask: True where a query sees a key; None for plain causal attention.
      slots: the places of the tokens among the keys.
      deterministic: whether dropout is off.

    Returns:
      The updated residual stream; and the layer's keys and values, or None
      without a cache.
    """
    depth, past = own
    shape = (self.config, self.adapter, self.dtype)
    y = _norm(self.config, self.dtype, "ln_1")(x)
    attend = Attention(*shape, name="attn")
    y, past = attend(y, depth, mask, past, slots, deterministic)
    x = x + y
    y = _norm(self.config, self.dtype, "ln_2")(x)
    return x + FeedForward(*shape, name="mlp")(y, deterministic), past


def _norm(config: GPT2Config, dtype: Any, name: str) -> nn.LayerNorm:
  # Some channels of GPT-2 are so large that the fast variance, mean(x^2) minus
  # mean(x)^2, would lose most digits.
  return nn.LayerNorm(
    config.layer_norm_epsilon, dtype, use_fast_variance=False, name=name
  )


class GPT2(nn.Module):
  """GPT-2: `apply({"params": frozen, "lora": trainable}, tokens)`.

  Attributes:
    config: the shape of the model.
    adapter: the LoRA adapter; None for the base model alone.
    head: the classification head; None for a language model.
    dtype: the type of activations; logits are always float32.
    remat: whether the backward pass recomputes activations. This takes much
      less memory and somewhat more time.
  """

  config: GPT2Config
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Refuses an adapter or a pooling that does not fit this model."""
    if self.adapter is not None:
      self.adapter.check(LAYERS)
    if self.head is not None:
      self.head.check("last", "mean")
    super().__post_init__()

  def empty_cache(self, batch: int, length: int) -> attention.Cache:
    """Returns an empty cache for `batch` rows of `length` tokens.

    Raises:
      ValueError: if the model has fewer positions than `length`.
    """
    config = self.config
    self._check_length(length)
    return attention.empty_cache(
      config.num_hidden_layers,
      batch,
      length,
      config.num_attention_heads,
      config.head_dim,
      self.dtype,
    )

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    *,
    cache: attention.Cache | None = None,
    deterministic: bool = True,
  ) -> Any:
    """Computes next-token logits, or the scores of each row if there is a head.

    Args:
      tokens: the token ids.
      segments: the documents of the tokens; see `models.attention`. None if
        each row is one document, with padding on the right at most.
      cache: the cache of the tokens before these; None for none.
      deterministic: whether dropout is off. Otherwise LoRA dropout is drawn
        from the rng "dropout".

    Returns:
      Logits [batch, time, vocab] or scores [batch, labels], in float32. With a
      cache, a pair of the logits and the updated cache.

    Raises:
      ValueError: if a row has more tokens than the model has positions.
    """
    config = self.config
    self._check_length(tokens.shape[1])
    scope, cache = attention.scope(tokens.shape, segments, cache)

    def embed(name, size):
      draw = nn.initializers.normal(0.02)
      width = config.hidden_size
      return nn.Embed(size, width, self.dtype, embedding_init=draw, name=name)

    wte = embed("wte", config.vocab_size)
    wpe = embed("wpe", config.max_position_embeddings)
    x, cache = self._layers(
      wte(tokens) + wpe(scope.positions), scope, cache, deterministic
    )
    x = _norm(config, self.dtype, "ln_f")(x)
    result = stack.output(self, x, segments, wte)
    return result if self.head or cache is None else (result, cache)

  def _check_length(self, length):
    if length > (most := self.config.max_position_embeddings):
      raise ValueError(
        f"GPT-2 expected rows of at most {most} tokens, the number of its"
        f" learned positions, got {length}. Shorten the rows."
      )

  def _layers(self, x, scope, cache, deterministic):
    config = self.config
    numbers = 1 + jnp.arange(config.num_hidden_layers)
    own = numbers if config.scale_attn_by_inverse_layer_idx else None
    (mask,) = scope.masks([None])
    shared = (mask, scope.slots, deterministic)
    return stack.cached_layers(Block, self, x, own, shared, cache)
