import functools

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, sparse, supports, wire
from fedjax_llm.federated.algorithms import fed_avg, federated_select, flasc

KEY = jax.random.key(4)
SGD = optax.sgd(0.05, momentum=0.9)
# A dense round of it leaves some of `b` among the largest parameters.
FAR = optax.sgd(3.0)
ADAM = optax.adamw(0.05, weight_decay=0.01)
REPLACE = optax.sgd(1.0)
ADAMW = flasc.server_adamw(0.1)


@functools.cache
def compose(loss_fn, density, warm_up_rounds, client=SGD, server=ADAMW):
  algorithm = federated_select.federated_select(
    loss_fn,
    client,
    server,
    density=density,
    warm_up_rounds=warm_up_rounds,
    clients_per_step=1,
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, *knobs):
  """The state and the metrics after each round."""
  algorithm, step = compose(problem.loss_fn, *knobs)
  state = algorithm.init(problem.trainable)
  history = []
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, problem.examples, cohort, KEY)
    history.append((jax.device_get(state), jax.device_get(metrics)))
  return history


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def local_sgd_within(problem, oracle, start, kept, indices, mask):
  """Momentum SGD at a client that trains the entries in `kept` alone."""
  x, y = problem.examples["x"], problem.examples["y"]
  velocity = [0.0] * start.size
  flat = start.copy()
  for rows, real in zip(indices, mask, strict=True):
    own = rows[real]
    if not own.size:
      continue
    gradient = sum(
      oracle.gradient(flat, problem.frozen["w"], x[row], y[row]) for row in own
    )
    for i in np.flatnonzero(kept):
      velocity[i] = 0.9 * velocity[i] + gradient[i] / own.size
      flat[i] -= 0.05 * velocity[i]
  return flat


@pytest.mark.parametrize("warm_up_rounds", [0, 1])
def test_federated_select_is_its_oracle_in_float64(
  problem, oracle, warm_up_rounds
):
  # Law 20.
  cohorts = problem.cohorts(4)
  expected = oracle.flatten(problem.trainable)
  server = oracle.adamw(0.1)
  with jax.enable_x64(True):
    history = run(problem, cohorts, 0.6, warm_up_rounds)
  for number, cohort in enumerate(cohorts):
    density = 1.0 if number < warm_up_rounds else 0.6
    start = oracle.top_k(expected, density)
    # Zeros too, if nothing else is left to choose: the first of them.
    k = int(density * expected.size)
    order = sorted(range(expected.size), key=lambda i: (-abs(expected[i]), i))
    kept = np.isin(np.arange(expected.size), order[:k])
    update = np.zeros_like(start)
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = local_sgd_within(problem, oracle, start, kept, indices, mask)
      update += start - trained
    expected = server(expected, update / len(cohort.clients))
    got = oracle.flatten(history[number][0].trainable)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_without_a_dense_round_lora_is_stuck_and_with_one_it_learns(problem):
  # Law 11: `a` and the head fill the Top-K of every round, so that `b` is never
  # received, stays zero, and gives `a` no gradient.
  cohorts = problem.cohorts(6)
  filled = sum(problem.trainable[name].size for name in ("a", "head"))
  assert 0.5 * flat(problem.trainable).size < filled
  stuck = run(problem, cohorts, 0.5, 0, SGD, FAR)
  for state, _ in stuck:
    assert not state.trainable["b"].any()
    np.testing.assert_array_equal(
      state.trainable["a"], problem.trainable["a"].astype(np.float32)
    )
    assert (state.trainable["head"] != problem.trainable["head"]).any()
  free = run(problem, cohorts, 0.5, 1, SGD, FAR)
  moved = [state.trainable["b"] for state, _ in free]
  assert all((x != y).any() for x, y in zip(moved, moved[1:], strict=False))


@pytest.mark.parametrize("client", [SGD, ADAM])
def test_clients_move_nothing_that_they_did_not_receive(problem, client):
  # Law 8, momentum and decay included. The server replaces, so what it has
  # outside the mask stays bit for bit.
  history = run(problem, problem.cohorts(3), 0.5, 1, client, REPLACE)
  for (before, _), (after, _) in zip(history, history[1:], strict=False):
    kept = np.asarray(sparse.top_k_mask(flat(before.trainable), 12))
    moved = flat(before.trainable) != flat(after.trainable)
    assert moved[kept].any()
    assert not moved[~kept].any()


def test_a_support_travels_down_and_values_alone_travel_up(problem):
  # Law 17: the first round is dense.
  (_, warm), (_, sparse_round) = run(problem, problem.cohorts(2), 0.5, 1)
  n = flat(problem.trainable).size
  values = np.zeros(n // 2, np.float32)
  support = np.zeros(supports.nbytes(n, n // 2), np.uint8)
  down = wire.dumps(sparse.Sparse(values, support, n))
  up = wire.dumps(base.Dense(values))
  assert sparse_round["download_bytes"].tolist() == [len(down)] * 3
  assert sparse_round["upload_bytes"].tolist() == [len(up)] * 3
  assert sparse_round["download_entries"].tolist() == [n // 2] * 3
  assert sparse_round["upload_entries"].tolist() == [n // 2] * 3
  full = len(wire.dumps(base.Dense(np.zeros(n, np.float32))))
  for name in ("download_bytes", "upload_bytes"):
    assert warm[name].tolist() == [full] * 3


def test_density_one_is_dense_fed_avg_bit_for_bit(problem):
  # Law 1.
  cohorts = problem.cohorts(2)
  cohorts = [x._replace(weights=np.ones(3, np.float32)) for x in cohorts]
  got, _ = run(problem, cohorts, 1.0, 0)[-1]
  dense = fed_avg.fed_avg(problem.loss_fn, SGD, ADAMW, clients_per_step=1)
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_warm_up_of_less_than_nothing_is_refused(problem):
  with pytest.raises(ValueError, match="to be 0 or more"):
    compose(problem.loss_fn, 0.5, -1)
