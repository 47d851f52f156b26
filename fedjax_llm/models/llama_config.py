"""The shape of a Llama, and how Hugging Face's config.json writes it down.

A field of a config.json is honoured, known to leave the logits as they are, or
refused by name: nothing is computed wrongly in silence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Fields of a config.json that do not change the logits: provenance, token ids,
# settings of training, generation and storage.
_IGNORED = frozenset(
  """architectures bos_token_id chunk_size_feed_forward do_sample dtype
  eos_token_id id2label initializer_range is_llama_config label2id
  length_penalty max_length max_new_tokens max_sequence_length name_or_path
  num_beam_groups num_beams num_return_sequences output_attentions
  output_hidden_states pad_token_id pretraining_tp problem_type
  repetition_penalty return_dict temperature tokenizer_class top_k top_p
  torch_dtype transformers.js_config transformers_version typical_p
  unsloth_fixed unsloth_version use_cache""".split()
)

# The fields that each type of rotary scaling needs.
_ROPE_FIELDS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
}


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
    head_dim: width of a head, even.
    max_position_embeddings: longest context the model was made for.
    rms_norm_eps: added to the mean square before its root.
    rope_theta: base of the rotary frequencies.
    rope_scaling: None, or the fields of rope type "llama3" or "linear" as
      pairs, the first being `("rope_type", ...)`.
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

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        "expected num_key_value_heads to divide num_attention_heads, got"
        f" {self.num_key_value_heads} and {self.num_attention_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"expected an even head_dim, got {self.head_dim}.")

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
    """Reads the fields of a config.json, written by old or new transformers.

    Raises:
      ValueError: for another model type, a field that is missing, or one that
        would be computed wrongly because it is not honoured here.
    """
    fields = dict(fields)
    if (kind := fields.pop("model_type", None)) != "llama":
      raise ValueError(f'expected model_type "llama", got {kind!r}.')
    if (act := fields.pop("hidden_act", "silu")) != "silu":
      raise ValueError(f'expected hidden_act "silu", got {act!r}.')
    rope = _pop_rope(fields)
    known = dataclasses.fields(cls)
    given = {x.name: fields.pop(x.name, None) for x in known}
    values = {name: x for name, x in given.items() if x is not None}
    # What is unknown and switched off changes nothing.
    if unknown := sorted(
      name
      for name, value in fields.items()
      if value and name not in _IGNORED and not name.startswith("_")
    ):
      raise ValueError(
        f"config.json has fields that this Llama does not honour: {unknown}."
        " Computing without them could be wrong, so it is refused."
      )
    heads = values.get("num_attention_heads", 1)
    width = values.get("hidden_size", heads)
    values = {"num_key_value_heads": heads, "head_dim": width // heads} | values
    required = [x.name for x in known if x.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
      raise ValueError(f"config.json needs the fields {missing}.")
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
      # transformers would assume Llama 2's ids, and stop at token 2.
      "bos_token_id": None,
      "eos_token_id": None,
      **fields,
      "rope_parameters": {"rope_theta": theta, **scaling},
    }


def _pop_rope(fields: dict[str, Any]) -> dict[str, Any]:
  """Pops the rotary fields: `rope_parameters`, or the older ones."""
  older = {
    "rope_theta": fields.pop("rope_theta", None),
    "partial_rotary_factor": fields.pop("partial_rotary_factor", None),
    **(fields.pop("rope_scaling", None) or {}),
  }
  rope = {**older, **(fields.pop("rope_parameters", None) or {})}
  theta = rope.pop("rope_theta") or 10000.0
  older_name = rope.pop("type", None) or "default"
  kind = rope.pop("rope_type", None) or older_name
  if kind not in _ROPE_FIELDS:
    raise ValueError(
      f"expected rope type in {sorted(_ROPE_FIELDS)}, got {kind!r}."
    )
  needed = _ROPE_FIELDS[kind]
  if missing := [name for name in needed if rope.get(name) is None]:
    raise ValueError(f"rope type {kind!r} needs the fields {missing}.")
  scaling = tuple((name, rope.pop(name)) for name in needed)
  if rope.pop("partial_rotary_factor", None) not in (None, 1):
    raise ValueError("expected partial_rotary_factor 1, the whole head.")
  rope.pop("original_max_position_embeddings", None)  # Of "llama3" alone.
  if unknown := sorted(name for name, value in rope.items() if value):
    raise ValueError(f"rope type {kind!r} does not honour {unknown}.")
  return {
    "rope_theta": float(theta),
    "rope_scaling": (("rope_type", kind), *scaling) if scaling else None,
  }
