import functools

import jax
import numpy as np
import optax

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
  # Law 2. Weighted for one client, the mean is what that client trained.
  cohort = problem.cohort(1, 4, 6)

  def weighted(*weights):
    weights = np.array(weights, np.float32)
    cohorts = [cohort._replace(weights=weights)]
    return run(problem, MOMENTUM, REPLACE, cohorts)[0][0]["head"]

  trained = [weighted(*row) for row in np.eye(3)]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(weighted(1, 1, 1), sum(trained) / 3)
  # By examples, of which they own three, two and four.
  mean = (3 * trained[0] + 2 * trained[1] + 4 * trained[2]) / 9
  close(weighted(*cohort.weights), mean)


def test_one_client_is_local_training(problem, oracle):
  # Law 2, with one client: two rounds without momentum go on as one.
  # Law 19: momentum starts afresh, so with it they do not.
  first, second = (problem.cohort(5, order=i, steps=8) for i in (0, 1))
  both = first._replace(
    indices=np.concatenate([first.indices[:, :4], second.indices[:, :4]], 1),
    mask=np.concatenate([first.mask[:, :4], second.mask[:, :4]], 1),
  )

  def rounds_differ(optimizer):
    twice, _ = run(problem, optimizer, REPLACE, [first, second])
    once, _ = run(problem, optimizer, REPLACE, [both])
    return abs(oracle.flatten(twice[-1]) - oracle.flatten(once[-1])).max()

  assert rounds_differ(PLAIN) < 1e-6
  assert rounds_differ(MOMENTUM) > 1e-3


def test_fed_adam_is_adam_along_the_mean_update(problem, oracle):
  cohorts = problem.cohorts(3)
  flat = oracle.flatten(problem.trainable)
  first = second = 0
  with jax.enable_x64(True):
    server = optax.adam(0.1, b1=0.9, b2=0.99, eps=1e-3)
    trained, _ = run(problem, MOMENTUM, server, cohorts)
  for steps, (cohort, got) in enumerate(zip(cohorts, trained, strict=True), 1):
    update = np_mean_update(problem, oracle, flat, cohort)
    first = 0.9 * first + 0.1 * update
    second = 0.99 * second + 0.01 * update**2
    mean, square = first / (1 - 0.9**steps), second / (1 - 0.99**steps)
    flat = flat - 0.1 * mean / (np.sqrt(square) + 1e-3)
    got = oracle.flatten(got)
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)
