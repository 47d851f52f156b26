"""Likelihood of held-out text: loss, perplexity and next-token accuracy."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


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
  missing = -len(rows.tokens) % batch_size
  pad = lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  split = lambda x: pad(x).reshape(-1, batch_size, *x.shape[1:])
  batches = jax.device_put(jax.tree.map(split, rows))

  @jax.jit
  def scores(factors, params, batches):
    score = lambda examples: score_fn(factors, params, examples)
    return jax.tree.map(lambda x: x.ravel(), jax.lax.map(score, batches))

  def evaluate(factors, params):
    # Summed on the host in float64: the same whatever the batch size.
    rows = jax.device_get(scores(factors, params, batches))
    totals = {
      name: float(np.sum(x, dtype=np.float64)) for name, x in rows.items()
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
