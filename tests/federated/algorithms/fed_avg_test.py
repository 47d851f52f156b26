import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.federated import channels, clients
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(2)
RATE = 0.05


@functools.cache
def compose(loss_fn, client, server, **parts):
  algorithm = fed_avg.fed_avg(
    loss_fn, client, server, placement=placements.ALONE, **parts
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, client, server, cohorts, **parts):
  """The parameters after each round, and the last state."""
  algorithm, step = compose(problem.loss_fn, client, server, **parts)
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
  # The cohorts differ; their unequal clients are weighted by examples.
  cohorts = problem.cohorts(4)
  flat = oracle.flatten(problem.trainable)
  with jax.enable_x64(True):
    trained, _ = run(problem, MOMENTUM, REPLACE, cohorts)
  for cohort, got in zip(cohorts, trained, strict=True):
    flat = flat - np_mean_update(problem, oracle, flat, cohort)
    got = oracle.flatten(got)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


def test_top_k_with_error_feedback_is_its_oracle_in_float64(problem, oracle):
  # Each client keeps its own residual until it comes again.
  cohorts = problem.cohorts(4)
  assert np.bincount(np.ravel([x.clients for x in cohorts])).max() > 1
  upload = compression.error_feedback(compression.top_k(0.3))
  channel = channels.Channel(upload=upload)
  with jax.enable_x64(True):
    trained, _ = run(
      problem, MOMENTUM, REPLACE, cohorts, channel=channel, population=7
    )
  flat, residuals = oracle.flatten(problem.trainable), np.zeros((7, 24))
  for cohort, got in zip(cohorts, trained, strict=True):
    total = np.zeros_like(flat)
    for client, indices, mask, weight in zip(*cohort, strict=True):
      after = oracle.local_sgd(problem, flat, indices, mask, RATE, 0.9)
      target = flat - after + residuals[client]
      sent = oracle.top_k(target, 0.3)
      residuals[client] = target - sent
      total += weight * sent
    flat = flat - total / cohort.weights.sum()
    np.testing.assert_allclose(
      oracle.flatten(got), flat, rtol=1e-12, atol=1e-14
    )


def test_fed_prox_is_its_oracle_in_float64(problem, oracle):
  # The penalty pulls to the download of this round, not to the start.
  cohorts, mu = problem.cohorts(4), 0.5
  client = optax.chain(clients.proximal(mu), PLAIN)
  with jax.enable_x64(True):
    trained, _ = run(problem, client, REPLACE, cohorts)
  start = oracle.flatten(problem.trainable)
  for cohort, got in zip(cohorts, trained, strict=True):
    mean = np.zeros_like(start)
    for _, indices, mask, weight in zip(*cohort, strict=True):
      flat = start
      for rows, real in zip(indices, mask, strict=True):
        pull = RATE * mu * (flat - start) * real.any()
        flat = (
          oracle.local_sgd(problem, flat, rows[None], real[None], RATE, 0)
          - pull
        )
      mean += weight / cohort.weights.sum(dtype=np.float64) * flat
    start = mean
    np.testing.assert_allclose(
      oracle.flatten(got), start, rtol=1e-12, atol=1e-14
    )


def test_a_server_that_replaces_has_the_mean_of_what_was_trained(problem):
  # If only one client has a weight, the mean is what it trained.
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
  # Without momentum, two rounds equal one round of two epochs. With momentum
  # they do not, because it starts anew in each round.
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


def np_adaptive(grow, rate, b1, tau):
  """Algorithm 2 of Reddi et al.: (parameters, update) -> parameters."""
  first, second = 0.0, tau**2

  def step(flat, update):
    nonlocal first, second
    # The paper's delta is trained minus received: it ascends.
    first = b1 * first + (1 - b1) * -update
    second = grow(second, update**2)
    return flat + rate * first / (np.sqrt(second) + tau)

  return step


def np_momentum(rate, momentum):
  velocity = 0.0

  def step(flat, update):
    nonlocal velocity
    velocity = momentum * velocity + update
    return flat - rate * velocity

  return step


SERVERS = {
  "FedAvgM": (
    fed_avg.fed_avg_m(0.3, momentum=0.8),
    lambda: np_momentum(0.3, 0.8),
  ),
  "FedAdam": (
    fed_avg.fed_adam(0.1, b1=0.8, b2=0.95, tau=1e-2),
    lambda: np_adaptive(lambda v, d: 0.95 * v + 0.05 * d, 0.1, 0.8, 1e-2),
  ),
  "FedYogi": (
    fed_avg.fed_yogi(0.1, b1=0.8, b2=0.95, tau=1e-2),
    lambda: np_adaptive(
      lambda v, d: v - 0.05 * d * np.sign(v - d), 0.1, 0.8, 1e-2
    ),
  ),
  "FedAdagrad": (
    fed_avg.fed_adagrad(0.1, b1=0.3, tau=1e-2),
    lambda: np_adaptive(lambda v, d: v + d, 0.1, 0.3, 1e-2),
  ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_servers_step_as_the_paper_says_in_float64(problem, oracle, name):
  # Laws of Algorithm 2: v starts at tau squared, no bias is corrected, tau is
  # outside the root. Here along updates as of a run; the round gives them.
  server, np_server = SERVERS[name][0], SERVERS[name][1]()
  flat = oracle.flatten(problem.trainable)
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    got, step = flat, jax.jit(server.update)
    state = server.init(got)
    for scale in (1, 1e-3, 0, 1):
      update = scale * rng.normal(size=flat.size)
      moved, state = step(update, state, got)
      got, flat = got + np.asarray(moved), np_server(flat, update)
      np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


def test_fed_adam_is_adam_along_the_mean_update(problem, oracle):
  cohorts = problem.cohorts(4)
  flat = oracle.flatten(problem.trainable)
  server, np_server = SERVERS["FedAdam"][0], SERVERS["FedAdam"][1]()
  with jax.enable_x64(True):
    trained, _ = run(problem, MOMENTUM, server, cohorts)
  for cohort, got in zip(cohorts, trained, strict=True):
    flat = np_server(flat, np_mean_update(problem, oracle, flat, cohort))
    got = oracle.flatten(got)
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


def test_a_servers_rate_may_be_a_schedule():
  server = fed_avg.fed_adam(optax.piecewise_constant_schedule(1.0, {1: 0.0}))
  update, state = np.ones(3, np.float32), server.init(np.zeros(3, np.float32))
  first, state = server.update(update, state)
  second, _ = server.update(update, state)
  assert (first < 0).all()
  assert not second.any()


@pytest.mark.parametrize(
  "wrong", [{"b1": 1.0}, {"b2": -0.1}, {"tau": 0.0}], ids=str
)
def test_numbers_of_a_server_that_are_out_of_range_are_refused(wrong):
  with pytest.raises(ValueError, match="adaptive server expected"):
    fed_avg.fed_adam(0.1, **wrong)
