"""One config-driven decoder, LoRA-parametrised, layers scanned.

Llama 1-3, TinyLlama, SmolLM, Mistral, Qwen 2, 2.5 and 3, Gemma 1, 2 and 3.
Module names are Hugging Face's, so that a checkpoint's tensor names and a LoRA
target's name can be read off the parameter tree. Layers are stacked on axis 0.
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
  heads,
  layout,
  lora,
  rotary,
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
  # Gemma 3 as transformers stores the text model of its multimodal kind.
  renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
  ignored=(r"rotary_emb\.inv_freq$",),
)

DecoderConfig = decoder_config.DecoderConfig
_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


class RMSNorm(nn.Module):
  """Divides by the root mean square in float32, then scales.

  Attributes:
    epsilon: added to the mean square.
    unit_offset: whether the scale is 1 + the parameter, applied in float32.
    dtype: of the result.
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


class Layer(nn.Module):
  """What the parts of a block share: the model's shape, adapter and dtype."""

  config: DecoderConfig
  adapter: lora.LoRA | None
  dtype: Any

  def norm(self, name: str) -> RMSNorm:
    """A norm as this family has them."""
    config = self.config
    return RMSNorm(
      config.rms_norm_eps, config.unit_offset, self.dtype, name=name
    )

  def dense(self, name: str, features: int, use_bias: bool) -> lora.Dense:
    """A dense layer, with factors if it is a target."""
    return lora.Dense(features, self.adapter, use_bias, self.dtype, name=name)


class Attention(Layer):
  """Causal grouped-query attention with rotary positions."""

  @nn.compact
  def __call__(self, x, angles, mask, past, slots, deterministic):
    """Attends from `x` [batch, time, hidden] to it and to what is `past`.

    Returns:
      What the layer adds, and its keys and values if there is a cache.
    """
    config = self.config
    batch, time, _ = x.shape

    def project(name, heads):
      dense = self.dense(name, heads * config.head_dim, config.qkv_bias)
      y = dense(x, deterministic=deterministic)
      return y.reshape(batch, time, heads, config.head_dim)

    query = project("q_proj", config.num_attention_heads)
    key = project("k_proj", config.num_key_value_heads)
    value = project("v_proj", config.num_key_value_heads)
    if config.qk_norm:
      query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
    query, key = rotary.rotate(query, *angles), rotary.rotate(key, *angles)
    key, value = attention.remember(past, key, value, slots)
    y = attention.attend(
      query,
      key,
      value,
      mask,
      scale=1 / math.sqrt(config.query_pre_attn_scalar or config.head_dim),
      softcap=config.attention_softcap,
    )
    output = self.dense("o_proj", config.hidden_size, config.output_bias)
    y = output(y.reshape(batch, time, -1), deterministic=deterministic)
    return y, None if past is None else (key, value)


class FeedForward(Layer):
  """A gated block: `down(act(gate(x)) * up(x))`."""

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config

    def dense(name, features, x):
      layer = self.dense(name, features, config.mlp_bias)
      return layer(x, deterministic=deterministic)

    width = config.intermediate_size
    gate = _ACTIVATIONS[config.hidden_act](dense("gate_proj", width, x))
    hidden = gate * dense("up_proj", width, x)
    return dense("down_proj", config.hidden_size, hidden)


class Block(Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, own, views, slots, deterministic) -> tuple[Any, Any]:
    """One step of the scan over layers.

    Args:
      x: the carry, [batch, time, hidden].
      own: the layer's (whether it has the window, past keys and values).
      views: (angles, mask) of each kind of layer there is, that without a
        window first.
      slots: where the tokens are among the keys.
      deterministic: whether dropout is off.

    Returns:
      The next carry, and the layer's keys and values if there is a cache.
    """
    is_windowed, past = own
    choose = lambda full, local: jnp.where(is_windowed, local, full)
    view = views[0] if is_windowed is None else jax.tree.map(choose, *views)
    angles, mask = view
    sandwiched = self.config.sandwich_norms
    shape = (self.config, self.adapter, self.dtype)
    attend = Attention(*shape, name="self_attn")
    feed_forward = FeedForward(*shape, name="mlp")
    y = self.norm("input_layernorm")(x)
    y, past = attend(y, angles, mask, past, slots, deterministic)
    if sandwiched:
      y = self.norm("post_attention_layernorm")(y)
    x = x + y
    before = "pre_feedforward" if sandwiched else "post_attention"
    y = feed_forward(self.norm(f"{before}_layernorm")(x), deterministic)
    if sandwiched:
      y = self.norm("post_feedforward_layernorm")(y)
    return x + y, past


class Decoder(nn.Module):
  """A decoder: `apply({"params": frozen, "lora": trainable}, tokens)`.

  Attributes:
    config: the model's shape.
    adapter: what gets LoRA factors, or None for the base model alone.
    head: None for a language model, else what classifies a row.
    dtype: what activations are computed in; logits are always float32.
    remat: recompute activations in the backward pass: much less memory for
      somewhat more time.
  """

  config: DecoderConfig
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Refuses an adapter or a pooling that this model does not have."""
    if self.adapter is not None:
      self.adapter.check(LAYERS)
    if self.head is not None:
      self.head.check("last", "mean")
    super().__post_init__()

  def empty_cache(self, batch: int, length: int) -> attention.Cache:
    """A cache for `length` tokens of each of `batch` rows."""
    config = self.config
    return attention.empty_cache(
      config.num_hidden_layers,
      batch,
      length,
      config.num_key_value_heads,
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
    """Logits of the next token at every position, or scores of each row.

    Args:
      tokens: the rows.
      segments: which tokens belong together, see `models.attention`; None for
        one document a row, with padding on the right at most.
      cache: of the tokens before these.
      deterministic: False to draw LoRA dropout from the rng "dropout".

    Returns:
      Logits [batch, time, vocab] or scores [batch, labels], in float32; and
      the cache with these tokens in it, if one is given.
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
    x = RMSNorm(
      config.rms_norm_eps, config.unit_offset, self.dtype, name="norm"
    )(x)
    if self.head is not None:
      x = heads.pool(x, segments, self.head.pooling or "last")
      trained = self.adapter is not None
      return heads.Head(self.head.labels, False, trained, name="score")(x)
    flat = x.reshape(-1, config.hidden_size)
    if config.tie_word_embeddings:
      logits = embed.attend(flat)
    else:
      logits = lora.Dense(config.vocab_size, dtype=self.dtype, name="lm_head")(
        flat
      )
    logits = logits.astype(jnp.float32).reshape(*tokens.shape, -1)
    if (cap := config.final_softcap) is not None:
      logits = cap * jnp.tanh(logits / cap)
    return logits if cache is None else (logits, cache)

  def _layers(self, x, segments, cache, deterministic):
    config = self.config
    scope, cache = attention.scope(x.shape[:2], segments, cache)
    kinds = sorted(set(config.windowed)) or [False]
    windows = [config.sliding_window if kind else None for kind in kinds]
    ropes = [(config.local_rope if x else None) or config.rope for x in kinds]
    angles = [x.angles(scope.positions, config.head_dim) for x in ropes]
    views = list(zip(angles, scope.masks(windows), strict=True))
    own = (
      # With one kind of layer there is one view, and nothing to choose.
      jnp.array(config.windowed) if len(kinds) > 1 else None,
      None if cache is None else (cache.keys, cache.values),
    )
    # prevent_cse is for loops that XLA unrolls; inside a scan it only costs.
    block = nn.remat(Block, prevent_cse=False, static_argnums=(5,))
    layers = nn.scan(
      block if self.remat else Block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "lora": True, "dropout": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_hidden_layers,
    )(config, self.adapter, self.dtype, name="layers")
    x, past = layers(x, own, views, scope.slots, deterministic)
    if cache is not None:
      cache = cache._replace(keys=past[0], values=past[1])
    return x, cache
