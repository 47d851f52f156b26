import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients
from fedjax_llm.federated.algorithms import fed_avg

KEY = jax.random.key(2)
RATE = 0.05


@functools.cache
def compose(loss_fn, client, server):
  algorithm = fed_avg.fed_avg(loss_fn, client, server, clients_per_step=1)
  return algorithm, jax.jit(algorithm.round)


def run(problem, client, server, cohorts):
  """The parameters after each round, and the last state."""
  algorithm, step = compose(problem.loss_fn, client, server)
  state = algorithm.init(problem.trainable)
  trained = []
  for cohort in cohorts:
    state, _ = step(state, problem.frozen, problem.examples, cohort, KEY)
    trained.append(jax.device_get(state.trainable))
  return trained, state


MOMENTUM = optax.sgd(RATE, momentum=0.9)
PLAIN = optax.sgd(RATE)
REPLACE = optax.sgd(1.0)


def np_mean_update(problem, oracle, flat, cohort):
  """The mean over clients of received - trained, weighted by examples."""
  total = np.zeros_like(flat)
  for _, indices, mask, weight in zip(*cohort, strict=True):
    trained = oracle.local_sgd(problem, flat, indices, mask, RATE, 0.9)
    total += weight * (flat - trained)
  return total / cohort.weights.sum()


def test_fed_avg_is_its_oracle_in_float64(problem, oracle):
  # Law 20: different cohorts of unequal clients, weighted by their examples.
  cohorts = problem.cohorts(4)
  flat = oracle.flatten(problem.trainable)
  with jax.enable_x64(True):
    trained, _ = run(problem, MOMENTUM, REPLACE, cohorts)
  for cohort, got in zip(cohorts, trained, strict=True):
    flat = flat - np_mean_update(problem, oracle, flat, cohort)
    got = oracle.flatten(got)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


def test_a_server_that_replaces_has_the_mean_of_what_was_trained(problem):
  # Law 2.
  cohort = problem.cohort(1, 4, 6)
  train = jax.jit(clients.local_update(problem.loss_fn, MOMENTUM))
  total = 0
  for _, indices, mask, weight in zip(*cohort, strict=True):
    arguments = (problem.trainable, problem.frozen, problem.examples)
    trained = train(*arguments, indices, mask, KEY).trainable
    total += weight / cohort.weights.sum() * trained["head"]
  trained, _ = run(problem, MOMENTUM, REPLACE, [cohort])
  np.testing.assert_allclose(trained[0]["head"], total, rtol=1e-5)


def test_one_client_is_local_training(problem, oracle):
  # Law 2, with one client: two rounds without momentum go on as one.
  # Law 19: momentum starts afresh, so with it they do not.
  first, second = problem.cohort(5, order=0), problem.cohort(5, order=1)
  both = clients.Cohort(
    first.clients,
    np.concatenate([first.indices, second.indices], axis=1),
    np.concatenate([first.mask, second.mask], axis=1),
    first.weights,
  )

  def rounds_differ(optimizer):
    twice, _ = run(problem, optimizer, REPLACE, [first, second])
    once, _ = run(problem, optimizer, REPLACE, [both])
    return abs(oracle.flatten(twice[-1]) - oracle.flatten(once[-1])).max()

  assert rounds_differ(PLAIN) < 1e-6
  assert rounds_differ(MOMENTUM) > 1e-3


def test_unequal_clients_count_by_their_weights(problem, recorder):
  cohort = problem.cohort(0, 2)  # One example and eight.
  updates = {}
  for name, weights in {
    "examples": cohort.weights,
    "uniform": np.ones(2),
    "first": np.array([1, 0]),
    "second": np.array([0, 3]),
  }.items():
    weighted = cohort._replace(weights=weights.astype(np.float32))
    _, state = run(problem, MOMENTUM, recorder, [weighted])
    updates[name] = state.optimizer["head"]
  one, eight = updates["first"], updates["second"]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  close(updates["examples"], (one + 8 * eight) / 9)
  close(updates["uniform"], (one + eight) / 2)


def np_momentum(gradient, state):
  velocity = 0.9 * state.get("velocity", 0) + gradient
  return {"velocity": velocity}, velocity


def np_adam(gradient, state):
  steps = state.get("steps", 0) + 1
  first = 0.9 * state.get("first", 0) + 0.1 * gradient
  second = 0.99 * state.get("second", 0) + 0.01 * gradient**2
  step = first / (1 - 0.9**steps)
  step = step / (np.sqrt(second / (1 - 0.99**steps)) + 1e-3)
  return {"steps": steps, "first": first, "second": second}, step


def np_adagrad(gradient, state):
  total = state.get("total", 1e-6) + gradient**2
  return {"total": total}, gradient / np.sqrt(total + 1e-7)


SERVERS = {
  "FedAvgM": (optax.sgd(0.5, momentum=0.9), np_momentum),
  "FedAdam": (optax.adam(0.5, b2=0.99, eps=1e-3), np_adam),
  "FedAdagrad": (
    optax.adagrad(0.5, initial_accumulator_value=1e-6),
    np_adagrad,
  ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_optimizer_minimises_along_the_mean_update(
  problem, oracle, name
):
  server, np_server = SERVERS[name]
  cohorts = problem.cohorts(3)
  flat, state = oracle.flatten(problem.trainable), {}
  for cohort in cohorts:
    update = np_mean_update(problem, oracle, flat, cohort)
    state, step = np_server(update, state)
    flat = flat - 0.5 * step
  trained, _ = run(problem, MOMENTUM, server, cohorts)
  got = oracle.flatten(trained[-1])
  # Where an update is about 0, adaptive steps magnify float32's rounding.
  np.testing.assert_allclose(got, flat, rtol=1e-3, atol=1e-3)


def test_the_proximal_term_keeps_clients_close(problem):
  cohorts = [problem.cohort(2, 4, 6)]
  start = jnp.asarray(problem.trainable["head"])
  moved = []
  for mu in (0.0, 1.0, 10.0):
    client = optax.chain(clients.proximal(mu), PLAIN)
    trained, _ = run(problem, client, REPLACE, cohorts)
    moved.append(float(abs(trained[0]["head"] - start).sum()))
  plain, _ = run(problem, PLAIN, REPLACE, cohorts)
  assert moved[0] == float(abs(plain[0]["head"] - start).sum())
  assert moved[0] > moved[1] > moved[2]
