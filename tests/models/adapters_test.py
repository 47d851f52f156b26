import dataclasses
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import (
  adapters,
  bert,
  decoder,
  heads,
  lora,
  pretrained,
  vit,
)

SETTINGS = lora.LoRA(
  rank=3, alpha=6.0, dropout=0.1, targets=("down_proj", "q_proj", "v_proj")
)

BERT = bert.BertConfig(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=20,
)


@pytest.fixture
def model(config):
  return decoder.Decoder(config, SETTINGS)


@pytest.fixture
def factors(model, lora_factors):
  return lora_factors(model)


@pytest.fixture
def folder(factors, config, tmp_path):
  adapters.save(
    tmp_path / "adapter", factors, SETTINGS, config=config, base_model="tiny"
  )
  return tmp_path / "adapter"


def edit(folder, change):
  """Rewrites the weights with what `change` makes of the tensors."""
  path = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def edit_fields(folder, **changes):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded_bit_for_bit(folder, factors, model, config):
  settings, loaded = adapters.load(folder, config)
  assert settings == SETTINGS
  jax.tree.map(np.testing.assert_array_equal, loaded, factors)
  lora.check(model, loaded)


def test_what_is_loaded_is_saved_bit_for_bit(folder, tmp_path, config):
  settings, loaded = adapters.load(folder, config)
  adapters.save(
    tmp_path / "again", loaded, settings, config=config, base_model="tiny"
  )
  for file in folder.iterdir():
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_factors_are_stored_as_peft_does(folder, factors):
  tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
  ours = factors["layers"]["mlp"]["down_proj"]
  np.testing.assert_array_equal(tensors[name.format("A")], ours["a"][1].T)
  np.testing.assert_array_equal(tensors[name.format("B")], ours["b"][1].T)
  assert len(tensors) == 2 * 2 * 3


def test_the_settings_are_stored_as_peft_does(folder):
  fields = json.loads((folder / "adapter_config.json").read_text())
  assert fields["r"] == 3
  assert fields["lora_alpha"] == 6
  assert fields["target_modules"] == ["down_proj", "q_proj", "v_proj"]
  assert fields["base_model_name_or_path"] == "tiny"


def test_factors_stored_in_bfloat16_are_read_as_float32(
  folder, factors, config
):
  def shorten(tensors):
    for name in tensors:
      tensors[name] = np.asarray(jnp.asarray(tensors[name], jnp.bfloat16))

  edit(folder, shorten)
  _, loaded = adapters.load(folder, config)
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  expected = jax.tree.map(rounded, factors)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize(
  "field, value",
  [
    ("peft_type", "IA3"),
    ("bias", "all"),
    ("use_dora", True),
    ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", [5]),
    ("target_parameters", ["experts"]),
    ("lora_bias", True),
    ("use_qalora", True),
    ("init_lora_weights", "pissa"),
    ("a_feature_of_the_future", True),
  ],
)
def test_other_features_of_peft_are_refused_by_name(
  folder, field, value, config
):
  edit_fields(folder, **{field: value})
  with pytest.raises(ValueError, match=field):
    adapters.load(folder, config)


@pytest.mark.parametrize("value", [True, "gaussian", "eva"])
def test_how_the_factors_began_does_not_matter(folder, value, config):
  edit_fields(folder, init_lora_weights=value)
  adapters.load(folder, config)


@pytest.mark.parametrize("factor, lost", [("A", 0), ("B", 1)])
def test_a_factor_that_some_layer_lacks_is_named(folder, factor, lost, config):
  name = (
    f"base_model.model.model.layers.{lost}.mlp.down_proj.lora_{factor}.weight"
  )
  edit(folder, lambda tensors: tensors.pop(name))
  with pytest.raises(ValueError, match=f"missing {name}"):
    adapters.load(folder, config)


def test_tensors_of_other_layers_are_named(folder, config):
  name = "base_model.model.model.norm.weight"
  edit(folder, lambda tensors: tensors.update({name: np.zeros((3, 24))}))
  with pytest.raises(ValueError, match=f"cannot place {name}"):
    adapters.load(folder, config)


def test_an_adapter_without_factors_is_refused(folder, config):
  edit(folder, lambda tensors: tensors.clear())
  with pytest.raises(ValueError, match="it has none"):
    adapters.load(folder, config)


def test_a_rank_that_the_factors_do_not_have_is_refused(folder, config):
  edit_fields(folder, r=4)
  with pytest.raises(ValueError, match=r"rank 4 of .*, got 3"):
    adapters.load(folder, config)


@pytest.mark.parametrize(
  "file", ["adapter_config.json", "adapter_model.safetensors"]
)
def test_a_missing_file_is_named(folder, file, config):
  (folder / file).unlink()
  with pytest.raises(ValueError, match=f"missing \\['{file}"):
    adapters.load(folder, config)


def test_an_adapter_of_another_model_is_refused(folder, config):
  settings, factors = adapters.load(folder, config)
  deeper = dataclasses.replace(config, num_hidden_layers=4)
  with pytest.raises(ValueError, match=r"q_proj/a: expected \(4, 24, 3\)"):
    lora.check(decoder.Decoder(deeper, settings), factors)


@pytest.fixture
def reference(config, base_params, tmp_path):
  """The base model in transformers, and peft."""
  pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft", reason="oracle needs peft")
  transformers = pytest.importorskip("transformers")
  base = tmp_path / "base"
  pretrained.save(base, config, base_params(config), dtype=jnp.float32)
  return transformers.AutoModelForCausalLM.from_pretrained(base), peft


def same_logits(reference, model, params, factors, tokens):
  import torch

  with torch.no_grad():
    expected = reference.eval()(torch.tensor(tokens, dtype=torch.long)).logits
  variables = {"params": params, "lora": factors}
  got = jax.jit(model.apply)(variables, tokens)
  np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=0)


PATTERNS = {
  "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}},
  "alphas": {"alpha_pattern": {"v_proj": 16, "layers.0.self_attn.q_proj": 1}},
  "both": {
    "rank_pattern": {"down_proj": 7},
    "alpha_pattern": {"down_proj": 3, "q_proj": 9},
  },
  "rslora": {"use_rslora": True},
  "rslora of several ranks": {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 9},
    "alpha_pattern": {"v_proj": 5},
  },
  "one layer": {"layers_to_transform": [1]},
  "not everywhere": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranks_and_scales_of_their_own_are_loaded_and_trained_on(
  reference, config, base_params, tokens, tmp_path, pattern
):
  import torch

  base, peft = reference
  torch.manual_seed(0)
  adapted = peft.get_peft_model(
    base,
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      target_modules=["q_proj", "v_proj", "down_proj"],
      init_lora_weights=False,
      task_type="CAUSAL_LM",
      **PATTERNS[pattern],
    ),
  )
  adapted.save_pretrained(tmp_path / "theirs")
  settings, factors = adapters.load(tmp_path / "theirs", config)
  model = decoder.Decoder(config, settings)
  lora.check(model, factors)
  params = base_params(config)
  same_logits(adapted, model, params, factors, tokens)

  def loss(factors):
    logits = model.apply({"params": params, "lora": factors}, tokens)
    return (logits**2).mean()

  # A step of training, exported, is the same model in peft.
  step = lambda x, gradient: x - 0.1 * gradient
  trained = jax.tree.map(step, factors, jax.jit(jax.grad(loss))(factors))
  padded = jax.tree.map(lambda x, y: np.all(x == y), factors, trained)
  assert not jax.tree.all(padded)
  ours = tmp_path / "ours"
  adapters.save(ours, trained, settings, config=config, base_model="tiny")
  again = peft.PeftModel.from_pretrained(adapted.unload(), ours)
  same_logits(again, model, params, trained, tokens)


@pytest.fixture
def residual(factors):
  """Dense matrices of all modules with factors, those of full rank."""
  generator = np.random.default_rng(3)
  draw = lambda *shape: 0.2 * generator.standard_normal(shape, np.float32)
  return jax.tree.map(
    lambda x: {"delta": draw(*x["a"].shape[:-1], x["b"].shape[-1])},
    factors,
    is_leaf=lambda x: "a" in x,
  )


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
def test_what_was_added_to_the_base_is_in_the_adapter(
  reference, config, base_params, factors, residual, tokens, tmp_path
):
  base, peft = reference
  adapters.save(
    tmp_path,
    factors,
    SETTINGS,
    config=config,
    base_model="tiny",
    residual=residual,
  )
  settings, loaded = adapters.load(tmp_path, config)
  # The smaller sides are 24, 12 and 24.
  assert settings.rank == 3 + 24
  assert settings.scale == SETTINGS.scale
  params = lora.add(base_params(config), residual)
  same_logits(
    peft.PeftModel.from_pretrained(base, tmp_path),
    decoder.Decoder(config, SETTINGS),
    params,
    factors,
    tokens,
  )
  # Of wide and tall modules and a padded one, the products themselves.
  flat = flax.traverse_util.flatten_dict(residual)
  theirs = flax.traverse_util.flatten_dict(loaded)
  ours = flax.traverse_util.flatten_dict(factors)
  for (*module, _), delta in flat.items():
    product = lambda x, m=module: settings.scale * x[*m, "a"] @ x[*m, "b"]
    np.testing.assert_allclose(
      product(theirs), product(ours) + delta, atol=1e-6
    )


def test_a_residual_of_other_modules_is_refused(
  factors, residual, config, tmp_path
):
  del residual["layers"]["mlp"]
  with pytest.raises(ValueError, match="the modules of the factors, got"):
    adapters.save(
      tmp_path,
      factors,
      SETTINGS,
      config=config,
      base_model="tiny",
      residual=residual,
    )


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
def test_heads_go_both_ways(config, base_params, tokens, tmp_path, draw):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft", reason="oracle needs peft")
  transformers = pytest.importorskip("transformers")
  head = heads.Classifier(labels=3)
  model = decoder.Decoder(config, SETTINGS, head)
  params = base_params(config)
  factors = draw(lora.init(model, jax.random.key(0)))
  base, ours, theirs = (tmp_path / x for x in ("base", "ours", "theirs"))
  pretrained.save(base, config, params, dtype=jnp.float32)
  adapters.save(
    ours, factors, SETTINGS, config=config, base_model=str(base), head=head
  )
  classifier = transformers.AutoModelForSequenceClassification
  reference = classifier.from_pretrained(base, num_labels=3, pad_token_id=95)
  adapted = peft.PeftModel.from_pretrained(reference, ours).eval()
  rows = np.where(tokens == 95, 94, tokens)
  segments = np.ones_like(rows)
  rows[1, 9:], segments[1, 9:] = 95, 0
  with torch.no_grad():
    expected = adapted(
      torch.tensor(rows, dtype=torch.long),
      attention_mask=torch.tensor(segments, dtype=torch.long),
    ).logits.numpy()
  apply = jax.jit(model.apply)
  got = apply({"params": params, "lora": factors}, rows, segments)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
  adapted.save_pretrained(theirs)
  settings, loaded = adapters.load(theirs, config)
  assert settings == SETTINGS
  jax.tree.map(np.testing.assert_array_equal, loaded, factors)
  merged = lora.merge(params, factors, SETTINGS.scale)
  pretrained.save(
    tmp_path / "merged", config, merged, head=head, dtype=jnp.float32
  )
  whole = classifier.from_pretrained(tmp_path / "merged", pad_token_id=95)
  with torch.no_grad():
    logits = whole.eval()(
      torch.tensor(rows, dtype=torch.long),
      attention_mask=torch.tensor(segments, dtype=torch.long),
    ).logits.numpy()
  np.testing.assert_allclose(got, logits, atol=1e-4, rtol=0)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
def test_factors_of_an_encoder_alone_go_both_ways(draw, tokens, tmp_path):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft", reason="oracle needs peft")
  transformers = pytest.importorskip("transformers")
  settings = lora.LoRA(3, targets=("query", "value"))
  model = bert.Bert(BERT, settings)
  params = draw(lora.abstract_variables(model)["params"])
  factors = draw(lora.init(model, jax.random.key(0)), seed=1)
  base, ours, theirs = (tmp_path / x for x in ("base", "ours", "theirs"))
  pretrained.save(base, BERT, params, dtype=jnp.float32)
  adapters.save(ours, factors, settings, config=BERT, base_model=str(base))
  encoder = transformers.AutoModel.from_pretrained(
    base, add_pooling_layer=False
  )
  adapted = peft.PeftModel.from_pretrained(encoder, ours).eval()
  with torch.no_grad():
    rows = torch.tensor(tokens, dtype=torch.long)
    expected = adapted(rows).last_hidden_state.numpy()
  got = jax.jit(model.apply)({"params": params, "lora": factors}, tokens)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
  adapted.save_pretrained(theirs)
  assert adapters.load(theirs, BERT)[0] == settings
  jax.tree.map(
    np.testing.assert_array_equal, adapters.load(theirs, BERT)[1], factors
  )


def test_a_classifier_of_the_mean_is_known_by_its_folder(draw, tmp_path):
  for pooling, expected in (("mean", "mean"), ("first", None), (None, None)):
    head = heads.Classifier(3, pooling)
    model = bert.Bert(BERT, lora.LoRA(2, targets=("query",)), head)
    trained = draw(lora.init(model, jax.random.key(0)))
    adapters.save(
      tmp_path, trained, model.adapter, config=BERT, base_model="x", head=head
    )
    _, loaded = adapters.load(tmp_path, BERT)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert adapters.head_of(tmp_path, loaded) == head
    # As of a folder that PEFT made.
    (tmp_path / "classifier.json").unlink()
    read = adapters.head_of(tmp_path, loaded)
    assert read == heads.Classifier(3, expected)


def test_the_base_model_of_an_adapter_is_read_from_it(folder, tmp_path):
  assert adapters.base_model(folder) == "tiny"
  edit_fields(folder, base_model_name_or_path=None)
  with pytest.raises(ValueError, match="expected base_model_name_or_path"):
    adapters.base_model(folder)
  with pytest.raises(ValueError, match="expected a PEFT adapter"):
    adapters.base_model(tmp_path / "nowhere")


def test_adapters_of_other_tasks_are_refused(folder, config):
  edit_fields(folder, task_type="TOKEN_CLS")
  with pytest.raises(ValueError, match="task_type.*TOKEN_CLS"):
    adapters.load(folder, config)


def test_patterns_fit_the_names_that_the_adapter_was_made_with(tmp_path, draw):
  config = vit.ViTConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=4,
    patch_size=2,
  )
  settings = lora.LoRA(rank=2, alpha=2.0, targets=("q_proj",))
  model = vit.ViT(config, settings)
  factors = draw(lora.init(model, jax.random.key(0)))
  adapters.save(tmp_path, factors, settings, config=config, base_model="x")

  def older(tensors):
    for name in [*tensors]:
      old = name.replace("model.layers", "model.encoder.layer").replace(
        "attention.q_proj", "attention.attention.query"
      )
      tensors[old] = tensors.pop(name)

  edit(tmp_path, older)
  edit_fields(tmp_path, alpha_pattern={"query": 32})
  _, loaded = adapters.load(tmp_path, config)
  b, expected = (
    x["layers"]["attention"]["q_proj"]["b"] for x in (loaded, factors)
  )
  np.testing.assert_allclose(b, 16 * expected, rtol=1e-6)
