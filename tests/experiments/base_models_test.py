"""A base model with what is trained of it, as every task loads it."""

import jax
import numpy as np
import pytest

from fedjax_llm.experiments import base_models
from fedjax_llm.federated import clients
from fedjax_llm.models import lora, pretrained


def load(model, adapter, **changes):
  settings = {
    "dtype": "float32",
    "quantize": None,
    "remat": False,
    "placement": None,
    "seed": 0,
  }
  return base_models.load(model, adapter, None, **settings | changes)


def test_with_an_adapter_the_factors_are_trained(toy_model):
  loaded = load(toy_model, lora.LoRA(rank=2))
  _, stored = pretrained.load(toy_model)
  jax.tree.map(np.testing.assert_array_equal, loaded.frozen, stored)
  names = {
    path[-1].key for path, _ in jax.tree.leaves_with_path(loaded.trainable)
  }
  assert names == {"a", "b"}
  assert loaded.placement == clients.Placement()
  assert loaded.adapter == lora.LoRA(rank=2)


def test_without_one_all_parameters_are_trained_in_float32(toy_model):
  loaded = load(toy_model, None, dtype="bfloat16")
  _, stored = pretrained.load(toy_model)
  jax.tree.map(np.testing.assert_array_equal, loaded.trainable, stored)
  assert loaded.frozen == {} and loaded.adapter is None
  with pytest.raises(ValueError, match="trains the kernels, got quantize="):
    load(toy_model, None, quantize="int8")


def test_a_seed_makes_the_factors(toy_model):
  draw = lambda seed: load(toy_model, lora.LoRA(rank=2), seed=seed).trainable
  jax.tree.map(np.testing.assert_array_equal, draw(1), draw(1))
  pairs = zip(jax.tree.leaves(draw(1)), jax.tree.leaves(draw(2)), strict=True)
  assert any(not np.array_equal(x, y) for x, y in pairs)


def test_what_is_saved_is_loaded_again(toy_model, tmp_path):
  loaded = load(toy_model, lora.LoRA(rank=2))
  moved = jax.tree.map(lambda x: x + 0.5, loaded.trainable)
  loaded.save(moved, tmp_path)
  again = load(toy_model, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again.trainable, moved)
  assert again.adapter.rank == 2
  assert again.identity["adapter_fingerprint"] == pretrained.fingerprint(
    tmp_path
  )
  same = "base_model_fingerprint"
  assert again.identity[same] == loaded.identity[same]


def test_a_whole_model_is_saved_as_a_model(toy_model, tmp_path):
  loaded = load(toy_model, None)
  moved = jax.tree.map(lambda x: x + 0.5, loaded.trainable)
  loaded.save(moved, tmp_path)
  _, stored = pretrained.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, stored, moved)
