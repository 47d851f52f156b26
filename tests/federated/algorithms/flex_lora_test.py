import jax
import numpy as np
import optax
import pytest

from fedjax_llm.federated.algorithms import flex_lora
from tests import placements

KEY = jax.random.key(3)
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)
RANKS = (1, 2)


def play(problem, cohorts, **knobs):
  algorithm = flex_lora.flex_lora(
    problem.loss_fn, SGD, ranks=RANKS, placement=placements.ALONE, **knobs
  )
  step = jax.jit(algorithm.round)
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, problem.examples, cohort, KEY)
  return jax.device_get((state, metrics))


def np_flex_lora(problem, oracle, cohorts):
  """The server's factors and head."""
  a, b, head = (problem.trainable[x] for x in ("a", "b", "head"))
  for cohort in cohorts:
    heads, product = np.zeros(4), np.zeros((6, 4))
    for client, indices, mask, weight in zip(*cohort, strict=True):
      rank = RANKS[client % 2]
      kept = np.arange(2) < rank
      start = np.concatenate([(a * kept).ravel(), (b.T * kept).T.ravel(), head])
      trained = oracle.local_sgd(problem, start, indices, mask, RATE, 0.9)
      own_a, own_b, own = np.split(trained, [12, 20])
      share = weight / cohort.weights.sum(dtype=np.float64)
      product += share * own_a.reshape(6, 2) @ own_b.reshape(2, 4)
      heads += share * own
    # The paper's is the transpose: its B is U S and its A is V'.
    u, s, v = np.linalg.svd(product.T)
    sign = np.array([-1 if row[np.abs(row).argmax()] < 0 else 1 for row in v])
    a = (v[:2] * sign[:2, None]).T
    b = (u[:, :2] * sign[:2] * s[:2]).T
    head = heads
  return {"a": a, "b": b, "head": head}


def test_flex_lora_is_its_oracle_in_float64(problem, oracle):
  # Clients have ranks 1 and 2 and are weighted by their examples.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    state, _ = play(problem, cohorts)
  expected = np_flex_lora(problem, oracle, cohorts)
  got = state.trainable
  assert got["a"].dtype == np.float64
  for name, leaf in expected.items():
    # A decomposition errs by the product over its gap, hundreds of times here.
    np.testing.assert_allclose(got[name], leaf, rtol=1e-10, atol=1e-12)


def test_what_a_client_receives_is_the_best_of_its_rank(problem):
  # The first message, of the start, and what all later ones are cut from.
  state, metrics = play(problem, problem.cohorts(2))
  a, b = state.trainable["a"], state.trainable["b"]
  np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-6)
  strengths = np.linalg.norm(b, axis=1)
  assert strengths[0] > strengths[1] > 0
  tier = problem.cohorts(2)[-1].clients % 2
  for direction in ("download_entries", "upload_entries"):
    expected = np.array([10 + 4, 20 + 4])[tier]
    np.testing.assert_array_equal(metrics[direction], expected)


def test_a_rank_above_the_adapter_s_is_refused(problem):
  algorithm = flex_lora.flex_lora(problem.loss_fn, SGD)
  with pytest.raises(ValueError, match=r"in \[1, 2\].* got \(1, 4, 16\)"):
    algorithm.init(problem.trainable)
