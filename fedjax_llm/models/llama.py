"""One config-driven Llama decoder, LoRA-parametrised, layers scanned.

Module names are Hugging Face's, so that a checkpoint's tensor names and a LoRA
target's name can be read off the parameter tree. Layers are stacked on axis 0.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedjax_llm.models import llama_config, lora

LINEAR = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)

LlamaConfig = llama_config.LlamaConfig


def rotary_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half_head"]:
  """Radians per position of each pair of channels, scaled as the config says.

  Type "llama3" keeps the short wavelengths, divides the long ones by `factor`
  and blends between the two (Llama 3.1).
  """
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  frequencies = config.rope_theta**-exponents
  scaling: dict[str, Any] = dict(
    config.rope_scaling or {"rope_type": "default"}
  )
  if scaling["rope_type"] == "linear":
    return frequencies / scaling["factor"]
  if scaling["rope_type"] == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies
    turns = turns / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])
  return frequencies


def _rotate(x, cos, sin):
  """Rotates channel i with i + half (Hugging Face's order)."""
  cos, sin = (angles[None, :, None].astype(x.dtype) for angles in (cos, sin))
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


class RMSNorm(nn.Module):
  """Divides by the root mean square in float32, then scales."""

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Applies the norm over the last axis."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon
    )
    scale = jnp.expand_dims(scale.astype(self.dtype), range(x.ndim - 1))
    return x.astype(self.dtype) * scale


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions."""

  config: LlamaConfig
  adapter: lora.LoRA | None
  dtype: Any

  @nn.compact
  def __call__(self, x, cos, sin, deterministic):
    """Attends within each row of `x` [batch, time, hidden]."""
    config = self.config
    batch, time, _ = x.shape

    def project(name, heads):
      dense = lora.Dense(
        heads * config.head_dim,
        self.adapter,
        config.attention_bias,
        self.dtype,
        name=name,
      )
      y = dense(x, deterministic=deterministic)
      return y.reshape(batch, time, heads, config.head_dim)

    query = _rotate(project("q_proj", config.num_attention_heads), cos, sin)
    key = _rotate(project("k_proj", config.num_key_value_heads), cos, sin)
    value = project("v_proj", config.num_key_value_heads)
    # The backward pass computes the [time, time] probabilities again: it costs
    # no time that could be measured, and to keep those of all layers memory.
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    y = jax.checkpoint(attend, prevent_cse=False)(query, key, value)
    output = lora.Dense(
      config.hidden_size,
      self.adapter,
      config.attention_bias,
      self.dtype,
      name="o_proj",
    )
    return output(y.reshape(batch, time, -1), deterministic=deterministic)


class FeedForward(nn.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  config: LlamaConfig
  adapter: lora.LoRA | None
  dtype: Any

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies the block to `x` [batch, time, hidden]."""

    def dense(name, features, x):
      layer = lora.Dense(
        features, self.adapter, self.config.mlp_bias, self.dtype, name=name
      )
      return layer(x, deterministic=deterministic)

    width = self.config.intermediate_size
    hidden = nn.silu(dense("gate_proj", width, x)) * dense("up_proj", width, x)
    return dense("down_proj", self.config.hidden_size, hidden)


class Block(nn.Module):
  """One layer: pre-norm attention and feed-forward with residuals."""

  config: LlamaConfig
  adapter: lora.LoRA | None
  dtype: Any

  @nn.compact
  def __call__(self, x, cos, sin, deterministic):
    """Returns the next carry of the scan over layers, and no output."""
    norm = lambda name: RMSNorm(self.config.rms_norm_eps, self.dtype, name=name)
    shape = (self.config, self.adapter, self.dtype)
    attention = Attention(*shape, name="self_attn")
    feed_forward = FeedForward(*shape, name="mlp")
    x = x + attention(norm("input_layernorm")(x), cos, sin, deterministic)
    x = x + feed_forward(norm("post_attention_layernorm")(x), deterministic)
    return x, None


class Llama(nn.Module):
  """Llama 1-3: `apply({"params": frozen, "lora": factors}, tokens)`.

  Attributes:
    config: the model's shape.
    adapter: what gets LoRA factors, or None for the base model alone.
    dtype: what activations are computed in; logits are always float32.
    remat: recompute activations in the backward pass: much less memory for
      somewhat more time.
  """

  config: LlamaConfig
  adapter: lora.LoRA | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Refuses an adapter whose targets are not layers of the model."""
    if self.adapter is not None:
      self.adapter.check(LINEAR)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "batch time"], *, deterministic: bool = True
  ) -> Float[Array, "batch time vocab"]:
    """Logits of the next token at every position.

    Args:
      tokens: rows that start at position 0; padding goes to the right, where
        causal attention keeps it from mattering.
      deterministic: False to draw LoRA dropout from the rng "dropout".

    Returns:
      Logits in float32.
    """
    config = self.config
    embed = nn.Embed(
      config.vocab_size,
      config.hidden_size,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(0.02),
      name="embed_tokens",
    )
    angles = np.outer(np.arange(tokens.shape[1]), rotary_frequencies(config))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    # prevent_cse is for loops that XLA unrolls; inside a scan it only costs.
    block = nn.remat(Block, prevent_cse=False, static_argnums=(4,))
    layers = nn.scan(
      block if self.remat else Block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "lora": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_hidden_layers,
    )(config, self.adapter, self.dtype, name="layers")
    x, _ = layers(embed(tokens), cos, sin, deterministic)
    x = RMSNorm(config.rms_norm_eps, self.dtype, name="norm")(x)
    if config.tie_word_embeddings:
      logits = embed.attend(x.reshape(-1, config.hidden_size))
    else:
      head = lora.Dense(config.vocab_size, dtype=self.dtype, name="lm_head")
      logits = head(x.reshape(-1, config.hidden_size))
    return logits.astype(jnp.float32).reshape(*tokens.shape, -1)
