import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import ef21, fed_avg
from tests import placements

KEY = jax.random.key(6)
SGD = optax.sgd(0.05, momentum=0.9)
SERVER = optax.sgd(0.7)
THIRD, DENSE = sparse.top_k(0.3), compression.identity()


@functools.cache
def compose(loss_fn, upload):
  algorithm = ef21.ef21(
    loss_fn,
    SGD,
    SERVER,
    population=7,
    upload=upload,
    placement=placements.ALONE,
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, upload):
  """The last state and metrics."""
  algorithm, step = compose(problem.loss_fn, upload)
  state, metrics = algorithm.init(problem.trainable), None
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(state, *arguments)
  return state, metrics


def known(state):
  """g_i of all clients, [population, n]."""
  ((known, _),) = state.upload
  return np.asarray(known)


def mean_known(state):
  """What the server takes for the mean of all g_i."""
  trace, _ = state.optimizer
  vector, _ = jax.flatten_util.ravel_pytree(trace.trace)
  return np.asarray(vector)


def test_ef21_is_its_oracle_in_float64(problem, oracle):
  cohorts = problem.cohorts(4)
  flat = oracle.flatten(problem.trainable)
  expected = {client: np.zeros_like(flat) for client in range(7)}
  for cohort in cohorts:
    for i, client in enumerate(cohort.clients.tolist()):
      trained = oracle.local_sgd(
        problem, flat, cohort.indices[i], cohort.mask[i], 0.05, 0.9
      )
      change = flat - trained - expected[client]
      expected[client] = expected[client] + oracle.top_k(change, 0.3)
    flat = flat - 0.7 * sum(expected.values()) / 7
  with jax.enable_x64(True):
    state, _ = run(problem, cohorts, THIRD)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
  close(oracle.flatten(state.trainable), flat)
  close(known(state), np.stack(list(expected.values())))


def test_changes_are_not_taken_for_updates(problem):
  _, metrics = run(problem, problem.cohorts(1), DENSE)
  assert metrics["train_loss"] > 0
  assert not {"update_cosine", "innovation_cosine"} & metrics.keys()


@pytest.mark.parametrize(
  ("compressor", "left"),
  [
    # Shares of the squared error that one message leaves at most.
    (compression.top_k(1 / 8), 7 / 8),
    (compression.sign(), 63 / 64),
  ],
)
def test_what_is_known_settles_at_what_does_not_change(compressor, left):
  vector = jax.random.normal(KEY, (64,))
  increments = ef21.increments(compressor)

  def step(state, _):
    _, state = increments.encode(vector, state, KEY)
    return state, jnp.sum((vector - state[0]) ** 2)

  start, steps = increments.init(vector), 400
  (settled, _), errors = jax.lax.scan(step, start, None, steps)
  bounds = jnp.sum(vector**2) * left ** np.arange(1, steps + 1)
  # Float32 does not come nearer than its last bits.
  assert (errors <= bounds + 1e-10).all()
  np.testing.assert_allclose(settled, vector, atol=1e-5)


@pytest.mark.parametrize("upload", [THIRD, DENSE])
def test_the_server_s_mean_is_that_of_all_clients(problem, upload):
  # Whatever the messages lose, and whoever was there.
  state, _ = run(problem, problem.cohorts(5), upload)
  mean = known(state).mean(0)
  assert abs(mean).max() > 1e-2
  np.testing.assert_allclose(mean_known(state), mean, rtol=1e-4, atol=1e-6)


def test_uncompressed_and_with_everybody_it_is_fed_avg(problem):
  cohorts = [problem.cohort(*range(7), order=i) for i in range(3)]
  state, _ = run(problem, cohorts, DENSE)
  dense = fed_avg.fed_avg(
    problem.loss_fn,
    SGD,
    SERVER,
    aggregate=aggregators.uniform_mean(),
    placement=placements.ALONE,
  )
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  # Sums of differences round, where a plain upload does not.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, state.trainable, expected.trainable)


def test_who_was_not_there_keeps_what_is_known_of_it(problem):
  cohort = problem.cohort(2, 5)
  before, _ = run(problem, [cohort], THIRD)
  absent = cohort._replace(weights=np.array([1, 0], np.float32))
  after, _ = run(problem, [cohort, absent], THIRD)
  moved = np.any(known(after) != known(before), axis=1)
  assert np.flatnonzero(moved).tolist() == [2]


def test_the_difference_is_what_travels(problem):
  _, metrics = run(problem, problem.cohorts(1), THIRD)
  n = sum(x.size for x in jax.tree.leaves(problem.trainable))
  vector = np.ones(n, np.float32)
  up, _ = THIRD.encode(vector, (), KEY)
  assert metrics["upload_bytes"].tolist() == [len(wire.dumps(up))] * 3
  down = len(wire.dumps(base.Dense(vector)))
  assert metrics["download_bytes"].tolist() == [down] * 3
