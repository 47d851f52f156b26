"""The shape of a decoder, read from and written to a Hugging Face config.json.

Each field of a config.json is used, or known not to change the logits. Any
other field is an error, so that no model is silently computed wrongly.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjax_llm.models import heads, hub_config, rotary


class _Family(NamedTuple):
  """The properties of all models of one `model_type`.

  Attributes:
    architecture: the class of the language model in transformers.
    fixed: the values of `DecoderConfig` fields that config.json does not have.
    defaults: the values of config.json fields that may be absent.
    renamed: the config.json names of `DecoderConfig` fields not in `_SHARED`.
  """

  architecture: str
  fixed: Mapping[str, Any] = {}
  defaults: Mapping[str, Any] = {}
  renamed: Mapping[str, str] = {}

  @property
  def names(self) -> dict[str, str]:
    """The config.json name of each `DecoderConfig` field that is copied."""
    return {**{name: name for name in _SHARED}, **self.renamed}


_BIAS = {"qkv_bias": "attention_bias"}
_CAPS = {
  "attention_softcap": "attn_logit_softcapping",
  "final_softcap": "final_logit_softcapping",
}
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
_WINDOWS |= {"max_window_layers": 28}
_GEMMA = {"unit_offset": True, "scaled_embeddings": True}
_GEMMA_DEFAULTS = {
  "head_dim": 256,
  "tie_word_embeddings": True,
  "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA_2_DEFAULTS = _GEMMA_DEFAULTS | {
  "sliding_window": 4096,
  "query_pre_attn_scalar": 256,
}
_FAMILIES = {
  "llama": _Family(
    "LlamaForCausalLM", renamed=_BIAS | {"mlp_bias": "mlp_bias"}
  ),
  "mistral": _Family("MistralForCausalLM", defaults={"sliding_window": 4096}),
  "qwen2": _Family("Qwen2ForCausalLM", {"qkv_bias": True}, _WINDOWS),
  "qwen3": _Family(
    "Qwen3ForCausalLM", {"qk_norm": True}, _WINDOWS | {"head_dim": 128}, _BIAS
  ),
  "gemma": _Family("GemmaForCausalLM", _GEMMA, _GEMMA_DEFAULTS, _BIAS),
  "gemma2": _Family(
    "Gemma2ForCausalLM",
    _GEMMA | {"sandwich_norms": True},
    _GEMMA_2_DEFAULTS
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    _BIAS | _CAPS,
  ),
  "gemma3_text": _Family(
    "Gemma3ForCausalLM",
    _GEMMA | {"sandwich_norms": True, "qk_norm": True},
    _GEMMA_2_DEFAULTS,
    _BIAS | _CAPS,
  ),
}
MODEL_TYPES = tuple(_FAMILIES)
_WINDOW, _FULL = "sliding_attention", "full_attention"
# Fields that have the same name in `DecoderConfig` and in config.json.
_SHARED = """vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads head_dim max_position_embeddings
rms_norm_eps tie_word_embeddings query_pre_attn_scalar""".split()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder, mostly with the fields of a Hugging Face config.

  Attributes:
    model_type: family, one of `MODEL_TYPES`.
    vocab_size: number of tokens in the vocabulary.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: number of query heads.
    num_key_value_heads: number of key and value heads; divides the number of
      query heads.
    head_dim: width of a head, an even number.
    max_position_embeddings: longest context the model was trained for.
    rms_norm_eps: constant that is added to the mean square before its root.
    rope: rotary positions.
    local_rope: rotary positions of windowed layers; None for `rope`.
    sliding_window: number of tokens that a layer with a window sees.
    windowed: whether each layer has the window; empty if none has.
    hidden_act: activation of the gate, a key of `hub_config.ACTIVATIONS`.
    tie_word_embeddings: whether the output uses the input embedding.
    qkv_bias: whether query, key and value projections have biases.
    mlp_bias: whether feed-forward projections have biases.
    qk_norm: whether queries and keys are normalised (Qwen 3, Gemma 3).
    unit_offset: whether the norms scale by 1 + scale (Gemma).
    sandwich_norms: whether block outputs are normalised too (Gemma 2 and 3).
    scaled_embeddings: whether embeddings are multiplied by sqrt(hidden_size).
    query_pre_attn_scalar: number whose square root divides the attention
      logits; None for `head_dim`.
    attention_softcap: tanh bound of the attention logits; None for no bound.
    final_softcap: tanh bound of the output logits; None for no bound.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  model_type: str = "llama"
  max_position_embeddings: int = 2048
  rms_norm_eps: float = 1e-6
  rope: rotary.Rope = rotary.Rope()
  local_rope: rotary.Rope | None = None
  sliding_window: int | None = None
  windowed: tuple[bool, ...] = ()
  hidden_act: str = "silu"
  tie_word_embeddings: bool = False
  qkv_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  unit_offset: bool = False
  sandwich_norms: bool = False
  scaled_embeddings: bool = False
  query_pre_attn_scalar: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        "expected num_key_value_heads to divide num_attention_heads, got"
        f" {self.num_key_value_heads} and {self.num_attention_heads}."
      )
    hub_config.check_activation(self)
    if self.head_dim % 2:
      raise ValueError(f"expected an even head_dim, got {self.head_dim}.")
    if self.windowed and len(self.windowed) != self.num_hidden_layers:
      raise ValueError(
        f"expected {self.num_hidden_layers} layer types, the number of layers,"
        f" got {len(self.windowed)}."
      )

  @property
  def output_bias(self) -> bool:
    """Whether the output projection of attention has a bias (not in Qwen 2)."""
    return self.qkv_bias and self.model_type != "qwen2"

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
    """Makes a config from a config.json of any version of transformers.

    Raises:
      ValueError: if the model type or a field is not supported, or a field is
        missing.
    """
    given = hub_config.Fields(fields)
    kind = given.choose("model_type", MODEL_TYPES)
    family = _FAMILIES[kind]
    given.default(family.defaults)
    values: dict[str, Any] = {"model_type": kind, **family.fixed}
    values["hidden_act"] = _pop_act(given, kind)
    values |= _pop_layers(given, kind) | _pop_rope(given, kind)
    values |= given.take(family.names)
    given.finish(kind)
    if heads := values.get("num_attention_heads"):
      values.setdefault("num_key_value_heads", heads)
      values.setdefault("head_dim", values.get("hidden_size", 0) // heads)
    return hub_config.build(cls, values)

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """Returns the fields of a config.json that transformers loads.

    Args:
      head: the classification head; None for a language model.

    Raises:
      ValueError: if transformers has no head with this pooling.
    """
    family = _FAMILIES[self.model_type]
    fields = {
      written: getattr(self, name) for name, written in family.names.items()
    }
    if self.query_pre_attn_scalar is None:
      del fields["query_pre_attn_scalar"]
    rope = self.rope.to_hugging_face()
    if self.local_rope is not None:
      rope = {_FULL: rope, _WINDOW: self.local_rope.to_hugging_face()}
    if "sliding_window" in family.defaults:
      fields["sliding_window"] = self.sliding_window
      windowed = self.windowed or (False,) * self.num_hidden_layers
      if self.model_type != "mistral":
        fields["layer_types"] = [_WINDOW if x else _FULL for x in windowed]
    if "use_sliding_window" in family.defaults:
      fields["use_sliding_window"] = self.sliding_window is not None
    act = "hidden_activation" if self.sandwich_norms else "hidden_act"
    architecture = family.architecture
    if head is not None:
      head.check("last")  # transformers has no head with mean pooling.
      architecture = architecture.replace("CausalLM", "SequenceClassification")
    return {
      "architectures": [architecture],
      **hub_config.label_fields(head),
      "model_type": self.model_type,
      act: self.hidden_act,
      **hub_config.NO_TOKEN_IDS,
      **fields,
      "rope_parameters": rope,
    }


def _pop_act(given: hub_config.Fields, kind: str) -> str:
  """Takes out the activation of the gate."""
  older = given.pop("hidden_act") or "silu"
  act = given.pop("hidden_activation") or older
  # Gemma's first configs call the tanh approximation "gelu".
  is_older = kind == "gemma" and act == "gelu"
  return "gelu_pytorch_tanh" if is_older else act


def _pop_layers(given: hub_config.Fields, kind: str) -> dict[str, Any]:
  """Takes out the size of the sliding window and the layers that have it."""
  if "sliding_window" not in _FAMILIES[kind].defaults:
    return {}
  window, types = given.pop("sliding_window"), given.pop("layer_types")
  first = given.pop("max_window_layers")
  older = given.pop("sliding_window_pattern")
  pattern = given.pop("_sliding_window_pattern") or older or 6
  layers = range(given.peek("num_hidden_layers") or 0)
  if "use_sliding_window" in _FAMILIES[kind].defaults:
    window = window if given.pop("use_sliding_window") else None
  if types is not None and set(types) - {_WINDOW, _FULL}:
    raise ValueError(
      f"expected layer_types {_WINDOW!r} or {_FULL!r}, got {set(types)}."
    )
  if types is not None:
    windowed = [x == _WINDOW for x in types]
  elif kind == "mistral":
    windowed = [True for _ in layers]
  elif kind == "gemma2":
    windowed = [layer % 2 == 0 for layer in layers]
  elif kind == "gemma3_text":
    windowed = [(layer + 1) % pattern > 0 for layer in layers]
  else:
    windowed = [layer >= (first or 0) for layer in layers]
  if window is None or not any(windowed):
    return {}
  return {"sliding_window": window, "windowed": tuple(windowed)}


def _pop_rope(given: hub_config.Fields, kind: str) -> dict[str, Any]:
  """Takes out the rotary fields: `rope_parameters`, or their older names."""
  older = {
    "rope_theta": given.pop("rope_theta"),
    "partial_rotary_factor": given.pop("partial_rotary_factor"),
    **(given.pop("rope_scaling") or {}),
  }
  rope = given.pop("rope_parameters") or {}
  if kind != "gemma3_text":
    return {"rope": rotary.Rope.from_hugging_face({**older, **rope})}
  older["rope_theta"] = older["rope_theta"] or 1_000_000.0
  local = {"rope_theta": given.pop("rope_local_base_freq")}
  return {
    "rope": rotary.Rope.from_hugging_face({**older, **(rope.get(_FULL) or {})}),
    "local_rope": rotary.Rope.from_hugging_face(
      {**local, **(rope.get(_WINDOW) or {})}
    ),
  }
