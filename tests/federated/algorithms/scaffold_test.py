import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import aggregators, channels, clients
from fedjax_llm.federated.algorithms import fed_avg, scaffold
from tests import placements

KEY = jax.random.key(3)
RATE = 0.05
REPLACE = optax.sgd(1.0)


@functools.cache
def compose(loss_fn, server, population, channel=None, rate=RATE):
  algorithm = scaffold.scaffold(
    loss_fn,
    rate,
    server,
    population=population,
    channel=channel,
    placement=placements.ALONE,
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, server=REPLACE, channel=None):
  """The state before and after each round, and the last metrics."""
  algorithm, step = compose(problem.loss_fn, server, 7, channel)
  states, metrics = [algorithm.init(problem.trainable)], None
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
  return states, metrics


def np_train(problem, oracle, start, correction, indices, mask):
  """Trained parameters and the number of steps that were not padding."""
  flat, steps = start, 0
  for rows, real in zip(indices, mask, strict=True):
    if not real.any():
      continue
    total = np.zeros_like(flat)
    for row in rows[real]:
      x, y = problem.examples["x"][row], problem.examples["y"][row]
      total += oracle.gradient(flat, problem.frozen["w"], x, y)
    flat = flat - RATE * (total / real.sum() + correction)
    steps += 1
  return flat, steps


def test_scaffold_is_its_oracle_in_float64(problem, oracle):
  # Option II; clients with unequal steps have equal weights.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    states, _ = run(problem, cohorts, optax.sgd(0.7))
    states = jax.device_get(states[1:])
  flat = oracle.flatten(problem.trainable)
  control, controls = np.zeros_like(flat), np.zeros((7, flat.size))
  for cohort, state in zip(cohorts, states, strict=True):
    update, change = np.zeros_like(flat), np.zeros_like(flat)
    for client, indices, mask, _ in zip(*cohort, strict=True):
      trained, steps = np_train(
        problem, oracle, flat, control - controls[client], indices, mask
      )
      new = controls[client] - control + (flat - trained) / (steps * RATE)
      change += new - controls[client]
      update += (flat - trained) / len(cohort.clients)
      controls[client] = new
    flat, control = flat - 0.7 * update, control + change / 7
    close = functools.partial(
      np.testing.assert_allclose, rtol=1e-12, atol=1e-13
    )
    close(oracle.flatten(state.trainable), flat)
    close(state.control, control)
    close(state.controls, controls)


def test_who_is_the_only_client_runs_fed_avg_bit_for_bit(problem):
  # c is then its c_i, and corrects nothing.
  cohorts = [problem.cohort(0, order=i) for i in range(3)]
  _, step = compose(problem.loss_fn, REPLACE, 1)
  dense = fed_avg.fed_avg(problem.loss_fn, optax.sgd(RATE), REPLACE)
  fed_avg_step = jax.jit(dense.round)
  algorithm, _ = compose(problem.loss_fn, REPLACE, 1)
  got, expected = (
    algorithm.init(problem.trainable),
    dense.init(problem.trainable),
  )
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    got, _ = step(got, *arguments)
    expected, _ = fed_avg_step(expected, *arguments)
  jax.tree.map(np.testing.assert_array_equal, got.trainable, expected.trainable)
  assert np.asarray(got.controls).any()


LOSSY = channels.Channel(
  sparse.top_k(0.5),
  compression.error_feedback(
    compression.chain(sparse.top_k(0.25), compression.stochastic_uniform(8))
  ),
)


@pytest.mark.parametrize("channel", [None, LOSSY])
def test_the_server_s_control_is_the_mean_of_the_clients(problem, channel):
  # Whatever the messages lose, and whoever was there.
  states, _ = run(problem, problem.cohorts(5), channel=channel)
  state = jax.device_get(states[-1])
  mean = state.controls.mean(0)
  assert abs(mean).max() > 1e-2
  np.testing.assert_allclose(state.control, mean, rtol=1e-4, atol=1e-6)


def test_who_was_not_there_keeps_its_control(problem):
  cohort = problem.cohort(2, 5)
  absent = cohort._replace(weights=np.array([1, 0], np.float32))
  (before, after), _ = run(problem, [absent])
  moved = np.any(np.asarray(after.controls) != before.controls, axis=1)
  assert np.flatnonzero(moved).tolist() == [2]
  idle = cohort._replace(
    mask=cohort.mask & np.array([True, False])[:, None, None]
  )
  (_, before, after), _ = run(problem, [cohort, idle])
  np.testing.assert_array_equal(after.controls[5], before.controls[5])
  assert np.any(np.asarray(after.controls[2]) != before.controls[2])


def test_a_round_of_nobody_only_counts(problem):
  cohort = problem.cohort(2, 5)
  nobody = cohort._replace(weights=np.zeros(2, np.float32))
  (_, before, after), _ = run(problem, [cohort, nobody])
  jax.tree.map(np.testing.assert_array_equal, after, before._replace(round=2))


def test_both_vectors_travel_both_ways(problem):
  _, metrics = run(problem, [problem.cohort(2, 5)])
  vector, _ = ravel_pytree(problem.trainable)
  message = len(wire.dumps(base.Dense(np.zeros(vector.size, np.float32))))
  for direction in ("download", "upload"):
    assert metrics[f"{direction}_bytes"].tolist() == [2 * message] * 2
    assert metrics[f"{direction}_entries"].tolist() == [2 * vector.size] * 2


# Two clients whose losses are quadratics of other centers and curvatures.
CENTERS = np.array([[1.0, -2.0], [-3.0, 4.0]], np.float32)
CURVES = np.array([[4.0, 1.0], [1.0, 3.0]], np.float32)


def quadratic(trainable, frozen, examples, mask, key):
  del frozen, key
  losses = examples["curve"] * (trainable["x"][None] - examples["center"]) ** 2
  return jnp.where(mask, losses.sum(1) / 2, 0).sum(), mask.sum()


def test_scaffold_goes_to_the_optimum_that_fed_avg_drifts_from():
  optimum = (CURVES * CENTERS).sum(0) / CURVES.sum(0)
  steps = 20
  cohort = clients.Cohort(
    np.arange(2, dtype=np.int32),
    np.broadcast_to(np.arange(2, dtype=np.int32)[:, None, None], (2, steps, 1)),
    np.ones((2, steps, 1), bool),
    np.ones(2, np.float32),
  )
  examples = {"center": CENTERS, "curve": CURVES}
  start = {"x": np.zeros(2, np.float32)}

  def after(algorithm, rounds=60):
    step, state = jax.jit(algorithm.round), algorithm.init(start)
    for _ in range(rounds):
      state, _ = step(state, {}, examples, cohort, KEY)
    return np.asarray(state.trainable["x"])

  mean = aggregators.uniform_mean()
  drifted = after(
    fed_avg.fed_avg(quadratic, optax.sgd(0.1), REPLACE, aggregate=mean)
  )
  # Where it stays: both clients go the same share of the way to their centers.
  shares = 1 - (1 - 0.1 * CURVES) ** steps
  fixed = (shares * CENTERS).sum(0) / shares.sum(0)
  np.testing.assert_allclose(drifted, fixed, rtol=1e-4)
  assert abs(drifted - optimum).min() > 0.5
  algorithm, _ = compose(quadratic, REPLACE, 2, None, 0.1)
  np.testing.assert_allclose(after(algorithm), optimum, rtol=1e-4)


def test_what_cannot_work_is_refused(problem):
  make = functools.partial(scaffold.scaffold, problem.loss_fn, population=7)
  with pytest.raises(ValueError, match="client_learning_rate=0.0 > 0"):
    make(0.0, REPLACE)
  frozen = channels.Channel(trains=lambda payload: payload.values != 0)
  with pytest.raises(ValueError, match="without `trains`"):
    make(RATE, REPLACE, channel=frozen)
