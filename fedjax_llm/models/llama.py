"""One config-driven Llama decoder, LoRA-parametrised, layers scanned.

Module names are Hugging Face's, so that a checkpoint's tensor names and a LoRA
target's name can be read off the parameter tree. Layers are stacked on axis 0.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedjax_llm.models import lora

LINEAR = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)

# Fields of a config.json that do not change what the model computes.
_IGNORED = frozenset(
  """_attn_implementation_autoset _name_or_path architectures attention_dropout
  bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
  initializer_range is_encoder_decoder label2id output_attentions
  output_hidden_states pad_token_id pretraining_tp problem_type return_dict
  torch_dtype transformers_version use_cache""".split()
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape of a Llama; the fields are those of Hugging Face's config.json.

  Attributes:
    vocab_size: number of tokens.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: query heads.
    num_key_value_heads: key and value heads; divides the query heads.
    head_dim: width of a head.
    max_position_embeddings: longest context the model was made for.
    rms_norm_eps: added to the mean square before its root.
    rope_theta: base of the rotary frequencies.
    rope_scaling: None, or the fields of rope type "llama3" or "linear".
    tie_word_embeddings: whether the output uses the input embedding.
    attention_bias: whether the attention projections have biases.
    mlp_bias: whether the feed-forward projections have biases.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int = 2048
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: tuple[tuple[str, Any], ...] | None = None
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
    """Reads the fields of a config.json, written by old or new transformers.

    Raises:
      ValueError: for another model type, or a field that would be computed
        wrongly because it is not honoured here.
    """
    fields = dict(fields)
    if (kind := fields.pop("model_type", None)) != "llama":
      raise ValueError(f'expected model_type "llama", got {kind!r}.')
    if (act := fields.pop("hidden_act", "silu")) != "silu":
      raise ValueError(f'expected hidden_act "silu", got {act!r}.')
    heads = fields["num_attention_heads"]
    known = {field.name for field in dataclasses.fields(cls)}
    rope = _rope_fields(fields)
    values = {name: fields.pop(name) for name in known & fields.keys()}
    if values.get("num_key_value_heads") is None:
      values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
      values["head_dim"] = values["hidden_size"] // heads
    if unknown := sorted(
      name
      for name in fields.keys() - _IGNORED
      if fields[name] not in (None, False)
    ):
      raise ValueError(
        f"config.json has fields that this Llama does not honour: {unknown}."
        " Computing without them could be wrong, so it is refused."
      )
    return cls(**(values | rope))

  def to_hugging_face(self) -> dict[str, Any]:
    """The fields of a config.json that transformers loads."""
    fields = dataclasses.asdict(self)
    scaling = dict(fields.pop("rope_scaling") or {"rope_type": "default"})
    theta = fields.pop("rope_theta")
    return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_act": "silu",
      **fields,
      "rope_parameters": {"rope_theta": theta, **scaling},
    }


def _rope_fields(fields: dict[str, Any]) -> dict[str, Any]:
  """Pops the rotary fields: `rope_parameters`, or the two older ones."""
  theta = fields.pop("rope_theta", None)
  older = fields.pop("rope_scaling", None)
  rope = dict(fields.pop("rope_parameters", None) or older or {})
  theta = rope.pop("rope_theta", theta) or 10000.0
  kind = rope.pop("rope_type", rope.pop("type", "default"))
  rope.pop("type", None)
  needed = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
  }
  if kind not in needed:
    raise ValueError(f"expected rope type in {sorted(needed)}, got {kind!r}.")
  if missing := sorted(set(needed[kind]) - rope.keys()):
    raise ValueError(f"rope type {kind!r} needs the fields {missing}.")
  scaling = (
    None
    if kind == "default"
    else (("rope_type", kind), *((name, rope[name]) for name in needed[kind]))
  )
  return {"rope_theta": float(theta), "rope_scaling": scaling}


def rotary_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half_head"]:
  """Radians per position of each pair of channels, scaled as the config says.

  Type "llama3" keeps the short wavelengths, divides the long ones by `factor`
  and blends between the two (Llama 3.1).
  """
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  frequencies = config.rope_theta**-exponents
  scaling = dict(config.rope_scaling or {"rope_type": "default"})
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
  cos, sin = (
    cos[None, :, None].astype(x.dtype),
    sin[None, :, None].astype(x.dtype),
  )
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
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
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
    remat: recompute activations in the backward pass: about a quarter of the
      memory for about a fifth more time.
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
