import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.federated import aggregators

UPDATES = np.array([[1.0, -2, 0], [0, 4, 0], [5, 6, 0], [9, 9, 9]], np.float32)
WEIGHTS = np.array([1, 2, 5, 0], np.float32)
EACH = pytest.mark.parametrize(
  "aggregator",
  [
    aggregators.weighted_mean(),
    aggregators.uniform_mean(),
    aggregators.sum_updates(),
  ],
)


def aggregate(aggregator, updates, weights):
  state = aggregator.init()
  share = lambda update, weight: aggregator.share(update, weight, state)
  shares = jax.vmap(share)(jnp.asarray(updates), weights)
  total = jax.tree.map(lambda x: x.sum(0), shares)
  return aggregator.finish(total, state, jax.random.key(0))[0]


def test_the_weighted_mean_weighs_by_the_weights():
  got = aggregate(aggregators.weighted_mean(), UPDATES, WEIGHTS)
  expected = (UPDATES[0] + 2 * UPDATES[1] + 5 * UPDATES[2]) / 8
  np.testing.assert_array_equal(got, expected)


def test_the_uniform_mean_counts_clients():
  # Neither the examples nor the number of senders of an entry count.
  got = aggregate(aggregators.uniform_mean(), UPDATES, WEIGHTS)
  expected = UPDATES[:3].sum(0) / np.float32(3)
  np.testing.assert_array_equal(got, expected)


def test_the_total_is_as_many_uniform_means_as_there_are_clients():
  got = aggregate(aggregators.sum_updates(), UPDATES, WEIGHTS)
  mean = aggregate(aggregators.uniform_mean(), UPDATES, WEIGHTS)
  np.testing.assert_allclose(got, 3 * mean, rtol=1e-6)


@EACH
@pytest.mark.parametrize("sent", [np.nan, np.inf, 7.0])
def test_a_client_of_weight_zero_is_not_there(aggregator, sent):
  updates = UPDATES.copy()
  updates[3] = sent
  got = aggregate(aggregator, updates, WEIGHTS)
  without = aggregate(aggregator, UPDATES[:3], WEIGHTS[:3])
  np.testing.assert_array_equal(got, without)


@EACH
def test_the_mean_of_nobody_is_zero(aggregator):
  got = aggregate(aggregator, UPDATES, np.zeros(4, np.float32))
  np.testing.assert_array_equal(got, np.zeros(3))


@EACH
def test_the_mean_has_the_type_of_the_updates(aggregator):
  updates = UPDATES.astype(jnp.bfloat16)
  assert aggregate(aggregator, updates, WEIGHTS).dtype == jnp.bfloat16


def test_weights_are_normalised_unless_all_are_zero():
  got = aggregators.normalised(jnp.array([1.0, 0.0, 3.0]))
  assert got.tolist() == [0.25, 0, 0.75]
  assert aggregators.normalised(jnp.zeros(2)).tolist() == [0, 0]
  trees = {"x": jnp.array([[1.0, 2.0], [9.0, 9.0], [5.0, 6.0]])}
  assert aggregators.weighted_sum(trees, got)["x"].tolist() == [4, 5]
