"""Likelihood of held-out text: loss, perplexity and next-token accuracy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm.evaluation import scoring


def evaluator(
  score_fn: Callable[..., dict[str, Any]], rows: Any, *, batch_size: int = 8
) -> Callable[[Any, Any], dict[str, float]]:
  """Makes the evaluation of a language model on `rows`.

  Args:
    score_fn: `models.language.score_fn(model)`.
    rows: `data.batches.Examples`; kept on the device.
    batch_size: rows scored at once.

  Returns:
    `evaluate(factors, params)` -> `loss` (mean nats a token over all tokens
    that count), `perplexity` (its exponential) and `accuracy` (share of tokens
    that the model ranks first).

  Raises:
    ValueError: if no token of `rows` counts.
  """
  if not np.any(rows.mask):
    raise ValueError(
      "expected held-out text with a token to predict, got none."
    )
  score = scoring.scorer(score_fn, rows, batch_size)

  def evaluate(factors, params):
    # Summed on the host in float64: the same whatever the batch size.
    scores = score(factors, params)
    totals = {
      name: float(np.sum(x, dtype=np.float64)) for name, x in scores.items()
    }
    return summary(**totals)

  return evaluate


def summary(loss: float, right: float, tokens: float) -> dict[str, float]:
  """Means from sums: nats, tokens ranked first, and tokens that count."""
  mean = loss / tokens
  return {
    "loss": mean,
    "perplexity": math.exp(mean) if mean < 700 else math.inf,
    "accuracy": right / tokens,
  }
