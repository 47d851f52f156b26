import dataclasses

import pytest
import transformers

from fedjax_llm.models import decoder

LLAMA_2_7B = {
  "_name_or_path": "meta-llama/Llama-2-7b-hf",
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 11008,
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "torch_dtype": "float16",
  "transformers_version": "4.31.0.dev0",
  "use_cache": True,
  "vocab_size": 32000,
}
LLAMA_32_1B = LLAMA_2_7B | {
  "_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
  "attention_bias": False,
  "attention_dropout": 0.0,
  "eos_token_id": [128001, 128008, 128009],
  "head_dim": 64,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
  "_commit_hash": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
}
LLAMA_1 = {
  name: value
  for name, value in LLAMA_2_7B.items()
  if name not in ("num_key_value_heads", "rope_scaling", "pretraining_tp")
} | {"max_sequence_length": 2048, "pad_token_id": -1}
# The fields that hub configs have beyond these, in the names of their owners.
HUB = {
  "Llama 1": LLAMA_1,
  "Llama 2": LLAMA_2_7B,
  "Llama 3.2": LLAMA_32_1B,
  "TinyLlama": LLAMA_2_7B | {"num_key_value_heads": 4, "hidden_size": 2048},
  "SmolLM2": LLAMA_2_7B
  | {
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
  },
  "Vicuna 16k": LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 4}},
  "Unsloth": LLAMA_32_1B | {"unsloth_fixed": True},
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_is_read(name):
  config = decoder.DecoderConfig.from_hugging_face(HUB[name])
  reference = transformers.LlamaConfig(**HUB[name])
  for field in ("num_key_value_heads", "head_dim", "hidden_size"):
    assert getattr(config, field) == getattr(reference, field)
  assert config.rope_theta == reference.rope_parameters["rope_theta"]
  kind = dict(config.rope_scaling or {"rope_type": "default"})["rope_type"]
  assert kind == reference.rope_parameters["rope_type"]


def test_every_field_of_llama_32_is_read():
  assert decoder.DecoderConfig.from_hugging_face(
    LLAMA_32_1B
  ) == decoder.DecoderConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=(
      ("rope_type", "llama3"),
      ("factor", 32.0),
      ("low_freq_factor", 1.0),
      ("high_freq_factor", 4.0),
      ("original_max_position_embeddings", 8192),
    ),
    tie_word_embeddings=True,
  )


def test_what_is_written_is_read_back(variant):
  fields = variant.to_hugging_face()
  assert decoder.DecoderConfig.from_hugging_face(fields) == variant


def test_what_transformers_makes_of_it_is_read_back(variant):
  fields = transformers.LlamaConfig(**variant.to_hugging_face()).to_dict()
  assert decoder.DecoderConfig.from_hugging_face(fields) == variant


def test_transformers_does_not_stop_at_a_token_of_llama_2(config):
  reference = transformers.LlamaConfig(**config.to_hugging_face())
  assert reference.eos_token_id is None


@pytest.mark.parametrize(
  "change, named",
  [
    ({"model_type": "mistral"}, "mistral"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary"),
    ({"rope_parameters": {"beta_fast": 32}}, "beta_fast"),
    ({"num_key_value_heads": 5}, "divide"),
    ({"head_dim": 5}, "even"),
    ({"vocab_size": None, "hidden_size": None}, "'vocab_size', 'hidden_size'"),
  ],
)
def test_what_is_not_honoured_is_refused_by_name(change, named):
  with pytest.raises(ValueError, match=named):
    decoder.DecoderConfig.from_hugging_face(LLAMA_2_7B | change)


def test_every_unknown_field_is_named_at_once():
  fields = LLAMA_2_7B | {"sliding_window": 7, "logit_scale": 2.0}
  with pytest.raises(ValueError, match="logit_scale.*sliding_window"):
    decoder.DecoderConfig.from_hugging_face(fields)


def test_the_config_is_one_class_under_both_names():
  assert decoder.DecoderConfig is llama_config.LlamaConfig
  assert dataclasses.is_dataclass(decoder.DecoderConfig)
