import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import heads

X = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
SEGMENTS = np.array([[0, 1, 1, 0], [1, 1, 1, 1]])


def test_the_state_of_the_last_or_first_token_is_that_of_a_real_one():
  last = heads.pool(X, SEGMENTS, "last")
  np.testing.assert_array_equal(last, [X[0, 2], X[1, 3]])
  first = heads.pool(X, SEGMENTS, "first")
  np.testing.assert_array_equal(first, [X[0, 1], X[1, 0]])


def test_the_mean_is_over_real_tokens():
  mean = heads.pool(X, SEGMENTS, "mean")
  expected = [X[0, 1:3].mean(0), X[1].mean(0)]
  np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_without_segments_all_tokens_are_real():
  for pooling, expected in (
    ("last", X[:, 3]),
    ("first", X[:, 0]),
    ("mean", X.mean(1)),
  ):
    got = heads.pool(X, None, pooling)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_lives_with_what_is_trained_until_it_is_merged(trained):
  head = heads.Head(2, use_bias=True, trained=trained)
  variables = head.init(jax.random.key(0), X[:, 0])
  assert list(variables) == ["lora" if trained else "params"]
  (leaves,) = variables.values()
  kernel, bias = leaves["kernel"], jnp.array([1.0, -1.0])
  leaves["bias"] = bias
  expected = X[:, 0] @ kernel + bias[None]
  np.testing.assert_allclose(
    head.apply(variables, X[:, 0]), expected, rtol=1e-6
  )


@pytest.mark.parametrize(
  "fields, named", [({"labels": 0}, "labels >= 1"), ({"pooling": "max"}, "max")]
)
def test_what_is_no_classifier_is_refused(fields, named):
  with pytest.raises(ValueError, match=named):
    heads.Classifier(**({"labels": 2} | fields))
