import pytest
import transformers

from fedjax_llm.models import decoder, rotary

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
MISTRAL_7B = {
  "architectures": ["MistralForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 14336,
  "max_position_embeddings": 32768,
  "model_type": "mistral",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "use_cache": True,
  "vocab_size": 32000,
}
QWEN_25_05B = {
  "architectures": ["Qwen2ForCausalLM"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151643,
  "hidden_act": "silu",
  "hidden_size": 896,
  "initializer_range": 0.02,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 24,
  "model_type": "qwen2",
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "use_cache": True,
  "use_mrope": False,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
QWEN3_06B = QWEN_25_05B | {
  "attention_bias": False,
  "head_dim": 128,
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rope_scaling": None,
  "sliding_window": None,
}
GEMMA_2B = {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 2,
  "eos_token_id": 1,
  "head_dim": 256,
  "hidden_act": "gelu",
  "hidden_activation": None,
  "hidden_size": 2048,
  "intermediate_size": 16384,
  "max_position_embeddings": 8192,
  "model_type": "gemma",
  "num_attention_heads": 8,
  "num_hidden_layers": 18,
  "num_key_value_heads": 1,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "vocab_size": 256000,
}
GEMMA_2_2B = GEMMA_2B | {
  "attn_logit_softcapping": 50.0,
  "cache_implementation": "hybrid",
  "final_logit_softcapping": 30.0,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "model_type": "gemma2",
  "num_hidden_layers": 26,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
GEMMA_3_1B = {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "attn_logit_softcapping": None,
  "cache_implementation": "hybrid",
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "model_type": "gemma3_text",
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}
YARN = {
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
  "type": "yarn",
}
# The fields that hub configs have, in the names of their owners.
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
  "Mistral 7B": MISTRAL_7B,
  "Mistral 7B v0.3": MISTRAL_7B | {"sliding_window": None, "head_dim": 128},
  "Qwen 2.5": QWEN_25_05B,
  "Qwen 2.5 with a window": QWEN_25_05B
  | {"use_sliding_window": True, "max_window_layers": 20},
  "Qwen 2.5, long": QWEN_25_05B | {"rope_scaling": YARN},
  "Qwen 3": QWEN3_06B,
  "Gemma": GEMMA_2B,
  "Gemma 2": GEMMA_2_2B,
  "Gemma 3": GEMMA_3_1B,
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_is_read_as_transformers_does(name):
  config = decoder.DecoderConfig.from_hugging_face(HUB[name])
  fields = dict(HUB[name])
  reference = transformers.AutoConfig.for_model(
    fields.pop("model_type"), **fields
  )
  for field in ("num_key_value_heads", "hidden_size"):
    assert getattr(config, field) == getattr(reference, field)
  width = reference.hidden_size // reference.num_attention_heads
  assert config.head_dim == getattr(reference, "head_dim", width)
  assert config.tie_word_embeddings == reference.tie_word_embeddings
  rope = reference.rope_parameters
  if config.local_rope is not None:
    local = rope["sliding_attention"]
    assert config.local_rope == rotary.Rope.from_hugging_face(local)
    rope = rope["full_attention"]
  assert config.rope == rotary.Rope.from_hugging_face(rope)
  types = getattr(reference, "layer_types", None) or []
  windowed = [x == "sliding_attention" for x in types]
  if config.model_type != "mistral":
    assert list(config.windowed) == (windowed if any(windowed) else [])
  if any(config.windowed):
    assert config.sliding_window == reference.sliding_window
  softcaps = config.attention_softcap, config.final_softcap
  assert softcaps == (
    getattr(reference, "attn_logit_softcapping", None),
    getattr(reference, "final_logit_softcapping", None),
  )


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
    rope=rotary.Rope(
      500000.0,
      "llama3",
      (
        ("factor", 32.0),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
        ("original_max_position_embeddings", 8192),
      ),
    ),
    tie_word_embeddings=True,
  )


def test_what_is_written_is_read_back(variant):
  fields = variant.to_hugging_face()
  assert decoder.DecoderConfig.from_hugging_face(fields) == variant


def test_what_transformers_makes_of_it_is_read_back(variant):
  fields = variant.to_hugging_face()
  made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
  assert decoder.DecoderConfig.from_hugging_face(made.to_dict()) == variant


def test_transformers_does_not_stop_at_a_token_of_llama_2(config):
  reference = transformers.LlamaConfig(**config.to_hugging_face())
  assert reference.eos_token_id is None


@pytest.mark.parametrize(
  "change, named",
  [
    ({"model_type": "opt"}, "opt"),
    ({"hidden_act": "tanh"}, "tanh"),
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
    (GEMMA_3_1B | {"use_bidirectional_attention": True}, "bidirectional"),
    (GEMMA_2_2B | {"layer_types": ["linear_attention"] * 26}, "layer_types"),
    (GEMMA_2_2B | {"layer_types": ["sliding_attention"] * 3}, "26"),
    (QWEN_25_05B | {"use_mrope": True}, "use_mrope"),
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
