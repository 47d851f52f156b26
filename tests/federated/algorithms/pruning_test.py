import functools

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, grouped, sparse, supports, wire
from fedjax_llm.federated import densities, parameters
from fedjax_llm.federated.algorithms import federated_select, flasc, pruning
from tests import placements

KEY = jax.random.key(4)
SGD = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)
STILL = optax.sgd(0.0)
ADAMW = flasc.server_adamw(0.1)


@functools.cache
def compose(name, loss_fn, server):
  make, density = {
    "SparseAdapter": (pruning.sparse_adapter, 0.4),
    "Adapter-LTH": (
      pruning.adapter_lth,
      densities.decaying(1.0, 0.6, every=2, rounds=5),
    ),
  }[name]
  algorithm = make(
    loss_fn, SGD, server, density=density, placement=placements.ALONE
  )
  algorithm = algorithm._replace(received=jax.jit(algorithm.received))
  return algorithm, jax.jit(algorithm.round)


def run(problem, name, cohorts, server=ADAMW):
  """States before and after each round, and the metrics of each."""
  algorithm, step = compose(name, problem.loss_fn, server)
  states, history = [algorithm.init(problem.trainable)], []
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
    history.append(jax.device_get(metrics))
  return states, history


def place(state, trainable):
  return state._replace(trainable=jax.tree.map(np.asarray, trainable))


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def largest(vector, k):
  order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
  return np.isin(np.arange(len(vector)), order[:k])


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


def kept_of(name, number, vector, before):
  """Which entries are sent in a round, of both methods."""
  n = len(vector)
  if name == "Adapter-LTH":
    return largest(vector, int(n * 0.6 ** (number // 2)))
  if number == 0:
    return np.ones(n, bool)
  return largest(vector, int(n * 0.4)) if number == 1 else before


@pytest.mark.parametrize("name", ["SparseAdapter", "Adapter-LTH"])
def test_pruning_is_its_oracle_in_float64(problem, oracle, name):
  # In five rounds Adapter-LTH prunes twice.
  cohorts = problem.cohorts(5)
  expected = oracle.flatten(problem.trainable)
  server = oracle.adamw(0.1)
  with jax.enable_x64(True):
    states, _ = run(problem, name, cohorts)
  kept = None
  for number, cohort in enumerate(cohorts):
    kept = kept_of(name, number, expected, kept)
    start = np.where(kept, expected, 0)
    update = np.zeros_like(start)
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = local_sgd_within(problem, oracle, start, kept, indices, mask)
      update += start - trained
    expected = server(expected, update / len(cohort.clients))
    got = oracle.flatten(states[number + 1].trainable)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_sparse_adapter_chooses_once_after_one_dense_round(problem):
  states, _ = run(problem, "SparseAdapter", problem.cohorts(5))
  algorithm, _ = compose("SparseAdapter", problem.loss_fn, ADAMW)
  chosen = [np.asarray(state.download[0][1]) for state in states]
  # Before round 0 and after it, nothing is chosen.
  assert [mask.sum() for mask in chosen] == [0, 0, 9, 9, 9, 9]
  np.testing.assert_array_equal(
    chosen[2], sparse.top_k_mask(flat(states[1].trainable), 9)
  )
  for state, mask in zip(states[2:], chosen[2:], strict=True):
    np.testing.assert_array_equal(mask, chosen[2])
    # A new choice would be another one, at least at the end.
    received = flat(algorithm.received(state, KEY))
    np.testing.assert_array_equal(
      received, np.where(mask, flat(state.trainable), 0)
    )
  assert (sparse.top_k_mask(flat(states[-1].trainable), 9) != chosen[-1]).any()


def test_sparse_adapter_moves_only_what_it_kept(problem):
  # The server adds no momentum and no decay.
  states, _ = run(problem, "SparseAdapter", problem.cohorts(3), REPLACE)
  first, *_, last = states[1:]
  mask = np.asarray(last.download[0][1])
  moved = flat(first.trainable) != flat(last.trainable)
  assert moved[mask].any()
  assert not moved[~mask].any()


def test_sparse_adapter_pays_for_one_dense_round(problem):
  _, (dense, *pruned) = run(problem, "SparseAdapter", problem.cohorts(5))
  n, k = flat(problem.trainable).size, 9
  values = np.zeros(k, np.float32)
  support = np.zeros(supports.nbytes(n, k), np.uint8)
  full = len(wire.dumps(base.Dense(np.zeros(n, np.float32))))
  down = len(wire.dumps(sparse.Sparse(values, support, n)))
  up = len(wire.dumps(base.Dense(values)))
  assert dense["download_bytes"].tolist() == [full] * 3
  assert dense["upload_bytes"].tolist() == [full] * 3
  for metrics in pruned:
    assert metrics["download_bytes"].tolist() == [down] * 3
    assert metrics["upload_bytes"].tolist() == [up] * 3


def test_adapter_lth_sends_less_and_less(problem):
  # int(n g^(t // f)) entries are sent; the first pruning is at t = f = 2.
  _, history = run(problem, "Adapter-LTH", problem.cohorts(5))
  n = flat(problem.trainable).size
  expected = [n, n, int(0.6 * n), int(0.6 * n), int(0.6**2 * n)]
  for name in ("download_entries", "upload_entries"):
    assert [x[name].tolist() for x in history] == [[k] * 3 for k in expected]


def test_a_lottery_without_decay_is_federated_select(problem):
  states = []
  density = densities.decaying(0.5, 1.0, every=1, rounds=9)
  for algorithm in (
    pruning.adapter_lth(
      problem.loss_fn, SGD, ADAMW, density=density, placement=placements.ALONE
    ),
    federated_select.federated_select(
      problem.loss_fn,
      SGD,
      ADAMW,
      density=0.5,
      warm_up_rounds=0,
      placement=placements.ALONE,
    ),
  ):
    step, state = jax.jit(algorithm.round), algorithm.init(problem.trainable)
    for cohort in problem.cohorts(2):
      arguments = (problem.frozen, problem.examples, cohort, KEY)
      state, _ = step(state, *arguments)
    states.append(state)
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_a_density_out_of_range_is_refused(problem, density):
  for make in (pruning.sparse_adapter, pruning.adapter_lth):
    with pytest.raises(ValueError, match="density in"):
      make(problem.loss_fn, SGD, ADAMW, density=density)


@pytest.mark.parametrize(
  ("make", "knobs"),
  [
    (pruning.sparse_adapter, {"density": 1 / 6}),
    (federated_select.federated_select, {"density": 1 / 6}),
    (flasc.flasc, {"download_density": 1 / 6, "upload_density": 1.0}),
  ],
)
def test_factors_are_received_apart_on_request(problem, make, knobs):
  # A Top-K of a sixth is filled by `a`, a hundred times larger, unless apart.
  scaled = {**problem.trainable, "a": 100 * problem.trainable["a"]}
  apart = functools.partial(
    grouped.top_k_per_group, parameters.owners(problem.trainable)
  )
  received = {}
  for name, top_k in {"global": sparse.top_k, "apart": apart}.items():
    algorithm = make(problem.loss_fn, STILL, ADAMW, top_k=top_k, **knobs)
    state, step = algorithm.init(scaled), jax.jit(algorithm.round)
    for cohort in problem.cohorts(2):
      arguments = (problem.frozen, problem.examples, cohort, KEY)
      state, _ = step(state, *arguments)
    state = place(state, scaled)
    received[name] = jax.device_get(jax.jit(algorithm.received)(state, KEY))
  assert not received["global"]["head"].any()
  assert np.count_nonzero(received["apart"]["a"]) == 2
  assert np.count_nonzero(received["apart"]["head"]) == 1


@pytest.mark.parametrize(
  "make", [pruning.sparse_adapter, federated_select.federated_select]
)
def test_what_has_moved_arrives_and_all_else_is_as_it_started(problem, make):
  # `b` too is not zero at the start, so that an offset would show everywhere.
  start = flat(problem.trainable) + np.float32(0.5)
  _, unravel = ravel_pytree(problem.trainable)
  mine = problem._replace(trainable=unravel(start))
  moved = lambda share: base.relative_to(start, sparse.top_k(share))
  algorithm = make(mine.loss_fn, SGD, REPLACE, density=0.25, top_k=moved)
  state, step = algorithm.init(mine.trainable), jax.jit(algorithm.round)
  for cohort in mine.cohorts(2):
    state, _ = step(state, mine.frozen, mine.examples, cohort, KEY)
  received = flat(jax.jit(algorithm.received)(state, KEY))
  kept = ~np.isclose(received, start, rtol=0, atol=1e-6)
  assert kept.sum() == 6
  vector = flat(state.trainable)
  np.testing.assert_allclose(received[kept], vector[kept], rtol=1e-5)
