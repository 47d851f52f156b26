"""A LoRA-parametrised decoder, whose config covers many model families.

The families are Llama 1-3, TinyLlama, SmolLM, Mistral, Qwen 2, 2.5 and 3, and
Gemma 1, 2 and 3. Modules have the same names as in transformers, so the paths
in the parameter tree match the tensors of a checkpoint and the targets of LoRA.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_llm.models import (
  attention,
  decoder_config,
  hub_config,
  layout,
  rotary,
  stack,
)

# The dense layers of a block.
LAYERS = (
  "self_attn.q_proj",
  "self_attn.k_proj",
  "self_attn.v_proj",
  "self_attn.o_proj",
  "mlp.gate_proj",
  "mlp.up_proj",
  "mlp.down_proj",
)
LINEAR = tuple(layer.split(".")[-1] for layer in LAYERS)
LAYOUT = layout.Layout(
  base="model",
  layers="layers",
  heads=("lm_head", "score"),
  # transformers stores the text model of multimodal Gemma 3 under these names.
  renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
  ignored=(r"rotary_emb\.inv_freq$",),
)

DecoderConfig = decoder_config.DecoderConfig


class RMSNorm(nn.Module):
  """Divides by the root mean square in float32, then scales.

  Attributes:
    epsilon: a constant that is added to the mean square.
    unit_offset: whether the scale is 1 + the parameter, applied in float32.
    dtype: the type of the result.
  """

  epsilon: float
  unit_offset: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Applies the norm over the last axis."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon
    )
    if self.unit_offset:
      return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)
    return x.astype(self.dtype) * scale.astype(self.dtype)


def _norm(module: Any, name: str) -> RMSNorm:
  """Returns the norm that the config of `module` describes."""
  config = module.config
  return RMSNorm(
    config.rms_norm_eps, config.unit_offset, module.dtype, name=name
  )


class Attention(stack.Layer):
  """Causal grouped-query attention with rotary positions."""

  @nn.compact
  def __call__(self, x, angles, mask, past, slots):
    """Attends from `x` [batch, time, hidden] to `x` and to `past`.

    Returns:
      The update of the residual stream; and the layer's keys and values, or
      None without a cache.
    """
    config = self.config
    batch, time, _ = x.shape

    def project(name, heads):
      y = self.dense(name, x, heads * config.head_dim, config.qkv_bias)
      return y.reshape(batch, time, heads, config.head_dim)

    query = project("q_proj", config.num_attention_heads)
    key = project("k_proj", config.num_key_value_heads)
    value = project("v_proj", config.num_key_value_heads)
    if config.qk_norm:
      query, key = _norm(self, "q_norm")(query), _norm(self, "k_norm")(key)
    query, key = rotary.rotate(query, *angles), rotary.rotate(key, *angles)
    key, value = attention.remember(past, key, value, slots)
    y = attention.attend(
      query,
      key,
      value,
      mask,
      scale=1 / math.sqrt(config.query_pre_attn_scalar or config.head_dim),
      softcap=config.attention_softcap,
    ).reshape(batch, time, -1)
    y = self.dense("o_proj", y, config.hidden_size, config.output_bias)
    return y, None if past is None else (key, value)


class FeedForward(stack.Layer):
  """A gated block: `down(act(gate(x)) * up(x))`."""

  @nn.compact
  def __call__(self, x):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config
    width, use_bias = config.intermediate_size, config.mlp_bias
    gate = self.dense("gate_proj", x, width, use_bias)
    gate = hub_config.ACTIVATIONS[config.hidden_act](gate)
    hidden = gate * self.dense("up_proj", x, width, use_bias)
    return self.dense("down_proj", hidden, config.hidden_size, use_bias)


class Block(stack.Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, own, views, slots) -> tuple[Any, Any]:
    """Applies the layer; one step of the scan over layers.

    Args:
      x: the residual stream, [batch, time, hidden].
      own: a pair (windowed, past). `windowed` is whether this layer has the
        sliding window, or None if all layers are alike. `past` is the layer's
        cached keys and values, or None.
      views: a pair (angles, mask) for each kind of layer. If there are two
        kinds, the one without a window comes first.
      slots: the index of each token among the keys.

    Returns:
      The updated residual stream; and the layer's keys and values, or None
      without a cache.
    """
    is_windowed, past = own
    choose = lambda full, local: jnp.where(is_windowed, local, full)
    view = views[0] if is_windowed is None else jax.tree.map(choose, *views)
    angles, mask = view
    sandwiched = self.config.sandwich_norms
    attend = self.part(Attention, "self_attn")
    y = _norm(self, "input_layernorm")(x)
    y, past = attend(y, angles, mask, past, slots)
    if sandwiched:
      y = _norm(self, "post_attention_layernorm")(y)
    x = x + y
    before = "pre_feedforward" if sandwiched else "post_attention"
    y = _norm(self, f"{before}_layernorm")(x)
    y = self.part(FeedForward, "mlp")(y)
    if sandwiched:
      y = _norm(self, "post_feedforward_layernorm")(y)
    return x + y, past


class Decoder(stack.Model):
  """A decoder: `apply({"params": frozen, "lora": trainable}, tokens)`."""

  LAYERS = LAYERS
  POOLINGS = ("last", "mean")

  def empty_cache(self, batch: int, length: int) -> attention.Cache:
    """Returns an empty cache for `batch` rows of `length` tokens."""
    config = self.config
    heads = config.num_key_value_heads
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
    """
    config = self.config
    embed = nn.Embed(
      config.vocab_size,
      config.hidden_size,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(0.02),
      name="embed_tokens",
    )
    x = embed(tokens)
    if config.scaled_embeddings:
      x = x * jnp.asarray(math.sqrt(config.hidden_size), self.dtype)
    x, cache = self._layers(x, segments, cache, deterministic)
    result = stack.output(self, _norm(self, "norm")(x), segments, embed)
    if self.head is not None:
      return result
    if (cap := config.final_softcap) is not None:
      result = cap * jnp.tanh(result / cap)
    return result if cache is None else (result, cache)

  def _layers(self, x, segments, cache, deterministic):
    config = self.config
    scope, cache = attention.scope(x.shape[:2], segments, cache)
    kinds = sorted(set(config.windowed)) or [False]
    windows = [config.sliding_window if kind else None for kind in kinds]
    ropes = [(config.local_rope if x else None) or config.rope for x in kinds]
    angles = [x.angles(scope.positions, config.head_dim) for x in ropes]
    views = list(zip(angles, scope.masks(windows), strict=True))
    # If all layers are alike, there is one view and nothing to choose.
    windowed = jnp.array(config.windowed) if len(kinds) > 1 else None
    shared = (views, scope.slots)
    return stack.cached_layers(
      Block, self, deterministic, x, windowed, shared, cache
    )
