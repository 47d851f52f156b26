import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import bert, families, heads, lora, pretrained

# All widths differ, so that a shape tells which layer it belongs to.
BASE = bert.BertConfig(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=20,
)
VARIANTS = {
  "plain": {},
  "tanh": {"hidden_act": "gelu_new", "type_vocab_size": 1},
  "relu": {"hidden_act": "relu", "layer_norm_eps": 0.1},
  "silu": {"hidden_act": "silu", "num_attention_heads": 2},
}
ALL = lora.LoRA(3, 6.0, targets=("dense", "key", "query", "value"))
FIRST, MEAN = heads.Classifier(5), heads.Classifier(5, "mean")
SEGMENTS = np.array(
  [
    [0] * 4 + [1] * 13,  # Padding on the left.
    [1] * 12 + [0] * 5,  # Padding on the right.
    [0] * 2 + [1] * 4 + [2] * 6 + [1] * 3 + [0] * 2,  # Three documents.
  ]
)


@pytest.fixture(params=VARIANTS)
def variant(request):
  return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def params(draw):
  """Random parameters of a base model; its norms scale by about one."""

  def make(config, head=None):
    shapes = lora.abstract_variables(bert.Bert(config, head=head))["params"]
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes))

  return make


def np_act(x, kind):
  if kind == "relu":
    return np.where(x > 0, x, 0)
  if kind == "silu":
    return x / (1 + np.exp(-x))
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
  y = x @ params["kernel"] + params["bias"]
  return y + scale * x @ factors["a"] @ factors["b"] if factors else y


def np_embed(config, tables, row, segments):
  tables = {name: table.get("embedding") for name, table in tables.items()}
  x = []
  for t, token in enumerate(row):
    inside = [s for s in range(t + 1) if (segments[s:t] == segments[t]).all()]
    position = t - inside[0]
    x.append(
      tables["word_embeddings"][token]
      + tables["position_embeddings"][position]
      + tables["token_type_embeddings"][0]
    )
  return np.array(x)


def np_attend(query, key, value, segments):
  out = np.zeros_like(query)
  for t, head in np.ndindex(out.shape[:2]):
    seen = [s for s in range(len(out)) if segments[s] == segments[t]]
    scores = key[seen, head] @ query[t, head] / math.sqrt(out.shape[-1])
    out[t, head] = np.exp(scores) / np.exp(scores).sum() @ value[seen, head]
  return out


def np_bert(config, params, factors, row, segments, scale=0.0):
  """Hidden states of one row, in float64 and with plain loops."""
  params, factors = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, factors)
  )
  x = np_embed(config, params["embeddings"], row, segments)
  x = np_norm(x, params["embeddings"]["LayerNorm"], config)
  width = config.hidden_size // config.num_attention_heads
  for i in range(config.num_hidden_layers):
    layer, low = jax.tree.map(
      lambda x, i=i: x[i], (params["layers"], factors.get("layers", {}))
    )
    dense = lambda x, *path, layer=layer, low=low: np_dense(
      x, layer, low, *path, scale=scale
    )
    parts = [
      dense(x, "attention", "self", name).reshape(len(x), -1, width)
      for name in ("query", "key", "value")
    ]
    y = np_attend(*parts, segments).reshape(x.shape)
    y = dense(y, "attention", "output", "dense")
    x = np_norm(x + y, layer["attention"]["output"]["LayerNorm"], config)
    y = np_act(dense(x, "intermediate", "dense"), config.hidden_act)
    y = dense(y, "output", "dense")
    x = np_norm(x + y, layer["output"]["LayerNorm"], config)
  return x


def test_states_match_numpy(variant, params, tokens):
  values, apply = params(variant), jax.jit(bert.Bert(variant).apply)
  for segments in (None, SEGMENTS):
    states = apply({"params": values}, tokens, segments)
    segments = np.ones_like(tokens) if segments is None else segments
    for row, places, got in zip(tokens, segments, states, strict=True):
      expected = np_bert(variant, values, {}, row, places)
      real = places > 0
      np.testing.assert_allclose(got[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("head", [FIRST, MEAN], ids=["first", "mean"])
def test_scores_match_numpy(params, lora_factors, tokens, head):
  model = bert.Bert(BASE, ALL, head)
  values, factors = params(BASE, head), lora_factors(model)
  apply, variables = jax.jit(model.apply), {"params": values, "lora": factors}
  scores = apply(variables, tokens, SEGMENTS)
  for row, places, got in zip(tokens, SEGMENTS, scores, strict=True):
    x = np_bert(BASE, values, factors, row, places, scale=2.0)
    if head is MEAN:
      x = x[places > 0].mean(0)
    else:
      x = x[np.flatnonzero(places)[0]]
      x = np.tanh(np_dense(x, values, factors, "pooler", "dense", scale=2.0))
    classifier = factors["classifier"]
    expected = x @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_padding_does_not_change_a_row(params, tokens):
  model, values = bert.Bert(BASE, head=MEAN), params(BASE, MEAN)
  apply = jax.jit(model.apply)
  short = apply({"params": values}, tokens[:, :13])
  for left in (0, 2, 4):
    padded = np.full_like(tokens, 7)
    segments = np.zeros_like(tokens)
    padded[:, left : left + 13], segments[:, left : left + 13] = (
      tokens[:, :13],
      1,
    )
    got = apply({"params": values}, padded, segments)
    np.testing.assert_allclose(got, short, atol=1e-5)


def test_only_the_first_token_goes_through_the_pooler(params):
  assert "pooler" in params(BASE, FIRST)
  assert "pooler" not in params(BASE, MEAN)
  assert "pooler" not in params(BASE)


def test_what_this_model_does_not_have_is_refused(params, tokens):
  with pytest.raises(ValueError, match=r"q_proj.*attention\.self\.query"):
    bert.Bert(BASE, lora.LoRA(targets=("q_proj",)))
  with pytest.raises(ValueError, match="'first' or 'mean'.*'last'"):
    bert.Bert(BASE, head=heads.Classifier(2, "last"))
  short = dataclasses.replace(BASE, max_position_embeddings=16)
  with pytest.raises(ValueError, match="at most 16 tokens.*got 17"):
    bert.Bert(short).apply({"params": params(short)}, tokens)


# config.json.


def test_a_mean_over_tokens_is_no_classifier_of_transformers():
  kinds = [BASE.to_hugging_face(x)["architectures"] for x in (FIRST, MEAN)]
  assert kinds == [["BertForSequenceClassification"], ["BertModel"]]


def test_settings_of_the_base_models_training_are_passed_over():
  fields = BASE.to_hugging_face() | {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": 0.3,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "gradient_checkpointing": True,
    "pooler_type": "first_token_transform",
    "is_decoder": False,
  }
  assert families.from_hugging_face(fields) == BASE


@pytest.mark.parametrize(
  "field, value",
  [
    ("is_decoder", True),
    ("add_cross_attention", True),
    ("position_embedding_type", "relative_key"),
    ("hidden_act", "quick_gelu"),
    ("num_attention_heads", 5),
    ("hidden_size", None),
  ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=field):
    families.from_hugging_face(BASE.to_hugging_face() | {field: value})


# Checkpoints.


def edit(folder, change):
  """Rewrites the weights as what `change` makes of the tensors."""
  path = folder / "model.safetensors"
  tensors = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path)


def equal(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_older_names_of_tensors_are_read(params, tmp_path):
  values = params(BASE, FIRST)
  pretrained.save(tmp_path, BASE, values, head=FIRST, dtype=jnp.float32)

  def older(name):
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    name = name.replace("LayerNorm.bias", "LayerNorm.beta")
    return name.removeprefix("bert.")

  edit(tmp_path, lambda tensors: {older(x): tensors[x] for x in tensors})
  equal(pretrained.load(tmp_path, head=FIRST)[1], values)


def test_heads_of_pretraining_and_buffers_are_passed_over(params, tmp_path):
  values = params(BASE)
  pretrained.save(tmp_path, BASE, values, dtype=jnp.float32)
  names = (
    "bert.embeddings.position_ids",
    "cls.predictions.transform.LayerNorm.gamma",
    "cls.seq_relationship.weight",
    "bert.pooler.dense.weight",
    "classifier.weight",
  )
  more = dict.fromkeys(names, np.zeros((2, 2), np.float32))
  edit(tmp_path, lambda tensors: tensors | more)
  equal(pretrained.load(tmp_path)[1], values)


def test_a_checkpoint_without_a_pooler_is_read_where_none_is_used(
  params, tmp_path
):
  values = params(BASE)
  pretrained.save(tmp_path, BASE, values, dtype=jnp.float32)
  equal(pretrained.load(tmp_path, head=MEAN)[1], values)
  with pytest.raises(ValueError, match=r"missing bert\.pooler\.dense\.weight"):
    pretrained.load(tmp_path, head=FIRST)
