import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.evaluation import scoring

ROWS = {
  "x": np.arange(14, dtype=np.float32).reshape(7, 2),
  "y": np.arange(7, dtype=np.int32),
  "none": None,
}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_row_is_scored_once_and_padding_is_not(batch_size):
  def score_fn(factors, params, rows):
    assert rows["x"].shape == (batch_size, 2) and rows["none"] is None
    scores = params * rows["x"] + factors
    return {"scores": scores, "sum": scores.sum(-1) + rows["y"]}

  score = scoring.scorer(score_fn, ROWS, batch_size)
  result = score(jnp.float32(1), jnp.float32(2))
  expected = 2 * ROWS["x"] + 1
  np.testing.assert_array_equal(result["scores"], expected)
  np.testing.assert_array_equal(result["sum"], expected.sum(1) + ROWS["y"])
  assert all(isinstance(x, np.ndarray) for x in result.values())
