import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.data import batches
from fedjax_llm.models import bert, classification, heads, lora, vit

BERT = bert.BertConfig(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=20,
)
VIT = vit.ViTConfig(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=8,
  patch_size=4,
)
TEXT, IMAGE = lora.LoRA(2, targets=("query",)), lora.LoRA(2)
MODELS = {
  "text": bert.Bert(BERT, TEXT, heads.Classifier(4)),
  "texts of several labels": bert.Bert(
    BERT, TEXT, heads.Classifier(4, "mean", multi_label=True)
  ),
  "images": vit.ViT(VIT, IMAGE, heads.Classifier(4)),
}


class Images(NamedTuple):
  pixels: np.ndarray
  labels: np.ndarray


def rows(model):
  generator = np.random.default_rng(0)
  labels = np.array([3, 0, 2], np.int32)
  if model.head.multi_label:
    labels = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)
  if model.config is VIT:
    pixels = generator.normal(size=(3, 8, 8, 3)).astype(np.float32)
    return Images(pixels, labels)
  segments = np.ones((3, 11), np.int32)
  segments[1, 6:] = 0
  tokens = generator.integers(0, 96, (3, 11), np.int32)
  return batches.Labelled(tokens, segments, labels)


@pytest.fixture(params=MODELS)
def model(request):
  return MODELS[request.param]


@pytest.fixture
def variables(model, draw, lora_factors):
  values = draw(lora.abstract_variables(model)["params"], scale=0.5)
  return lora_factors(model), values


@functools.cache
def compiled(fn, model):
  return jax.jit(fn(model))


def np_loss(scores, label):
  """Of one row; a label is a number, or a list of ones and zeros."""
  scores = np.asarray(scores, np.float64)
  if np.ndim(label) == 0:
    return np.log(np.exp(scores).sum()) - scores[label]
  total = 0.0
  for score, holds in zip(scores, label, strict=True):
    likelihood = 1 / (1 + np.exp(-score if holds else score))
    total -= np.log(likelihood)
  return total / len(scores)


def scores_of(model, variables, examples):
  factors, params = variables
  inputs = examples[:-1]
  return jax.jit(model.apply)({"params": params, "lora": factors}, *inputs)


def test_the_loss_sums_the_rows_that_are_there(model, variables):
  examples, present = rows(model), np.array([True, False, True])
  loss = compiled(classification.loss_fn, model)
  total, count = loss(*variables, examples, present, jax.random.key(0))
  scores = scores_of(model, variables, examples)
  expected = [
    np_loss(scores[row], examples.labels[row])
    for row in np.flatnonzero(present)
  ]
  np.testing.assert_allclose(total, sum(expected), rtol=1e-4)
  assert count == 2


def test_rows_are_scored_one_by_one(model, variables):
  examples = rows(model)
  result = compiled(classification.score_fn, model)(*variables, examples)
  scores = scores_of(model, variables, examples)
  np.testing.assert_allclose(result["scores"], scores, atol=1e-6)
  for got, row, label in zip(
    result["loss"], scores, examples.labels, strict=True
  ):
    np.testing.assert_allclose(got, np_loss(row, label), rtol=1e-4)


def test_padded_rows_have_no_gradient(model, variables):
  factors, params = variables
  loss = classification.loss_fn(model)
  gradient = jax.jit(
    jax.grad(
      lambda factors, examples, mask: loss(
        factors, params, examples, mask, jax.random.key(0)
      )[0]
    )
  )
  examples = rows(model)
  # As padded rows are: zeros, so all of a text is padding.
  padded = jax.tree.map(np.copy, examples)
  for leaf in padded:
    leaf[1] = 0
  present = np.array([True, False, True])
  equal = np.testing.assert_array_equal
  first = gradient(factors, examples, present)
  jax.tree.map(equal, first, gradient(factors, padded, present))
  assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(first))
  nothing = gradient(factors, examples, np.zeros(3, bool))
  assert not any(x.any() for x in jax.tree.leaves(nothing))


def test_training_draws_dropout_and_scoring_does_not(variables, model):
  adapter = dataclasses.replace(model.adapter, dropout=0.5)
  dropping = model.clone(adapter=adapter)
  examples, present = rows(model), np.ones(3, bool)
  loss = compiled(classification.loss_fn, dropping)
  first, _ = loss(*variables, examples, present, jax.random.key(0))
  again, _ = loss(*variables, examples, present, jax.random.key(0))
  other, _ = loss(*variables, examples, present, jax.random.key(1))
  assert first == again != other
  scored = (
    compiled(classification.score_fn, x)(*variables, examples)["loss"]
    for x in (model, dropping)
  )
  np.testing.assert_array_equal(*scored)


def test_a_finished_model_is_scored_without_factors(model, variables):
  factors, params = variables
  merged = lora.merge(params, factors, model.adapter.scale)
  alone = compiled(classification.score_fn, model.clone(adapter=None))
  got = alone(None, merged, rows(model))
  expected = compiled(classification.score_fn, model)(*variables, rows(model))
  np.testing.assert_allclose(got["scores"], expected["scores"], atol=1e-4)


@pytest.mark.oracle
def test_losses_equal_those_of_torch():
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  generator = np.random.default_rng(0)
  scores = 9 * generator.normal(size=(6, 5)).astype(np.float32)
  single = generator.integers(0, 5, 6)
  several = (generator.random((6, 5)) < 0.4).astype(np.float32)
  functional = torch.nn.functional
  for labels, loss in (
    (single, functional.cross_entropy),
    (several, functional.binary_cross_entropy_with_logits),
  ):
    got = classification.row_losses(
      jnp.asarray(scores), jnp.asarray(labels), multi_label=labels.ndim > 1
    )
    expected = loss(torch.tensor(scores), torch.tensor(labels)).item()
    np.testing.assert_allclose(got.mean(), expected, rtol=1e-5)


def test_large_scores_do_not_overflow():
  scores = jnp.array([[1e4, -1e4]])
  wrong = classification.row_losses(scores, jnp.array([1]))
  assert wrong == 2e4
  both = jnp.array([[0.0, 0.0]])
  loss = classification.row_losses(scores, both, multi_label=True)
  assert loss == 5e3


def test_labels_of_another_kind_are_refused():
  scores = jnp.zeros((3, 4))
  with pytest.raises(ValueError, match=r"expected labels \(3,\).*\(3, 4\)"):
    classification.row_losses(scores, jnp.zeros((3, 4)))
  with pytest.raises(ValueError, match=r"expected labels \(3, 4\).*\(3,\)"):
    classification.row_losses(scores, jnp.zeros(3, int), multi_label=True)


@pytest.mark.parametrize(
  "fn", [classification.loss_fn, classification.score_fn]
)
def test_a_model_without_a_head_is_refused(fn):
  with pytest.raises(ValueError, match="without a head"):
    fn(bert.Bert(BERT))
