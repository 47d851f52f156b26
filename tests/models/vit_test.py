import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import (
  adapters,
  families,
  heads,
  lora,
  pretrained,
  vit,
)

# All widths differ, so that a shape tells which layer it belongs to.
BASE = vit.ViTConfig(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=12,
  patch_size=4,
)
VARIANTS = {
  "plain": {},
  "rectangle": {"image_size": (13, 10), "patch_size": (2, 3)},
  "channels": {"num_channels": 1, "num_attention_heads": 3},
  "no bias": {"qkv_bias": False, "hidden_act": "gelu_new"},
  "relu": {"hidden_act": "relu", "layer_norm_eps": 0.1},
}
ALL = lora.LoRA(
  3, 6.0, targets=("fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj")
)
HEAD = heads.Classifier(5)


@pytest.fixture(params=VARIANTS)
def variant(request):
  return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def params(draw):
  """Random parameters of a base model; its norms scale by about one."""

  def make(config, head=None):
    shapes = lora.abstract_variables(vit.ViT(config, head=head))["params"]
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes))

  return make


def images(config):
  generator = np.random.default_rng(0)
  return generator.normal(size=(2, *config.image)).astype(np.float32)


def np_act(x, kind):
  if kind == "relu":
    return np.where(x > 0, x, 0)
  if kind == "gelu":
    return x * np.vectorize(lambda x: math.erf(x / math.sqrt(2)) + 1)(x) / 2
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_norm(x, params, config):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.layer_norm_eps)
  return x * params["scale"] + params["bias"]


def np_dense(x, params, factors, *path, scale):
  for name in path:
    params, factors = params[name], factors.get(name, {})
  y = x @ params["kernel"] + params.get("bias", 0)
  return y + scale * x @ factors["a"] @ factors["b"] if factors else y


def np_embed(config, params, image):
  """One patch after the other, row by row; a convolution's weight for each."""
  height, width = np.broadcast_to(config.patch_size, 2)
  projection = params["patch_embeddings"]["projection"]
  x = [params["cls_token"][0, 0]]
  for top in range(0, image.shape[0] - height + 1, height):
    for left in range(0, image.shape[1] - width + 1, width):
      patch = image[top : top + height, left : left + width]
      x.append(projection["bias"].copy())
      for i, j, channel in np.ndindex(patch.shape):
        x[-1] += projection["weight"][:, channel, i, j] * patch[i, j, channel]
  return np.array(x) + params["position_embeddings"][0]


def np_attend(query, key, value):
  out = np.zeros_like(query)
  for t, head in np.ndindex(out.shape[:2]):
    scores = key[:, head] @ query[t, head] / math.sqrt(out.shape[-1])
    out[t, head] = np.exp(scores) / np.exp(scores).sum() @ value[:, head]
  return out


def np_vit(config, params, factors, image, scale=0.0):
  """States of one image, in float64 and with plain loops."""
  params, factors = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, factors)
  )
  x = np_embed(config, params["embeddings"], image.astype(np.float64))
  width = config.hidden_size // config.num_attention_heads
  for i in range(config.num_hidden_layers):
    layer, low = jax.tree.map(
      lambda x, i=i: x[i], (params["layers"], factors.get("layers", {}))
    )
    dense = lambda x, *path, layer=layer, low=low: np_dense(
      x, layer, low, *path, scale=scale
    )
    y = np_norm(x, layer["layernorm_before"], config)
    parts = [
      dense(y, "attention", name).reshape(len(y), -1, width)
      for name in ("q_proj", "k_proj", "v_proj")
    ]
    y = np_attend(*parts).reshape(x.shape)
    x = x + dense(y, "attention", "o_proj")
    y = dense(np_norm(x, layer["layernorm_after"], config), "mlp", "fc1")
    x = x + dense(np_act(y, config.hidden_act), "mlp", "fc2")
  return np_norm(x, params["layernorm"], config)


def test_states_match_numpy(variant, params):
  values, pixels = params(variant), images(variant)
  states = jax.jit(vit.ViT(variant).apply)({"params": values}, pixels)
  for image, got in zip(pixels, states, strict=True):
    expected = np_vit(variant, values, {}, image)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_scores_match_numpy(params, lora_factors):
  model, pixels = vit.ViT(BASE, ALL, HEAD), images(BASE)
  values, factors = params(BASE), lora_factors(model)
  variables = {"params": values, "lora": factors}
  scores = jax.jit(model.apply)(variables, pixels)
  for image, got in zip(pixels, scores, strict=True):
    x = np_vit(BASE, values, factors, image, scale=2.0)[0]
    classifier = factors["classifier"]
    expected = x @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 16])
def test_vit_b_16_trains_as_many_parameters_as_in_flasc(rank):
  # Factors of query and value in all layers, and a head for ten labels.
  adapter = lora.LoRA(rank, targets=("q_proj", "v_proj"))
  model = vit.ViT(vit.ViTConfig(), adapter, heads.Classifier(10))
  trained = lora.abstract_variables(model)["lora"]
  count = sum(leaf.size for leaf in jax.tree.leaves(trained))
  assert count == 36_864 * rank + 7_690
  alone = lora.abstract_variables(vit.ViT(vit.ViTConfig()))
  # 86 million, as the paper says of ViT-B/16 (Dosovitskiy et al., table 1).
  assert 85e6 < sum(x.size for x in jax.tree.leaves(alone)) < 87e6


def test_clients_share_the_products_of_the_base(
  params, lora_factors, equations
):
  clients, values = 7, params(BASE)
  model, pixels = vit.ViT(BASE, ALL, HEAD), images(BASE)
  stack = lambda x: jnp.stack([x] * clients)
  apply = lambda factors, pixels: model.apply(
    {"params": values, "lora": factors}, pixels
  )
  factors = jax.tree.map(stack, lora_factors(model))
  found = equations(jax.vmap(apply), factors, stack(pixels))
  # A layer's kernels, and the weight of the patches.
  shapes = {(24, 24), (24, 40), (40, 24), (24, 3, 4, 4)}
  products = [
    x
    for x in found
    if x.primitive.name == "dot_general"
    and any(v.aval.shape in shapes for v in x.invars)
  ]
  assert len(products) == len(vit.LAYERS) + 1
  for product in products:
    assert product.params["dimension_numbers"][1] == ((), ())


def test_what_this_model_does_not_have_is_refused(params):
  with pytest.raises(ValueError, match=r"query.*attention\.q_proj"):
    vit.ViT(BASE, lora.LoRA(targets=("query",)))
  with pytest.raises(ValueError, match="'first'.*got 'mean'"):
    vit.ViT(BASE, head=heads.Classifier(2, "mean"))
  channels_first = images(BASE).transpose(0, 3, 1, 2)
  with pytest.raises(ValueError, match=r"\(12, 12, 3\), got \(3, 12, 12\)"):
    vit.ViT(BASE).apply({"params": params(BASE)}, channels_first)


# config.json.


def test_settings_of_training_and_of_other_parts_are_passed_over():
  fields = BASE.to_hugging_face() | {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "encoder_stride": 16,
    "pooler_act": "tanh",
    "pooler_output_size": 24,
  }
  assert families.from_hugging_face(fields) == BASE


@pytest.mark.parametrize(
  "field, value",
  [
    ("hidden_act", "quick_gelu"),
    ("num_attention_heads", 5),
    ("patch_size", 13),
    ("model_type", "deit"),
    ("a_feature_of_the_future", True),
  ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=field):
    families.from_hugging_face(BASE.to_hugging_face() | {field: value})


# Checkpoints and adapters.

# What was renamed, by the names that files still have.
CURRENT = {
  "encoder.layer.": "layers.",
  "attention.attention.query": "attention.q_proj",
  "attention.attention.key": "attention.k_proj",
  "attention.attention.value": "attention.v_proj",
  "attention.output.dense": "attention.o_proj",
  "intermediate.dense": "mlp.fc1",
  "output.dense": "mlp.fc2",
}


def rename(path, change):
  tensors = safetensors.numpy.load_file(path)
  renamed = {change(name): array for name, array in tensors.items()}
  assert renamed.keys() != tensors.keys()
  safetensors.numpy.save_file(renamed, path)


def current(name):
  for before, after in CURRENT.items():
    name = name.replace(before, after)
  return name


def older(name):
  for before, after in CURRENT.items():
    name = name.replace(after, before)
  return name


def equal(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


CHANGES = {
  "current": current,
  "of the encoder alone": lambda name: name.removeprefix("vit."),
  "both": lambda name: current(name).removeprefix("vit."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_names_of_tensors_are_read(params, tmp_path, change):
  values = params(BASE)
  pretrained.save(tmp_path, BASE, values, dtype=jnp.float32)
  path = tmp_path / "model.safetensors"
  rename(path, CHANGES[change])
  names = ("pooler.dense.weight", "vit.embeddings.mask_token", "decoder.0.bias")
  more = dict.fromkeys(names, np.zeros((2, 2), np.float32))
  safetensors.numpy.save_file(safetensors.numpy.load_file(path) | more, path)
  equal(pretrained.load(tmp_path)[1], values)


@pytest.mark.oracle
def test_tensors_are_stored_under_the_names_that_transformers_writes(
  params, tmp_path
):
  pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  values = params(BASE, HEAD)
  ours, theirs = tmp_path / "ours", tmp_path / "theirs"
  pretrained.save(ours, BASE, values, head=HEAD, dtype=jnp.float32)
  kind = transformers.AutoModelForImageClassification
  kind.from_pretrained(ours).save_pretrained(theirs)
  one, other = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (ours, theirs)
  )
  assert one.keys() == other.keys()
  equal(one, other)


def test_adapters_with_older_names_are_read(lora_factors, tmp_path):
  factors = lora_factors(vit.ViT(BASE, ALL, HEAD))
  adapters.save(
    tmp_path, factors, ALL, config=BASE, base_model="tiny", head=HEAD
  )
  rename(tmp_path / "adapter_model.safetensors", older)
  settings, loaded = adapters.load(tmp_path, BASE)
  assert settings == ALL
  equal(loaded, factors)
