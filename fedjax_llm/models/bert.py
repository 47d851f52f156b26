"""BERT, and the encoders of its shape such as MiniLM (Devlin et al., 2019)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_llm.models import (
  attention,
  encoder,
  heads,
  hub_config,
  layout,
  lora,
)

# The dense layers of a block, and that of the pooler.
LAYERS = (
  "attention.self.query",
  "attention.self.key",
  "attention.self.value",
  "attention.output.dense",
  "intermediate.dense",
  "output.dense",
  "pooler.dense",
)
LAYOUT = layout.Layout(
  base="bert",
  layers="encoder.layer",
  heads=("classifier",),
  # `cls` and `qa_outputs` are the heads of pretraining and of questions.
  optional=("pooler", "cls", "qa_outputs"),
  renamed=(
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
  ),
  ignored=(r"embeddings\.(position|token_type)_ids$",),
)
# Fields of config.json that no part of the model computed here reads. The
# poolers are those of other models that were converted with BERT's.
_IGNORED = (
  "classifier_dropout",
  "directionality",
  "pooler_fc_size",
  "pooler_num_attention_heads",
  "pooler_num_fc_layers",
  "pooler_size_per_head",
  "pooler_type",
  "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The shape of an encoder; the fields are those of Hugging Face's config.

  Attributes:
    vocab_size: number of tokens.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads, which divide `hidden_size`.
    model_type: "bert".
    max_position_embeddings: longest row, as positions are learned.
    type_vocab_size: number of token types, of which the first is used.
    layer_norm_eps: added to the variance before its root.
    hidden_act: one of `encoder.ACTIVATIONS`.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  model_type: str = "bert"
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"

  def __post_init__(self):
    encoder.check(self)

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "BertConfig":
    """Reads the fields of a config.json, written by old or new transformers.

    The dropouts of the base model are settings of its own training, and are
    not applied: fine-tuning here has LoRA's.

    Raises:
      ValueError: for a field that is missing, or one that would be computed
        wrongly because it is not honoured here.
    """
    positions = fields.get("position_embedding_type") or "absolute"
    known = ("position_embedding_type",) if positions == "absolute" else ()
    return encoder.read(cls, fields, (*_IGNORED, *known))

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """The fields of a config.json that transformers loads.

    Args:
      head: what classifies a row. That of the mean over tokens is none of
        transformers': the folder's model is then the encoder alone.
    """
    alone = head is None or head.pooling == "mean"
    kind = "BertModel" if alone else "BertForSequenceClassification"
    fields = {"architectures": [kind], **hub_config.label_fields(head)}
    return fields | dataclasses.asdict(self)


class Embeddings(encoder.Layer):
  """Tokens and their positions; all tokens are of the first type."""

  @nn.compact
  def __call__(self, tokens, positions):
    """Embeds `tokens` [batch, time] at `positions` [rows, time]."""
    config = self.config

    def embed(name, number, ids):
      draw = nn.initializers.normal(0.02)
      table = nn.Embed(
        number,
        config.hidden_size,
        dtype=self.dtype,
        embedding_init=draw,
        name=name,
      )
      return table(ids)

    x = embed("word_embeddings", config.vocab_size, tokens)
    kinds = jnp.zeros((1, 1), jnp.int32)
    x = x + embed("token_type_embeddings", config.type_vocab_size, kinds)
    length = config.max_position_embeddings
    x = x + embed("position_embeddings", length, positions)
    return self.norm("LayerNorm")(x)


class SelfAttention(encoder.Layer):
  """Attention to both sides, without the output projection."""

  @nn.compact
  def __call__(self, x, mask, deterministic):
    """Attends from `x` [batch, time, hidden] to itself."""
    return self.attend(("query", "key", "value"), x, mask, deterministic)


class Output(encoder.Layer):
  """Back to the residual stream, which is normalised after the sum."""

  @nn.compact
  def __call__(self, y, x, deterministic):
    """Adds a projection of `y` to the stream `x`."""
    dense = self.dense("dense", self.config.hidden_size)
    return self.norm("LayerNorm")(x + dense(y, deterministic=deterministic))


class Attention(encoder.Layer):
  """Self-attention with its residual."""

  @nn.compact
  def __call__(self, x, mask, deterministic):
    """Updates the stream `x` [batch, time, hidden]."""
    shape = (self.config, self.adapter, self.dtype)
    y = SelfAttention(*shape, name="self")(x, mask, deterministic)
    return Output(*shape, name="output")(y, x, deterministic)


class Intermediate(encoder.Layer):
  """The first half of the feed-forward block."""

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies it to `x` [batch, time, hidden]."""
    dense = self.dense("dense", self.config.intermediate_size)
    y = dense(x, deterministic=deterministic)
    return encoder.ACTIVATIONS[self.config.hidden_act](y)


class Block(encoder.Layer):
  """One layer: attention and feed-forward, each normalised after its sum."""

  @nn.compact
  def __call__(self, x, mask, deterministic):
    """One step of the scan over layers; see `encoder.layers`."""
    shape = (self.config, self.adapter, self.dtype)
    x = Attention(*shape, name="attention")(x, mask, deterministic)
    y = Intermediate(*shape, name="intermediate")(x, deterministic)
    return Output(*shape, name="output")(y, x, deterministic), None


class Pooler(encoder.Layer):
  """What pretraining put between the first token and a head."""

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies it to the first tokens `x` [batch, hidden]."""
    dense = self.dense("dense", self.config.hidden_size)
    return jnp.tanh(dense(x, deterministic=deterministic))


class Bert(nn.Module):
  """An encoder: `apply({"params": frozen, "lora": trainable}, tokens)`.

  Attributes:
    config: the model's shape.
    adapter: what gets LoRA factors, or None for the base model alone.
    head: what classifies a row: its "first" token (or None), through the
      pooler, as transformers does; or the "mean" over tokens, without it, as
      sentence encoders do.
    dtype: what activations are computed in; scores are always float32.
    remat: recompute activations in the backward pass: much less memory for
      somewhat more time.
  """

  config: BertConfig
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Refuses an adapter or a pooling that this model does not have."""
    if self.adapter is not None:
      self.adapter.check(LAYERS)
    if self.head is not None:
      self.head.check("first", "mean")
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "..."]:
    """Hidden states of the last layer, or scores of each row.

    Args:
      tokens: the rows.
      segments: which tokens belong together, see `models.attention`; None for
        one document a row, without padding.
      deterministic: False to draw LoRA dropout from the rng "dropout".

    Returns:
      Hidden states [batch, time, hidden] in `dtype`, or scores [batch, labels]
      in float32.
    """
    config, shape = self.config, (self.config, self.adapter, self.dtype)
    if tokens.shape[1] > config.max_position_embeddings:
      raise ValueError(
        f"expected rows of at most {config.max_position_embeddings=} tokens,"
        f" got {tokens.shape[1]}. Cut them."
      )
    scope, _ = attention.scope(tokens.shape, segments)
    (mask,) = scope.masks([None], causal=False)
    x = Embeddings(*shape, name="embeddings")(tokens, scope.positions)
    x, _ = encoder.layers(Block, self)(x, mask, deterministic)
    if self.head is None:
      return x
    pooling = self.head.pooling or "first"
    x = heads.pool(x, segments, pooling)
    if pooling == "first":
      x = Pooler(*shape, name="pooler")(x, deterministic)
    trained = self.adapter is not None
    return heads.Head(self.head.labels, True, trained, name="classifier")(x)
