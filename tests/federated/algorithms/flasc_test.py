import functools

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import sparse, supports, wire
from fedjax_llm.federated import aggregators, densities
from fedjax_llm.federated.algorithms import fed_avg, flasc
from tests import placements

KEY = jax.random.key(4)
SGD = optax.sgd(0.05, momentum=0.9)
STILL = optax.sgd(0.0)
# One step of it doubles the parameters: the update is minus the start.
DOUBLE = optax.stateless(lambda updates, params: params)
ADAMW = flasc.server_adamw(0.1)


@functools.cache
def compose(loss_fn, client, server, download, upload):
  return compile_round(
    flasc.flasc,
    loss_fn,
    client,
    server,
    download_density=download,
    upload_density=upload,
  )


def compile_round(make, *arguments, **knobs):
  algorithm = make(*arguments, placement=placements.ALONE, **knobs)
  return algorithm, jax.jit(algorithm.round)


def run(problem, client, server, download, upload, cohorts):
  """The last state, and the last metrics."""
  program = compose(problem.loss_fn, client, server, download, upload)
  *_, (state, metrics) = play(problem, program, cohorts)
  return state, metrics


def play(problem, program, cohorts):
  """The state and the metrics after each round."""
  algorithm, step = program
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, problem.examples, cohort, KEY)
    yield state, jax.device_get(metrics)


@functools.cache
def receive(loss_fn, download, upload):
  algorithm, _ = compose(loss_fn, SGD, ADAMW, download, upload)
  return algorithm.init, jax.jit(algorithm.received)


def received(problem, download, upload=0.5):
  """What clients receive in the first round."""
  init, fn = receive(problem.loss_fn, download, upload)
  return jax.device_get(fn(init(problem.trainable), KEY))


def alone(cohort, i):
  """The cohort, of which only one client is there."""
  weights = (np.arange(len(cohort.clients)) == i).astype(np.float32)
  return cohort._replace(weights=weights)


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def np_flasc(problem, oracle, cohorts, densities_of):
  """The server's parameters; densities are of (round, client)."""
  flat = oracle.flatten(problem.trainable)
  server = oracle.adamw(0.1)
  for number, cohort in enumerate(cohorts):
    update = np.zeros_like(flat)
    for client, indices, mask, _ in zip(*cohort, strict=True):
      down, up = densities_of(number, client)
      start = oracle.top_k(flat, down)
      trained = oracle.local_sgd(problem, start, indices, mask, 0.05, 0.9)
      update += oracle.top_k(start - trained, up)
    flat = server(flat, update / len(cohort.clients))
  return flat


def assert_close_in_float64(state, expected, oracle):
  got = oracle.flatten(state.trainable)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_flasc_is_its_oracle_in_float64(problem, oracle):
  # Masks in both directions, unequal clients of equal weight, AdamW.
  cohorts = problem.cohorts(4)
  expected = np_flasc(problem, oracle, cohorts, lambda *_: (0.6, 0.3))
  with jax.enable_x64(True):
    state, _ = run(problem, SGD, ADAMW, 0.6, 0.3, cohorts)
  assert_close_in_float64(state, expected, oracle)


def test_densities_by_round_are_their_oracle_in_float64(problem, oracle):
  # Each direction has its own schedule. The bytes follow both.
  cohorts = problem.cohorts(4)
  of = lambda number, client: (0.5 if number < 2 else 0.25, 0.8**number)
  expected = np_flasc(problem, oracle, cohorts, of)
  falling = densities.decaying(1.0, 0.8, every=1, rounds=4)
  program = compile_round(
    flasc.flasc,
    problem.loss_fn,
    SGD,
    ADAMW,
    download_density={0: 0.5, 2: 0.25},
    upload_density=falling,
  )
  with jax.enable_x64(True):
    history = list(play(problem, program, cohorts))
  assert_close_in_float64(history[-1][0], expected, oracle)
  for number, (_, metrics) in enumerate(history):
    down, up = of(number, 0)
    assert metrics["download_entries"].tolist() == [int(24 * down)] * 3
    assert metrics["upload_entries"].tolist() == [int(24 * up)] * 3


def test_tiers_are_their_oracle_in_float64(problem, oracle):
  # Clients are dealt to tiers in turn; one mean is over all.
  cohorts = problem.cohorts(4)
  tiers = ((0.25, 0.125), (0.5, 0.75), (1.0, 1.0))
  of = lambda number, client: tiers[client % 3]
  expected = np_flasc(problem, oracle, cohorts, of)
  make = functools.partial(flasc.flasc_tiers, tiers=tiers)
  program = compile_round(make, problem.loss_fn, SGD, ADAMW)
  with jax.enable_x64(True):
    *_, (state, _) = play(problem, program, cohorts)
  assert_close_in_float64(state, expected, oracle)


def test_one_tier_is_flasc_bit_for_bit(problem):
  cohorts = problem.cohorts(2)
  make = functools.partial(flasc.flasc_tiers, tiers=((0.6, 0.3),))
  program = compile_round(make, problem.loss_fn, SGD, ADAMW)
  *_, (got, _) = play(problem, program, cohorts)
  expected, _ = run(problem, SGD, ADAMW, 0.6, 0.3, cohorts)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_clients_are_of_the_tiers_they_are_said_to_be_of(problem):
  make = functools.partial(
    flasc.flasc_tiers,
    tiers=((0.25, 0.5), (0.75, 0.5)),
    of_client=lambda client: (client > 3).astype(np.int32),
  )
  program = compile_round(make, problem.loss_fn, SGD, ADAMW)
  *_, (_, metrics) = play(problem, program, [problem.cohort(2, 5, 3)])
  assert metrics["download_entries"].tolist() == [6, 18, 6]


def test_a_constant_schedule_is_a_constant_bit_for_bit(problem):
  cohorts = problem.cohorts(2)
  constant = densities.decaying(0.6, 1.0, every=1, rounds=9)
  make = functools.partial(
    flasc.flasc, download_density=constant, upload_density=0.3
  )
  program = compile_round(make, problem.loss_fn, SGD, ADAMW)
  *_, (got, _) = play(problem, program, cohorts)
  expected, _ = run(problem, SGD, ADAMW, 0.6, 0.3, cohorts)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_density_one_is_dense_fed_avg_bit_for_bit(problem):
  cohorts = problem.cohorts(3)
  state, _ = run(problem, SGD, ADAMW, 1.0, 1.0, cohorts)
  dense = fed_avg.fed_avg(
    problem.loss_fn,
    SGD,
    ADAMW,
    aggregate=aggregators.uniform_mean(),
    placement=placements.ALONE,
  )
  step = jax.jit(dense.round)
  expected = dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("density", [0.29, 0.9])
def test_messages_hold_exactly_k_entries(problem, recorder, density):
  # k is the floor, also with ties. At 0.9 the k-th magnitude is zero, because
  # `b` is zero; a threshold would select everything.
  n = flat(problem.trainable).size
  k = int(n * density)
  cohorts = [alone(problem.cohort(2, 5), 0)]
  state, metrics = run(problem, SGD, recorder, density, density, cohorts)
  support = np.zeros(supports.nbytes(n, k), np.uint8)
  message = wire.dumps(sparse.Sparse(np.zeros(k, np.float32), support, n))
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [len(message)] * 2
  assert np.count_nonzero(flat(state.optimizer)) == k
  assert np.count_nonzero(flat(received(problem, density))) == min(k, n - 8)


def test_the_mask_is_global_not_of_each_layer(problem):
  # A tensor that is scaled up takes the whole budget.
  scaled = {**problem.trainable, "a": 1000 * problem.trainable["a"]}
  kept = received(problem._replace(trainable=scaled), 0.5)
  assert kept["a"].all()
  assert not kept["head"].any()


def test_clients_start_from_one_mask_and_zeros(problem, recorder, oracle):
  # The start does not depend on the client.
  trainable = flat(problem.trainable)
  masked = oracle.top_k(trainable, 0.5)
  assert 0 < np.count_nonzero(masked) < np.count_nonzero(trainable)
  np.testing.assert_array_equal(flat(received(problem, 0.5)), masked)
  cohort = problem.cohort(2, 5, steps=1)
  for i in range(2):
    cohorts = [alone(cohort, i)]
    state, _ = run(problem, DOUBLE, recorder, 0.5, 1.0, cohorts)
    np.testing.assert_array_equal(-flat(state.optimizer), masked)


def test_clients_choose_what_they_send_each_for_themselves(problem, recorder):
  # They also send entries outside the mask they started from. The sum of an
  # entry is divided by all clients, even if few sent it.
  cohort = problem.cohort(2, 5, 3)
  update = lambda cohort: flat(
    run(problem, SGD, recorder, 0.5, 0.25, [cohort])[0].optimizer
  )
  updates = [update(alone(cohort, i)) for i in range(3)]
  supports = [set(np.flatnonzero(x).tolist()) for x in updates]
  assert supports[0] != supports[1] != supports[2]
  masked = set(np.flatnonzero(flat(received(problem, 0.5))).tolist())
  assert all(support - masked for support in supports)
  np.testing.assert_allclose(update(cohort), sum(updates) / 3, rtol=1e-6)


def test_clients_count_alike_whatever_they_own(problem, recorder):
  cohort = problem.cohort(2, 5, 3)
  heavy = cohort._replace(weights=np.array([100, 1, 1], np.float32))
  states = [
    run(problem, SGD, recorder, 0.5, 0.25, [each])[0]
    for each in (cohort, heavy)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_who_learns_at_rate_zero_leaves_the_server_its_decay(problem, oracle):
  # The update is measured from the masked start, so it is exactly zero. AdamW
  # decays by 0.01 of its rate, the default of torch, not that of optax.
  with jax.enable_x64(True):
    state, _ = run(problem, STILL, ADAMW, 0.5, 0.25, problem.cohorts(3))
  expected = oracle.flatten(problem.trainable) * (1 - 0.1 * 0.01) ** 3
  got = oracle.flatten(state.trainable)
  np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_the_download_does_not_depend_on_the_upload_density(problem):
  few, many = received(problem, 0.5, 0.1), received(problem, 0.5, 1.0)
  jax.tree.map(np.testing.assert_array_equal, few, many)


def test_the_server_stays_dense_and_what_is_received_is_sparse(problem):
  # Dense evaluation takes `state.trainable`, masked evaluation takes
  # `received`. A client pays for a support and k values in each direction.
  state, metrics = run(problem, SGD, ADAMW, 0.6, 0.3, problem.cohorts(4))
  _, fn = receive(problem.loss_fn, 0.6, 0.3)
  dense, masked = flat(state.trainable), flat(fn(state, KEY))
  assert np.count_nonzero(dense) > np.count_nonzero(masked)
  assert np.count_nonzero(masked) == int(0.6 * dense.size)
  np.testing.assert_array_equal(masked[masked != 0], dense[masked != 0])
  for name, k in (("download_bytes", 14), ("upload_bytes", 7)):
    assert all(4 * k < size < 4 * k + 16 for size in metrics[name].tolist())


@pytest.mark.parametrize("name", ["download_density", "upload_density"])
def test_a_density_out_of_range_is_refused(problem, name):
  densities = {"download_density": 0.5, "upload_density": 0.5, name: 0.0}
  with pytest.raises(ValueError, match="density in"):
    flasc.flasc(problem.loss_fn, SGD, ADAMW, **densities)
