"""Tiny Llamas of every kind, and what their tests share."""

import dataclasses
import os

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import decoder, lora

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
LLAMA3 = (
  ("rope_type", "llama3"),
  ("factor", 8.0),
  ("low_freq_factor", 1.0),
  ("high_freq_factor", 4.0),
  ("original_max_position_embeddings", 32),
)
VARIANTS = {
  "plain": {},
  "grouped_queries": {"num_key_value_heads": 2},
  "tied": {"tie_word_embeddings": True},
  "llama3_rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
  "linear_rope": {"rope_scaling": (("rope_type", "linear"), ("factor", 2.0))},
  "attention_bias": {"attention_bias": True, "num_key_value_heads": 1},
  "mlp_bias": {"mlp_bias": True},
  "wide_heads": {"head_dim": 10},
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
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes, seed))

  return make


@pytest.fixture
def lora_factors(draw):
  """Random factors of a model; both are far from zero."""
  key = jax.random.key(0)
  return lambda model, seed=1: draw(lora.init(model, key), seed)


@pytest.fixture
def equations():
  """All equations of a jaxpr, those of inner jaxprs included."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  return lambda fn, *args: list(walk(jax.make_jaxpr(fn)(*args).jaxpr))
