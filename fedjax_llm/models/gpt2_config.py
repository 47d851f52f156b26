"""The shape of a GPT-2, read from and written to a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedjax_llm.models import heads, hub_config

# The fields of `GPT2Config`, each with its name in config.json.
_NAMES = {
  "vocab_size": "vocab_size",
  "hidden_size": "n_embd",
  "num_hidden_layers": "n_layer",
  "num_attention_heads": "n_head",
  "max_position_embeddings": "n_positions",
  "intermediate_size": "n_inner",
  "hidden_act": "activation_function",
  "layer_norm_epsilon": "layer_norm_epsilon",
  "scale_attn_weights": "scale_attn_weights",
  "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
  "tie_word_embeddings": "tie_word_embeddings",
}
# The dropouts belong to the training of the base model, `summary_*` to a head
# that is not loaded, and `n_ctx` to the mask. `reorder_and_upcast_attn` asks
# for attention weights in float32; this package always computes them so.
_IGNORED = """attn_pdrop embd_pdrop n_ctx reorder_and_upcast_attn resid_pdrop
summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj""".split()


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """The shape of a GPT-2 (Radford et al., 2019); by default, GPT-2 small.

  The dropouts in the config.json are ignored: they belong to the training of
  the base model. Fine-tuning uses the dropout of `lora.LoRA`.

  Attributes:
    vocab_size: number of tokens in the vocabulary.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block; None for
      `4 * hidden_size`.
    num_hidden_layers: number of blocks.
    num_attention_heads: number of heads; divides `hidden_size`.
    max_position_embeddings: number of learned positions; no row is longer.
    layer_norm_epsilon: constant that is added to the variance before its root.
    hidden_act: activation of the feed-forward block, a key of
      `hub_config.ACTIVATIONS`.
    scale_attn_weights: whether attention logits are divided by sqrt(head_dim).
    scale_attn_by_inverse_layer_idx: whether the attention logits of layer i,
      counted from 0, are divided by i + 1.
    tie_word_embeddings: whether the output uses the input embedding.
  """

  vocab_size: int = 50257
  hidden_size: int = 768
  intermediate_size: int | None = None
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 1024
  layer_norm_epsilon: float = 1e-5
  hidden_act: str = "gelu_new"
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  tie_word_embeddings: bool = True

  def __post_init__(self):
    hub_config.check_heads(self)
    hub_config.check_activation(self)

  @property
  def model_type(self) -> str:
    """The name of the family."""
    return "gpt2"

  @property
  def head_dim(self) -> int:
    """The width of a head."""
    return self.hidden_size // self.num_attention_heads

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "GPT2Config":
    """Makes a config from the fields of a config.json.

    Raises:
      ValueError: if the model type or a field is not supported.
    """
    given = hub_config.Fields(fields)
    given.choose("model_type", ("gpt2",))
    values = given.take(_NAMES)
    given.finish("gpt2", _IGNORED)
    return cls(**values)

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """Returns the fields of a config.json that transformers loads.

    Args:
      head: the classification head; None for a language model.

    Raises:
      ValueError: if transformers has no head with this pooling.
    """
    if head is not None:
      head.check("last")
    kind = "LMHeadModel" if head is None else "ForSequenceClassification"
    return {
      "architectures": [f"GPT2{kind}"],
      **hub_config.label_fields(head),
      "model_type": self.model_type,
      **hub_config.NO_TOKEN_IDS,
      **{written: getattr(self, name) for name, written in _NAMES.items()},
    }
