"""Tiny decoders of every kind, and what their tests share."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import decoder, lora, rotary

# transformers and peft must not ask the hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# All widths differ, so that a shape tells which layer it belongs to.
BASE = decoder.DecoderConfig(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=6,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
)
LLAMA3 = rotary.Rope(
  500.0,
  "llama3",
  (
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 32),
  ),
)
YARN = rotary.Rope(
  100.0,
  "yarn",
  (("factor", 4.0), ("original_max_position_embeddings", 16)),
)
GEMMA = {
  "hidden_act": "gelu_pytorch_tanh",
  "tie_word_embeddings": True,
  "unit_offset": True,
  "scaled_embeddings": True,
}
GEMMA2 = GEMMA | {
  "model_type": "gemma2",
  "sandwich_norms": True,
  "query_pre_attn_scalar": 9,
  "attention_softcap": 1.5,
  "final_softcap": 2.0,
  "sliding_window": 5,
  "windowed": (True, False, True),
  "num_hidden_layers": 3,
}
QWEN3 = {"model_type": "qwen3", "qk_norm": True, "head_dim": 10}
VARIANTS = {
  "llama": {},
  "grouped_queries": {"num_key_value_heads": 2},
  "tied": {"tie_word_embeddings": True},
  "llama3_rope": {"rope": LLAMA3},
  "linear_rope": {"rope": rotary.Rope(1e4, "linear", (("factor", 2.0),))},
  "yarn_rope": {"rope": YARN},
  "llama_attention_bias": {"qkv_bias": True, "num_key_value_heads": 1},
  "mlp_bias": {"mlp_bias": True},
  "wide_heads": {"head_dim": 10},
  "exact_gelu": {"hidden_act": "gelu"},
  "mistral": {
    "model_type": "mistral",
    "sliding_window": 5,
    "windowed": (True, True),
    "num_key_value_heads": 2,
  },
  "mistral_without_window": {"model_type": "mistral", "head_dim": 8},
  "qwen2": {"model_type": "qwen2", "qkv_bias": True, "num_key_value_heads": 2},
  "qwen2_window": {
    "model_type": "qwen2",
    "qkv_bias": True,
    "sliding_window": 4,
    "windowed": (False, True),
    "rope": YARN,
  },
  "qwen3": QWEN3,
  "qwen3_bias": QWEN3 | {"qkv_bias": True, "tie_word_embeddings": True},
  "gemma": GEMMA | {"model_type": "gemma", "num_key_value_heads": 1},
  "gemma2": GEMMA2,
  "gemma2_uncapped": GEMMA2
  | {"attention_softcap": None, "final_softcap": None, "qkv_bias": True},
  "gemma3": GEMMA2
  | {
    "model_type": "gemma3_text",
    "qk_norm": True,
    "attention_softcap": None,
    "final_softcap": None,
    "local_rope": rotary.Rope(100.0),
    "rope": rotary.Rope(1e4, "linear", (("factor", 8.0),)),
    "num_key_value_heads": 2,
  },
}


@pytest.fixture
def config():
  return dataclasses.replace(BASE, num_key_value_heads=2)


@pytest.fixture(params=VARIANTS)
def variant(request):
  """A config of each kind."""
  return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def tokens():
  return np.random.default_rng(0).integers(0, 96, (3, 17), np.int32)


@pytest.fixture
def draw():
  """Fills a tree with noise, so that no bias, norm or factor is trivial."""

  def fill(tree, seed=0, scale=0.2):
    generator = np.random.default_rng(seed)
    noise = lambda x: scale * generator.standard_normal(x.shape)
    return jax.tree.map(lambda x: jnp.asarray(noise(x), jnp.float32), tree)

  return fill


@pytest.fixture
def base_params(draw):
  """Random parameters of a base model; its norms scale by about one."""

  def make(config, seed=0):
    shapes = jax.eval_shape(
      decoder.Decoder(config).init,
      jax.random.key(0),
      jnp.zeros((1, 1), jnp.int32),
    )["params"]
    one = 0 if config.unit_offset else 1
    around_one = lambda path, x: x + one * (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes, seed))

  return make


@pytest.fixture
def lora_factors(draw):
  """Random factors of a model; both are far from zero."""
  key = jax.random.key(0)
  return lambda model, seed=1: draw(lora.init(model, key), seed)
