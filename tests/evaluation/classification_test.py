"""Metrics are loops over rows and labels, whatever the batches."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.evaluation import classification
from fedjax_llm.models import classification as classifiers
from fedjax_llm.models import heads

ROWS, LABELS = 23, 6


class Rows(NamedTuple):
  pixels: np.ndarray
  labels: np.ndarray


class Linear:
  """Scores are a product; all-zero rows, as padding is, are of label 0."""

  def __init__(self, multi_label):
    self.head = heads.Classifier(LABELS, multi_label=multi_label)

  def apply(self, variables, x):
    scores = x @ variables["params"] + variables.get("lora", 0)
    bias = jnp.zeros(LABELS).at[0].set(1e-3)
    return scores + bias[None]


@pytest.fixture
def params():
  matrix = np.random.default_rng(1).normal(size=(4, LABELS))
  return jnp.asarray(matrix, jnp.float32)


@pytest.fixture(params=["one label", "several labels"])
def rows(request, params):
  """Rows that these parameters get mostly right; the last label never holds."""
  generator = np.random.default_rng(0)
  pixels = generator.normal(size=(ROWS, 4)).astype(np.float32)
  scores = pixels @ np.asarray(params)
  labels = scores[:, :-1].argmax(-1).astype(np.int32)
  labels[::5] = generator.integers(0, LABELS - 1, len(labels[::5]))
  if request.param == "several labels":
    flipped = generator.random(scores.shape) < 0.1
    labels = ((scores > 0) ^ flipped).astype(np.float32)
    labels[:, -1] = labels[3] = 0
  return Rows(pixels, labels)


def evaluate(rows, params, factors=None, **options):
  model = Linear(rows.labels.ndim > 1)
  score_fn = classifiers.score_fn(model)
  return classification.evaluator(score_fn, rows, **options)(factors, params)


def quotient(part, whole):
  return part / whole if whole else 0.0


def looped(scores, labels):
  """Decisions counted one by one, as scikit-learn's documentation has them."""
  scores = scores.astype(np.float64)
  counts = {label: [0, 0, 0, 0] for label in range(LABELS)}
  losses, exact = [], 0
  for row, label in zip(scores, labels, strict=True):
    if np.ndim(label) == 0:
      actual, predicted = {int(label)}, {int(np.argmax(row))}
      losses.append(np.log(np.exp(row).sum()) - row[label])
    else:
      actual = {i for i in range(LABELS) if label[i] == 1}
      predicted = {i for i in range(LABELS) if row[i] > 0}
      signs = np.where(label == 1, 1, -1)
      losses.append(np.mean(np.log1p(np.exp(-signs * row))))
    exact += actual == predicted
    for i in range(LABELS):
      counts[i][2 * (i in actual) + (i in predicted)] += 1
  result = {"loss": np.mean(losses), "accuracy": exact / len(labels)}
  if labels.ndim == 1:
    counts = {i: x for i, x in counts.items() if any(x[1:])}
  each = []
  for _, false, missed, right in [*counts.values(), sum_of(counts)]:
    precision = quotient(right, right + false)
    recall = quotient(right, right + missed)
    f1 = quotient(2 * precision * recall, precision + recall)
    each.append({"precision": precision, "recall": recall, "f1": f1})
  *each, micro = each
  result["macro_f1"] = np.mean([x["f1"] for x in each])
  if labels.ndim > 1:
    for name in ("precision", "recall"):
      result[f"macro_{name}"] = np.mean([x[name] for x in each])
    result |= {f"micro_{name}": value for name, value in micro.items()}
  return result


def sum_of(counts):
  return [sum(column) for column in zip(*counts.values(), strict=True)]


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
def test_it_is_a_loop_over_rows_whatever_the_batch_size(
  rows, params, batch_size
):
  scores = np.asarray(Linear(False).apply({"params": params}, rows.pixels))
  expected = looped(scores, rows.labels)
  assert 0 < expected["accuracy"] < 1  # Nothing here is trivial.
  got = evaluate(rows, params, batch_size=batch_size)
  assert got == pytest.approx(expected, rel=1e-5)


def test_factors_are_given_to_the_model(rows, params):
  always = jnp.full((1, LABELS), -1e3).at[0, 2].set(1e3)
  result = evaluate(rows, params, always)
  if rows.labels.ndim == 1:
    assert result["accuracy"] == np.mean(rows.labels == 2)
  else:
    assert result["micro_precision"] == np.mean(rows.labels[:, 2])
    expected = rows.labels[:, 2].sum() / rows.labels.sum()
    assert result["micro_recall"] == pytest.approx(expected)


def test_a_perfect_classifier_has_all_of_it():
  labels = np.array([0, 3, 3, 1])
  scores = 9 * np.eye(LABELS)[labels] - 3
  assert classification.summary(scores, labels) == {
    "accuracy": 1,
    "macro_f1": 1,  # Of the labels that occur.
  }
  several = (scores > 0).astype(np.float32)
  result = classification.summary(scores, several)
  assert result["accuracy"] == result["micro_f1"] == 1
  assert result["macro_f1"] == pytest.approx(3 / LABELS)


def test_nothing_predicted_and_nothing_there_is_no_error():
  scores = -np.ones((2, LABELS))
  result = classification.summary(scores, np.zeros((2, LABELS)))
  assert result["accuracy"] == 1
  assert {value for name, value in result.items() if "_" in name} == {0}


def test_labels_that_the_model_does_not_have_are_refused(params):
  rows = Rows(np.zeros((2, 4), np.float32), np.array([0, LABELS]))
  with pytest.raises(ValueError, match=rf"\[0, {LABELS}\).*0 to {LABELS}"):
    evaluate(rows, params)


def test_no_rows_are_refused(params):
  rows = Rows(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
  with pytest.raises(ValueError, match="rows to classify, got none"):
    evaluate(rows, params)
