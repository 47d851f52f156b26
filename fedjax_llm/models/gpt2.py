"""GPT-2: learned positions, norms with biases, one projection for q, k and v.

It is LoRA-parametrised and scanned over its layers, like `models.decoder`.
Modules have the same names as in transformers. Both store the kernels of GPT-2
as [in, out] (`Conv1D` in transformers).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedjax_llm.models import (
  attention,
  gpt2_config,
  hub_config,
  layout,
  stack,
)

# The dense layers of a block.
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LAYOUT = layout.Layout(
  base="transformer",
  layers="h",
  heads=("lm_head", "score"),
  transposed=False,
  # Older checkpoints contain the causal mask.
  ignored=(r"\.attn\.(masked_)?bias$",),
)

GPT2Config = gpt2_config.GPT2Config


class Attention(stack.Layer):
  """Causal multi-head attention."""

  @nn.compact
  def __call__(self, x, depth, mask, past, slots):
    """Attends from `x` [batch, time, hidden] to `x` and to `past`.

    Returns:
      The update of the residual stream; and the layer's keys and values, or
      None without a cache.
    """
    config = self.config
    y = self.dense("c_attn", x, 3 * config.hidden_size)
    y = y.reshape(*x.shape[:2], 3, config.num_attention_heads, -1)
    query, key, value = y[:, :, 0], y[:, :, 1], y[:, :, 2]
    if depth is not None:
      query = query / depth.astype(self.dtype)
    key, value = attention.remember(past, key, value, slots)
    scale = None if config.scale_attn_weights else 1.0
    y = attention.attend(query, key, value, mask, scale=scale)
    y = self.dense("c_proj", y.reshape(x.shape), config.hidden_size)
    return y, None if past is None else (key, value)


class FeedForward(stack.Layer):
  """`c_proj(act(c_fc(x)))`."""

  @nn.compact
  def __call__(self, x):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config
    width = config.intermediate_size or 4 * config.hidden_size
    y = hub_config.ACTIVATIONS[config.hidden_act](self.dense("c_fc", x, width))
    return self.dense("c_proj", y, config.hidden_size)


class Block(stack.Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, own, mask, slots) -> tuple[Any, Any]:
    """Applies the layer; one step of the scan over layers.

    Args:
      x: the residual stream, [batch, time, hidden].
      own: a pair (depth, past). `depth` is the number of the layer, from 1, or
        None if the config does not use it. `past` is the layer's cached keys
        and values, or None.
      mask: True where a query sees a key; None for plain causal attention.
      slots: the index of each token among the keys.

    Returns:
      The updated residual stream; and the layer's keys and values, or None
      without a cache.
    """
    depth, past = own
    attend = self.part(Attention, "attn")
    y, past = attend(_norm(self, "ln_1")(x), depth, mask, past, slots)
    x = x + y
    return x + self.part(FeedForward, "mlp")(_norm(self, "ln_2")(x)), past


def _norm(module: Any, name: str) -> nn.LayerNorm:
  """Returns a layer norm with the config and dtype of `module`."""
  # Some channels of GPT-2 are so large that the fast variance, mean(x^2) minus
  # mean(x)^2, would lose most digits.
  return nn.LayerNorm(
    module.config.layer_norm_epsilon,
    module.dtype,
    use_fast_variance=False,
    name=name,
  )


class GPT2(stack.Model):
  """GPT-2: `apply({"params": frozen, "lora": trainable}, tokens)`."""

  LAYERS = LAYERS
  POOLINGS = ("last", "mean")

  def empty_cache(self, batch: int, length: int) -> attention.Cache:
    """Returns an empty cache for `batch` rows of `length` tokens.

    Raises:
      ValueError: if the model has fewer positions than `length`.
    """
    config = self.config
    stack.check_length(config, length)
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, batch, length, heads, config.head_dim)
    return attention.empty_cache(shape, self.dtype)

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    *,
    cache: attention.Cache | None = None,
    deterministic: bool = True,
  ) -> Any:
    """Computes next-token logits, or with a head the scores of each row.

    Args:
      tokens: the token ids.
      segments: the documents of the tokens; see `models.attention`. None if
        each row is one document without padding. Padding on the right is
        allowed too if there is neither a head nor a cache.
      cache: the cache of the earlier tokens, or None.
      deterministic: whether dropout is off. Otherwise LoRA dropout is drawn
        from the rng "dropout".

    Returns:
      Logits [batch, time, vocab] or scores [batch, labels], in float32. With a
      cache, a pair of the logits and the updated cache.

    Raises:
      ValueError: if a row has more tokens than the model has positions.
    """
    config = self.config
    stack.check_length(config, tokens.shape[1])
    scope, cache = attention.scope(tokens.shape, segments, cache)

    def embed(name, size):
      draw = nn.initializers.normal(0.02)
      width = config.hidden_size
      return nn.Embed(size, width, self.dtype, embedding_init=draw, name=name)

    wte = embed("wte", config.vocab_size)
    wpe = embed("wpe", config.max_position_embeddings)
    x = wte(tokens) + wpe(scope.positions)
    numbers = 1 + jnp.arange(config.num_hidden_layers)
    own = numbers if config.scale_attn_by_inverse_layer_idx else None
    shared = (*scope.masks([None]), scope.slots)
    x, cache = stack.cached_layers(
      Block, self, deterministic, x, own, shared, cache
    )
    result = stack.output(self, _norm(self, "ln_f")(x), segments, wte)
    return result if self.head or cache is None else (result, cache)
