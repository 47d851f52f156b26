import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import attention

ROWS = {
  "one document": [1, 1, 1, 1, 1, 1],
  "padding on the left": [0, 0, 1, 1, 1, 1],
  "padding on the right": [1, 1, 1, 1, 0, 0],
  "documents": [1, 1, 2, 2, 2, 3],
  "documents and padding": [4, 4, 4, 7, 0, 0],
}


@pytest.fixture(params=ROWS)
def segments(request):
  return np.array([ROWS[request.param]], np.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 6])
def test_masks_are_what_loops_say(segments, window, causal):
  scope, _ = attention.scope(segments.shape, segments)
  (mask,) = scope.masks([window], causal=causal)
  row = segments[0]
  for i in range(6):
    for j in range(6):
      seen = row[i] == row[j] and (j <= i or not causal)
      seen = seen and (window is None or i - j < window)
      assert mask[0, 0, i, j] == seen


def test_positions_restart_in_each_document(segments):
  scope, _ = attention.scope(segments.shape, segments)
  row, expected = segments[0], []
  for i in range(6):
    same = i > 0 and row[i] == row[i - 1]
    expected.append(expected[-1] + 1 if same else 0)
  np.testing.assert_array_equal(scope.positions, [expected])


def test_plain_rows_need_no_mask():
  scope, _ = attention.scope((2, 5), None)
  assert scope.masks([None, 5]) == [None, None]
  assert all(mask is not None for mask in scope.masks([None, 4]))
  np.testing.assert_array_equal(scope.positions, [np.arange(5)])


def test_a_cache_counts_the_tokens_of_each_row():
  cache = attention.empty_cache((1, 2, 8, 1, 2), jnp.float32)
  prompt = jnp.array([[0, 0, 1], [1, 1, 1]])
  scope, cache = attention.scope((2, 3), prompt, cache)
  np.testing.assert_array_equal(scope.positions, [[0, 0, 0], [0, 1, 2]])
  scope, cache = attention.scope((2, 1), None, cache)
  np.testing.assert_array_equal(scope.positions, [[1], [3]])
  (mask,) = scope.masks([None])
  np.testing.assert_array_equal(
    mask[:, 0, 0], [[0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
  )
  assert cache.used == 4


def test_a_soft_cap_far_away_is_none():
  query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 6))
  key, value = key[:, :, :2], value[:, :, :2]
  plain = attention.attend(query, key, value, None)
  capped = attention.attend(query, key, value, None, softcap=1e4)
  np.testing.assert_allclose(plain, capped, atol=1e-5)
  near = attention.attend(query, key, value, None, softcap=0.1)
  assert jnp.abs(near - plain).max() > 0.01
