"""Scores of held-out rows, a batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def scorer(
  score_fn: Callable[..., dict[str, Any]], rows: Any, batch_size: int
) -> Callable[[Any, Any], dict[str, np.ndarray]]:
  """Makes a function that scores all of `rows`.

  Args:
    score_fn: `fn(factors, params, rows)` -> arrays, each of one entry a row.
    rows: a tree of arrays of equal length; kept on the device.
    batch_size: rows scored at once.

  Returns:
    `scores(factors, params)` -> the arrays of `score_fn` for all rows, on the
    host. What fills up the last batch is not among them.
  """
  count = len(jax.tree.leaves(rows)[0])
  missing = -count % batch_size
  pad = lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  split = lambda x: pad(x).reshape(-1, batch_size, *x.shape[1:])
  batches = jax.device_put(jax.tree.map(split, rows))

  @jax.jit
  def score(factors, params, batches):
    return jax.lax.map(lambda rows: score_fn(factors, params, rows), batches)

  def scores(factors, params):
    batched = jax.device_get(score(factors, params, batches))
    join = lambda x: x.reshape(-1, *x.shape[2:])[:count]
    return jax.tree.map(join, batched)

  return scores
