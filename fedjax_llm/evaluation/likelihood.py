"""Likelihood of held-out text: loss, perplexity and next-token accuracy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm.evaluation import scoring


def evaluator(
  score_fn: Callable[..., dict[str, Any]], rows: Any, *, batch_size: int = 8
) -> Callable[[Any, Any], dict[str, float]]:
  """Makes the function that evaluates a language model on `rows`.

  Args:
    score_fn: `models.language.score_fn(model)`.
    rows: a `data.batches.Examples`. It is kept on the device.
    batch_size: number of rows in a batch.

  Returns:
    A function `evaluate(factors, params)`. It returns `loss`, the mean over all
    predictions that `rows.mask` counts, in nats; `perplexity`, its exponential;
    and `accuracy`, the share of these predictions that are correct.

  Raises:
    ValueError: if `rows.mask` counts no prediction.
  """
  if not np.any(rows.mask):
    raise ValueError(
      "expected held-out text with a token to predict, got none. Hold out more"
      " text."
    )
  score = scoring.scorer(score_fn, rows, batch_size)

  def evaluate(factors, params):
    # Summed in float64, so that the batch size does not change the result.
    scores = score(factors, params)
    totals = {
      name: float(np.sum(x, dtype=np.float64)) for name, x in scores.items()
    }
    return summary(**totals)

  return evaluate


def summary(loss: float, right: float, tokens: float) -> dict[str, float]:
  """Computes the mean loss, perplexity and accuracy from sums over tokens.

  Args:
    loss: the summed loss, in nats.
    right: the number of tokens that the model ranks first.
    tokens: the number of tokens that count.
  """
  mean = loss / tokens
  return {
    "loss": mean,
    "perplexity": math.exp(mean) if mean < 700 else math.inf,
    "accuracy": right / tokens,
  }
