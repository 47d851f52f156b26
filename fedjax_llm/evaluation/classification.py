"""Classification of held-out rows: loss, accuracy, precision, recall and F1.

Micro means are over all decisions; macro means are over labels. The conventions
are the defaults of scikit-learn. 0 / 0 counts as 0. If rows have one label, the
macro means leave out labels that neither occur nor are predicted. If rows may
have several labels, the macro means are over all labels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from fedjax_llm.evaluation import scoring


def evaluator(
  score_fn: Callable[..., dict[str, Any]], rows: Any, *, batch_size: int = 8
) -> Callable[[Any, Any], dict[str, float]]:
  """Makes the function that evaluates a classifier on `rows`.

  Args:
    score_fn: `models.classification.score_fn(model)`.
    rows: a `data.batches.Labelled`, or other rows with `labels`. They are kept
      on the device.
    batch_size: number of rows in a batch.

  Returns:
    A function `evaluate(factors, params)`. It returns `loss`, the mean over
    rows in nats, and the values of `summary`. It raises a `ValueError` if
    the model has too few labels.

  Raises:
    ValueError: if there are no rows.
  """
  labels = np.asarray(rows.labels)
  if not len(labels):
    raise ValueError(
      "expected held-out rows to classify, got none. Hold out a larger share."
    )
  score = scoring.scorer(score_fn, rows, batch_size)

  def evaluate(factors, params):
    scores = score(factors, params)
    # Summed in float64, so that the batch size does not change the result.
    loss = float(np.mean(scores["loss"], dtype=np.float64))
    return {"loss": loss, **summary(scores["scores"], labels)}

  return evaluate


def summary(
  scores: Float[np.ndarray, "rows labels"],
  labels: Num[np.ndarray, "rows ..."],
) -> dict[str, float]:
  """Computes accuracy, F1 and, for several labels, precision and recall.

  Args:
    scores: the logits.
    labels: int [rows], the label of each row; the largest score is the
      prediction. If rows may have several labels, [rows, labels] of ones and
      zeros; each label with a positive score is predicted.

  Returns:
    `accuracy`, the share of rows whose prediction is completely correct; and
    `macro_f1`. If rows may have several labels, also `macro_precision`,
    `macro_recall`, `micro_precision`, `micro_recall` and `micro_f1`. (If rows
    have one label, all micro means equal the accuracy.)

  Raises:
    ValueError: if a label has no score.
  """
  number = scores.shape[-1]
  if labels.ndim > 1:
    predicted, actual = scores > 0, labels > 0.5
  elif labels.min() < 0 or labels.max() >= number:
    raise ValueError(
      f"expected labels in [0, {number}), the labels of the model, got"
      f" {labels.min()} to {labels.max()}. Give the head more labels."
    )
  else:
    one_of = np.eye(number, dtype=bool)
    predicted, actual = one_of[scores.argmax(-1)], one_of[labels]
  accuracy = float((predicted == actual).all(-1).mean())
  right = (predicted & actual).sum(0)
  counts = np.stack([right, predicted.sum(0), actual.sum(0)])
  if labels.ndim == 1:
    macro = _means(counts[:, counts[1:].any(0)])
    return {"accuracy": accuracy, "macro_f1": macro["f1"]}
  macro, micro = _means(counts), _means(counts.sum(1, keepdims=True))
  return {
    "accuracy": accuracy,
    **{f"macro_{name}": value for name, value in macro.items()},
    **{f"micro_{name}": value for name, value in micro.items()},
  }


def _means(counts: np.ndarray) -> dict[str, float]:
  """Returns the precision, recall and F1, each as a mean over labels.

  Args:
    counts: [3, labels], how often each label was predicted correctly, was
      predicted, and was the actual label.
  """
  right, predicted, actual = counts
  mean = lambda part, whole: float(np.mean(part / np.maximum(whole, 1)))
  return {
    "precision": mean(right, predicted),
    "recall": mean(right, actual),
    "f1": mean(2 * right, predicted + actual),
  }
