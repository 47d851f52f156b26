"""Scores held-out rows in batches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def scorer(
  score_fn: Callable[..., dict[str, Any]], rows: Any, batch_size: int
) -> Callable[[Any, Any], dict[str, np.ndarray]]:
  """Makes the function that scores all `rows`.

  Args:
    score_fn: a function of (factors, params, rows) that returns a dictionary of
      arrays with one entry for each row.
    rows: a tree of arrays with the same number of rows. It stays on the device.
    batch_size: number of rows in a batch.

  Returns:
    A function `scores(factors, params)` that returns the arrays of `score_fn`
    for all rows, on the host, without the padding of the last batch.
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
