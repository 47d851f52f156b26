import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.codecs import recording
from fedjax_llm.compression import base, wire
from fedjax_llm.federated.algorithms import fed_avg, tgap
from tests import placements

KEY = jax.random.key(8)
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)
DENSE = len(wire.dumps(base.Dense(np.zeros(24, np.float32))))


def federated(loss_fn, **knobs):
  return tgap.federated_pretraining(loss_fn, SGD, optax.sgd(1.0), **knobs)


def local(loss_fn, **knobs):
  return tgap.local_pretraining(loss_fn, SGD, **knobs)


@functools.cache
def compose(make, loss_fn, representation):
  algorithm = make(
    loss_fn,
    population=7,
    placement=placements.ALONE,
    representation=representation,
  )
  return algorithm, jax.jit(algorithm.round)


def play(problem, make, cohorts, representation="delta"):
  algorithm, step = compose(make, problem.loss_fn, representation)
  state, metrics = algorithm.init(problem.trainable), []
  for cohort in cohorts:
    state, line = step(state, problem.frozen, problem.examples, cohort, KEY)
    metrics.append(jax.device_get(line))
  return state, metrics


def np_recorded(problem, oracle, cohorts, is_local):
  """Start and end of each client's training, by plain loops."""
  start = oracle.flatten(problem.trainable)
  own = {client: start for client in range(7)}
  spans = []
  for cohort in cohorts:
    mean = 0
    for client, indices, mask, weight in zip(*cohort, strict=True):
      before = own[client] if is_local else start
      after = oracle.local_sgd(problem, before, indices, mask, RATE, 0.9)
      own[client] = after
      mean += weight / cohort.weights.sum(dtype=np.float64) * after
      spans.append((before, after))
    start = mean
  return np.array(spans), np.mean([own[x] for x in range(7)], axis=0)


@pytest.mark.parametrize("make", [federated, local])
@pytest.mark.parametrize("representation", ["delta", "state"])
def test_the_snapshots_are_those_of_the_oracle(
  problem, oracle, make, representation
):
  # One for every client and round, in order, in float64.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    state, metrics = play(problem, make, cohorts, representation)
    server = jax.device_get(state.trainable)
  spans, mean = np_recorded(problem, oracle, cohorts, make is local)
  before, after = spans[:, 0], spans[:, 1]
  expected = before - after if representation == "delta" else after
  got = np.concatenate([line["snapshots"] for line in metrics])
  assert got.shape == (12, 24)
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)
  if make is local:
    np.testing.assert_allclose(oracle.flatten(server), mean, rtol=1e-10)


def test_federated_pretraining_is_fed_avg_bit_for_bit(problem):
  cohorts = problem.cohorts(3)
  state, _ = play(problem, federated, cohorts)
  algorithm = fed_avg.fed_avg(
    problem.loss_fn, SGD, optax.sgd(1.0), placement=placements.ALONE
  )
  step = jax.jit(algorithm.round)
  expected = algorithm.init(problem.trainable)
  for cohort in cohorts:
    expected, _ = step(expected, problem.frozen, problem.examples, cohort, KEY)
  jax.tree.map(
    np.testing.assert_array_equal, state.trainable, expected.trainable
  )


def test_twenty_rounds_of_five_clients_are_a_hundred_snapshots(
  problem, tmp_path
):
  store = recording.Store.create(tmp_path, problem.trainable)
  cohorts = problem.cohorts(20, size=5)
  _, metrics = play(problem, federated, cohorts)
  for number, (cohort, line) in enumerate(zip(cohorts, metrics, strict=True)):
    store.append(
      number,
      clients=cohort.clients,
      weights=cohort.weights,
      vectors=line["snapshots"],
    )
  assert store.snapshots.shape == (100, 24)
  assert np.bincount(store.rounds).tolist() == [5] * 20
  assert set(store.clients) == set(range(7))


def test_a_first_step_moves_b_alone(problem):
  # b is zero, so the gradient of a is exactly zero.
  cohort = problem.cohort(2, 5, steps=1)
  _, metrics = play(problem, federated, [cohort])
  a, b = metrics[0]["snapshots"][:, :12], metrics[0]["snapshots"][:, 12:20]
  assert not a.any() and b.all()


@pytest.mark.parametrize(("make", "down"), [(federated, DENSE), (local, 0)])
def test_what_is_recorded_is_paid_for(problem, make, down):
  _, metrics = play(problem, make, problem.cohorts(4))
  assert metrics[1]["upload_bytes"].tolist() == [DENSE] * 3
  assert metrics[1]["download_bytes"].tolist() == [down] * 3


@pytest.mark.parametrize("make", [federated, local])
def test_another_representation_is_refused(problem, make):
  with pytest.raises(ValueError, match="'delta' or 'state', got 'gradient'"):
    make(problem.loss_fn, population=7, representation="gradient")
