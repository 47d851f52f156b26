"""Classification of held-out rows: loss, accuracy, precision, recall and F1.

Micro means are of all decisions, macro means of the labels. As scikit-learn has
it by default, a quotient of nothing by nothing is 0, and the macro means are of
all labels where a row may have several, but where it has one, only of those
that occur or are predicted.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from fedjax_llm.evaluation import scoring


def evaluator(
  score_fn: Callable[..., dict[str, Any]], rows: Any, *, batch_size: int = 8
) -> Callable[[Any, Any], dict[str, float]]:
  """Makes the evaluation of a classifier on `rows`.

  Args:
    score_fn: `models.classification.score_fn(model)`.
    rows: `data.batches.Labelled`, or other rows with `labels`; kept on the
      device.
    batch_size: rows scored at once.

  Returns:
    `evaluate(factors, params)` -> `loss` (mean over rows, in nats) and what
    `summary` tells.

  Raises:
    ValueError: if there are no rows; and from `evaluate`, if a label is none
      of the model's.
  """
  labels = np.asarray(rows.labels)
  if not len(labels):
    raise ValueError("expected held-out rows to classify, got none.")
  score = scoring.scorer(score_fn, rows, batch_size)

  def evaluate(factors, params):
    scores = score(factors, params)
    # Summed in float64: the same whatever the batch size.
    loss = float(np.mean(scores["loss"], dtype=np.float64))
    return {"loss": loss, **summary(scores["scores"], labels)}

  return evaluate


def summary(
  scores: Float[np.ndarray, "rows labels"],
  labels: Num[np.ndarray, "rows ..."],
) -> dict[str, float]:
  """How good the predictions of a classifier are.

  Args:
    scores: logits.
    labels: int [rows], the label of each, of which the largest score predicts
      one; or [rows, labels] of ones and zeros, predicted by a score over 0.

  Returns:
    `accuracy`, the share of rows whose label, or labels all together, are
    predicted; and `macro_f1`. Where a row may have several labels, also
    `macro_precision`, `macro_recall`, `micro_precision`, `micro_recall` and
    `micro_f1`; where it has one, the micro means are all the accuracy.

  Raises:
    ValueError: if a label is none of the scored ones.
  """
  number = scores.shape[-1]
  if labels.ndim > 1:
    predicted, actual = scores > 0, labels > 0.5
  elif labels.min() < 0 or labels.max() >= number:
    raise ValueError(
      f"expected labels in [0, {number}), those of the model, got"
      f" {labels.min()} to {labels.max()}."
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
  """Means over the columns (predicted rightly, predicted, actual)."""
  right, predicted, actual = counts
  mean = lambda part, whole: float(np.mean(part / np.maximum(whole, 1)))
  return {
    "precision": mean(right, predicted),
    "recall": mean(right, actual),
    "f1": mean(2 * right, predicted + actual),
  }
