"""BERT and ViT of every config, and in the company of transformers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import (
  bert,
  families,
  heads,
  lora,
  pretrained,
  tensor_files,
  vit,
)

# All widths differ, so that a shape tells which layer it belongs to.
BERT = bert.BertConfig(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=20,
)
VIT = vit.ViTConfig(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=12,
  patch_size=4,
)
VARIANTS = {
  "bert": (BERT, {}),
  "bert_gelu_new": (BERT, {"hidden_act": "gelu_new", "type_vocab_size": 1}),
  "bert_tanh": (BERT, {"hidden_act": "gelu_pytorch_tanh"}),
  "bert_relu": (BERT, {"hidden_act": "relu", "layer_norm_eps": 0.1}),
  "bert_silu": (BERT, {"hidden_act": "silu", "num_attention_heads": 2}),
  "vit": (VIT, {}),
  "vit_rectangle": (VIT, {"image_size": (13, 10), "patch_size": (2, 3)}),
  "vit_channels": (VIT, {"num_channels": 1, "num_attention_heads": 3}),
  "vit_no_bias": (VIT, {"qkv_bias": False, "hidden_act": "gelu_new"}),
  "vit_relu": (VIT, {"hidden_act": "relu", "layer_norm_eps": 0.1}),
}
HEAD = heads.Classifier(5)
ADAPTERS = {
  "bert": lora.LoRA(3, 6.0, targets=("dense", "key", "query", "value")),
  "vit": lora.LoRA(
    3, 6.0, targets=("fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj")
  ),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
  config, changes = VARIANTS[request.param]
  return dataclasses.replace(config, **changes)


@pytest.fixture
def params(draw):
  """Random parameters of a base model; its norms scale by about one."""

  def make(config, head=None):
    model = families.model(config, head=head)
    shapes = lora.abstract_variables(model)["params"]
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes))

  return make


@pytest.fixture(params=["bert", "vit"])
def classifier(request, params, lora_factors):
  """(config, adapter, a model with head and adapter, its variables)."""
  config = {"bert": BERT, "vit": VIT}[request.param]
  adapter = ADAPTERS[request.param]
  model = families.model(config, adapter, HEAD)
  values = params(config, HEAD)
  values.pop("classifier")
  variables = {"params": values, "lora": lora_factors(model)}
  return config, adapter, model, variables


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def inputs(config):
  """Inputs of three rows, and which of their states are no padding."""
  generator = np.random.default_rng(0)
  if config.model_type == "vit":
    pixels = generator.normal(size=(3, *config.image)).astype(np.float32)
    return (pixels,), ...
  segments = np.ones((3, 17), np.int32)
  segments[1, :4] = segments[2, 12:] = 0  # On the left, and on the right.
  return (generator.integers(0, 96, (3, 17)), segments), segments > 0


def reference_outputs(model, config):
  """What a model of transformers computes of `inputs`."""
  import torch

  given, _ = inputs(config)
  if config.model_type == "vit":
    pixels = torch.tensor(given[0]).permute(0, 3, 1, 2)
    return model.eval()(pixel_values=pixels)
  tokens, segments = given
  # Positions count from the first token that is no padding.
  positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
  values = (tokens, segments, positions)
  names = ("input_ids", "attention_mask", "position_ids")
  as_torch = lambda x: torch.tensor(x, dtype=torch.long)
  return model.eval()(**dict(zip(names, map(as_torch, values), strict=True)))


def equal(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_the_fields_of_a_config_go_both_ways(variant):
  fields = json.loads(json.dumps(variant.to_hugging_face(HEAD)))
  assert families.from_hugging_face(fields) == variant


def test_what_is_saved_is_loaded(variant, params, tmp_path, monkeypatch):
  values = params(variant, HEAD)
  for name, limit in {"one": 5_000_000_000, "many": 9_000}.items():
    monkeypatch.setattr(tensor_files, "_SHARD_BYTES", limit)
    folder = tmp_path / name
    pretrained.save(folder, variant, values, head=HEAD, dtype=jnp.float32)
    shards = len(list(folder.glob("*.safetensors")))
    assert (shards > 1) == (name == "many")
    config, loaded = pretrained.load(folder, head=HEAD)
    assert config == variant
    equal(loaded, values)
  # The head, and the pooler before it, are not in the way.
  without = params(variant)
  equal(pretrained.load(folder)[1], {x: values[x] for x in without})


def test_rematerialisation_changes_no_gradient(params, lora_factors):
  gradients = []
  for remat in (False, True):
    model = vit.ViT(VIT, ADAPTERS["vit"], HEAD, remat=remat)
    loss = lambda factors, params, model=model: (
      model.apply({"params": params, "lora": factors}, *inputs(VIT)[0]) ** 2
    ).sum()
    gradient = jax.jit(jax.grad(loss))
    gradients.append(gradient(lora_factors(model), params(VIT)))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, *gradients)


def test_dropout_is_drawn_in_training_alone(classifier):
  config, adapter, model, variables = classifier
  adapter = dataclasses.replace(adapter, dropout=0.3)
  dropping = families.model(config, adapter, HEAD)
  apply = jax.jit(
    lambda key: dropping.apply(
      variables, *inputs(config)[0], deterministic=False, rngs={"dropout": key}
    )
  )
  first, second = apply(jax.random.key(0)), apply(jax.random.key(1))
  assert np.abs(first - second).max() > 0.01
  given = variables, *inputs(config)[0]
  equal(compiled(dropping)(*given), compiled(model)(*given))


@pytest.mark.oracle
def test_states_equal_transformers(variant, params, tmp_path):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)
  values = params(variant)
  pretrained.save(tmp_path, variant, values, dtype=jnp.float32)
  reference = transformers.AutoModel.from_pretrained(
    tmp_path, add_pooling_layer=False
  )
  with torch.no_grad():
    expected = reference_outputs(reference, variant).last_hidden_state.numpy()
  given, real = inputs(variant)
  model = families.model(variant)
  got = np.asarray(compiled(model)({"params": values}, *given))
  np.testing.assert_allclose(got[real], expected[real], atol=1e-4, rtol=0)
  # In bfloat16, weights too.
  short = families.model(variant, dtype=jnp.bfloat16)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values)
  got = np.asarray(compiled(short)({"params": half}, *given), np.float32)[real]
  error = np.linalg.norm(got - expected[real])
  assert error < 0.02 * np.linalg.norm(expected[real])
