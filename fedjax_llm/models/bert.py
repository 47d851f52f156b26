"""BERT (Devlin et al., 2019) and encoders of the same shape, such as MiniLM."""

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
  stack,
)

# The dense layers of a block, then the dense layer of the pooler.
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
  # `cls` and `qa_outputs` are heads for pretraining and question answering.
  optional=("pooler", "cls", "qa_outputs"),
  renamed=(
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
  ),
  ignored=(r"embeddings\.(position|token_type)_ids$",),
)
# Fields of config.json that this model does not use. The `pooler_*` fields come
# from other models, whose configs were derived from BERT's.
_IGNORED = """classifier_dropout directionality pooler_fc_size
pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
pooler_type tie_word_embeddings""".split()


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The shape of an encoder, with the fields of a Hugging Face config.json.

  Attributes:
    vocab_size: number of tokens.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: number of heads; divides `hidden_size`.
    model_type: "bert".
    max_position_embeddings: number of learned positions; no row is longer.
    type_vocab_size: number of token types; only the first is used.
    layer_norm_eps: constant that is added to the variance before its root.
    hidden_act: activation of the feed-forward block, a key of
      `hub_config.ACTIVATIONS`.
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
    hub_config.check_heads(self)
    hub_config.check_activation(self)

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "BertConfig":
    """Makes a config from a config.json of any version of transformers.

    The dropouts in the config.json are ignored: they belong to the training of
    the base model. Fine-tuning uses the dropout of `lora.LoRA`.

    Raises:
      ValueError: if a field is missing or not supported.
    """
    positions = fields.get("position_embedding_type") or "absolute"
    known = ("position_embedding_type",) if positions == "absolute" else ()
    return encoder.read(cls, fields, (*_IGNORED, *known))

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """Returns the fields of a config.json that transformers loads.

    Args:
      head: the classification head, or None. transformers has no head that
        pools by the mean; for it, the config.json describes only the encoder.
    """
    alone = head is None or head.pooling == "mean"
    kind = "BertModel" if alone else "BertForSequenceClassification"
    fields = {"architectures": [kind], **hub_config.label_fields(head)}
    return fields | dataclasses.asdict(self)


class Embeddings(stack.Layer):
  """Embeds tokens and their positions; every token has the first type."""

  @nn.compact
  def __call__(self, tokens, positions):
    """Embeds `tokens` [batch, time] at `positions` [rows, time].

    `rows` is `batch`, or 1 if all rows have the same positions.
    """
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
    return encoder.norm(self, "LayerNorm")(x)


class SelfAttention(stack.Layer):
  """Two-sided self-attention without the output projection."""

  @nn.compact
  def __call__(self, x, mask):
    """Computes self-attention over `x` [batch, time, hidden]."""
    return encoder.attend(self, ("query", "key", "value"), x, mask)


class Output(stack.Layer):
  """A dense layer with its residual connection and layer norm."""

  @nn.compact
  def __call__(self, y, x):
    """Projects `y`, adds it to the stream `x` and normalises the sum."""
    y = self.dense("dense", y, self.config.hidden_size)
    return encoder.norm(self, "LayerNorm")(x + y)


class Attention(stack.Layer):
  """Self-attention with its residual connection."""

  @nn.compact
  def __call__(self, x, mask):
    """Updates the stream `x` [batch, time, hidden]."""
    y = self.part(SelfAttention, "self")(x, mask)
    return self.part(Output, "output")(y, x)


class Intermediate(stack.Layer):
  """The first half of the feed-forward block."""

  @nn.compact
  def __call__(self, x):
    """Applies a dense layer and the activation to `x` [batch, time, hidden]."""
    y = self.dense("dense", x, self.config.intermediate_size)
    return hub_config.ACTIVATIONS[self.config.hidden_act](y)


class Block(stack.Layer):
  """One layer: post-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, mask):
    """Applies the layer; one step of the scan over layers."""
    x = self.part(Attention, "attention")(x, mask)
    y = self.part(Intermediate, "intermediate")(x)
    return self.part(Output, "output")(y, x), None


class Pooler(stack.Layer):
  """The pretrained dense layer between the first token and a head."""

  @nn.compact
  def __call__(self, x):
    """Applies the layer and a tanh to the first tokens `x` [batch, hidden]."""
    return jnp.tanh(self.dense("dense", x, self.config.hidden_size))


class Bert(stack.Model):
  """An encoder: `apply({"params": frozen, "lora": trainable}, tokens)`.

  A head with the pooling "first" or None scores the pooler's output for the
  first token, as in transformers. A head with the pooling "mean" scores the
  mean over tokens, without the pooler, as in sentence encoders.
  """

  LAYERS = LAYERS
  POOLINGS = ("first", "mean")

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "..."]:
    """Computes the last hidden states, or with a head the scores of each row.

    Args:
      tokens: the token ids.
      segments: the documents of the tokens; see `models.attention`. None if
        each row is one document without padding.
      deterministic: whether dropout is off. Otherwise LoRA dropout is drawn
        from the rng "dropout".

    Returns:
      Hidden states [batch, time, hidden] in `dtype`, or scores [batch, labels]
      in float32.

    Raises:
      ValueError: if a row has more tokens than the model has positions.
    """
    stack.check_length(self.config, tokens.shape[1])
    own = (self.config, self.adapter, self.dtype, deterministic)
    scope, _ = attention.scope(tokens.shape, segments)
    (mask,) = scope.masks([None], causal=False)
    x = Embeddings(*own, name="embeddings")(tokens, scope.positions)
    x, _ = stack.layers(Block, self, deterministic, [nn.broadcast])(x, mask)
    if self.head is None:
      return x
    pooling = self.head.pooling or "first"
    x = heads.pool(x, segments, pooling)
    if pooling == "first":
      x = Pooler(*own, name="pooler")(x)
    trained = self.adapter is not None
    return heads.Head(self.head.labels, True, trained, name="classifier")(x)
