import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.experiments import loading
from fedjax_llm.models import adapters, families, heads, lora, pretrained

TOKENS = np.arange(1, 9, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def classifier(toy_model, tmp_path_factory):
  """The adapter of a classifier: its folder."""
  config, head = families.read_config(toy_model), heads.Classifier(3, "mean")
  settings = lora.LoRA(rank=2)
  trained = lora.init(families.model(config, settings, head), jax.random.key(0))
  folder = tmp_path_factory.mktemp("classifier")
  adapters.save(
    *(folder, trained, settings),
    config=config,
    base_model=str(toy_model),
    head=head,
  )
  return str(folder)


def test_a_model_alone_has_no_adapter(toy_model):
  loaded = loading.load(str(toy_model), None, jnp.float32)
  assert loaded.folder == toy_model
  assert (loaded.adapter, loaded.trained, loaded.head) == (None, None, None)
  config, params = pretrained.load(toy_model)
  assert loaded.config == config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  logits = loaded.network(jnp.float32).apply({"params": params}, TOKENS)
  assert logits.shape == (1, 8, config.vocab_size)


def test_an_adapter_names_its_model_and_moves_it(toy_model, toy_adapter):
  alone = loading.load(str(toy_model), None, jnp.float32)
  named = loading.load(None, toy_adapter, jnp.float32)
  told = loading.load(str(toy_model), toy_adapter, jnp.float32)
  assert named.folder == told.folder == toy_model
  assert named.adapter == told.adapter and named.adapter is not None
  logits = [
    x.network(jnp.float32).apply({"params": x.params, "lora": y}, TOKENS)
    for x, y in ((named, named.trained), (told, told.trained), (alone, {}))
  ]
  np.testing.assert_array_equal(logits[0], logits[1])
  assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_a_classifier_brings_its_head(classifier):
  loaded = loading.load(None, classifier, jnp.bfloat16)
  assert loaded.head == heads.Classifier(3, "mean")
  scores = loaded.network(jnp.bfloat16).apply(
    {"params": loaded.params, "lora": loaded.trained}, TOKENS
  )
  assert scores.shape == (1, 3)
  with pytest.raises(ValueError, match="whose task is classification"):
    loading.tokenizer_of(loaded)


def test_the_tokenizer_is_of_the_base_model(toy_adapter):
  tokenizer = loading.tokenizer_of(loading.load(None, toy_adapter, jnp.float32))
  assert (
    tokenizer.decode(tokenizer("17 4")["input_ids"], True).strip() == "17 4"
  )


def test_either_a_model_or_an_adapter_is_needed():
  with pytest.raises(ValueError, match="--adapter or both, got neither"):
    loading.load(None, None, jnp.float32)


def test_lengths_are_asked_for_or_the_context_or_the_most_of_a_task(toy_model):
  config = families.read_config(toy_model)
  length = lambda asked, most: loading.Settings(
    jnp.float32, sequence_length=asked, batch_size=1
  ).length(config, most)
  assert config.max_position_embeddings == 32
  assert length(None, None) == length(None, 2048) == 32
  assert length(None, 8) == 8
  # A user may ask for more than a task has by default.
  assert length(20, 8) == 20
  for asked in (33, 0, -1):
    with pytest.raises(ValueError, match=f"at most 32, .*got {asked}"):
      length(asked, None)


def test_batches_have_rows():
  for size in (0, -8):
    with pytest.raises(
      ValueError, match=f"--batch-size.*at least 1, got {size}"
    ):
      loading.Settings(jnp.float32, None, batch_size=size)


def test_a_run_is_the_adapter_or_the_model_that_it_exported(
  toy_model, toy_adapter, tmp_path
):
  for name, exported in (("lora", toy_adapter), ("full", str(toy_model))):
    shutil.copytree(exported, tmp_path / name / "adapter")
    (tmp_path / name / "run.json").write_text("{}")
  run = lambda name: loading.of_run(str(tmp_path / name))
  assert run("lora") == (None, str(tmp_path / "lora" / "adapter"))
  assert run("full") == (str(tmp_path / "full" / "adapter"), None)
  # So are the exports themselves.
  assert loading.of_run(toy_adapter) == (None, toy_adapter)
  assert loading.of_run(str(toy_model)) == (str(toy_model), None)
  shutil.rmtree(tmp_path / "lora" / "adapter")
  with pytest.raises(ValueError, match="expected a finished run"):
    run("lora")


def test_factors_that_do_not_fit_the_model_are_refused(
  toy_model, toy_adapter, tmp_path
):
  narrow = tmp_path / "narrow"
  shutil.copytree(toy_model, narrow)
  fields = json.loads((narrow / "config.json").read_text())
  fields["num_hidden_layers"] = 1
  (narrow / "config.json").write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="cannot place layer 1"):
    loading.load(str(narrow), toy_adapter, jnp.float32)
