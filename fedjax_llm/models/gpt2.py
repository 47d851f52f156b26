"""GPT-2: learned positions, norms with biases, one projection for q, k and v.

LoRA-parametrised and scanned over its layers as `models.decoder` is, with the
module names of Hugging Face's checkpoints. Their kernels lie [in, out], as ours
do (`Conv1D`).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedjax_llm.models import attention, gpt2_config, heads, layout, lora

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
_tanh_gelu = lambda x: nn.gelu(x, approximate=True)
_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "relu": nn.relu,
  "silu": nn.silu,
  "swish": nn.silu,
}


class Layer(nn.Module):
  """What the parts of a block share: the model's shape, adapter and dtype."""

  config: GPT2Config
  adapter: lora.LoRA | None
  dtype: Any

  def dense(self, name: str, features: int) -> lora.Dense:
    """A dense layer with a bias, and with factors if it is a target."""
    return lora.Dense(features, self.adapter, True, self.dtype, name=name)


class Attention(Layer):
  """Causal multi-head attention."""

  @nn.compact
  def __call__(self, x, depth, mask, past, slots, deterministic):
    """Attends from `x` [batch, time, hidden] to it and to what is `past`.

    Returns:
      What the layer adds, and its keys and values if there is a cache.
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
    """One step of the scan over layers.

    Args:
      x: the carry, [batch, time, hidden].
      own: the layer's (number from 1 if it matters, past keys and values).
      mask: which keys a query sees.
      slots: where the tokens are among the keys.
      deterministic: whether dropout is off.

    Returns:
      The next carry, and the layer's keys and values if there is a cache.
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
  # Some channels of GPT-2 are so large that the mean of the squares, less the
  # square of the mean, would keep few digits.
  return nn.LayerNorm(
    config.layer_norm_epsilon, dtype, use_fast_variance=False, name=name
  )


class GPT2(nn.Module):
  """GPT-2: `apply({"params": frozen, "lora": trainable}, tokens)`.

  Attributes:
    config: the model's shape.
    adapter: what gets LoRA factors, or None for the base model alone.
    head: None for a language model, else what classifies a row.
    dtype: what activations are computed in; logits are always float32.
    remat: recompute activations in the backward pass: much less memory for
      somewhat more time.
  """

  config: GPT2Config
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
    """A cache for `length` tokens of each of `batch` rows.

    Raises:
      ValueError: if the model has no positions for so many.
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

    Raises:
      ValueError: if the model has no positions for so many tokens a row.
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
    if self.head is not None:
      x = heads.pool(x, segments, self.head.pooling or "last")
      trained = self.adapter is not None
      return heads.Head(self.head.labels, False, trained, name="score")(x)
    flat = x.reshape(-1, config.hidden_size)
    if config.tie_word_embeddings:
      logits = wte.attend(flat)
    else:
      output = lora.Dense(config.vocab_size, dtype=self.dtype, name="lm_head")
      logits = output(flat)
    logits = logits.astype(jnp.float32).reshape(*tokens.shape, -1)
    return logits if cache is None else (logits, cache)

  def _check_length(self, length):
    if length > (most := self.config.max_position_embeddings):
      raise ValueError(
        f"GPT-2 has learned {most} positions, got {length} tokens a row;"
        " shorten the rows."
      )

  def _layers(self, x, scope, cache, deterministic):
    config = self.config
    numbers = 1 + jnp.arange(config.num_hidden_layers)
    own = (
      numbers if config.scale_attn_by_inverse_layer_idx else None,
      None if cache is None else (cache.keys, cache.values),
    )
    (mask,) = scope.masks([None])
    # prevent_cse is for loops that XLA unrolls; inside a scan it only costs.
    block = nn.remat(Block, prevent_cse=False, static_argnums=(5,))
    layers = nn.scan(
      block if self.remat else Block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "lora": True, "dropout": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_hidden_layers,
    )(config, self.adapter, self.dtype, name="layers")
    x, past = layers(x, own, mask, scope.slots, deterministic)
    if cache is not None:
      cache = cache._replace(keys=past[0], values=past[1])
    return x, cache
