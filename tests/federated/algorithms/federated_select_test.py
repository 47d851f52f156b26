import functools

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, sparse, supports, wire
from fedjax_llm.federated.algorithms import fed_avg, federated_select, flasc
from tests import placements

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
    placement=placements.ALONE,
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
  # `a` and the head fill the Top-K of every round. So `b` is never received,
  # stays zero, and gives `a` no gradient.
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
  # Momentum and decay do not move other entries either. The server replaces its
  # entries, so those outside the mask stay bit for bit.
  history = run(problem, problem.cohorts(3), 0.5, 1, client, REPLACE)
  for (before, _), (after, _) in zip(history, history[1:], strict=False):
    kept = np.asarray(sparse.top_k_mask(flat(before.trainable), 12))
    moved = flat(before.trainable) != flat(after.trainable)
    assert moved[kept].any()
    assert not moved[~kept].any()


def test_a_support_travels_down_and_values_alone_travel_up(problem):
  # The first round is dense.
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
  cohorts = problem.cohorts(2)
  cohorts = [x._replace(weights=np.ones(3, np.float32)) for x in cohorts]
  got, _ = run(problem, cohorts, 1.0, 0)[-1]
  dense = fed_avg.fed_avg(
    problem.loss_fn, SGD, ADAMW, placement=placements.ALONE
  )
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_warm_up_of_less_than_nothing_is_refused(problem):
  with pytest.raises(ValueError, match="to be 0 or more"):
    compose(problem.loss_fn, 0.5, -1)


@functools.cache
def compose_ranks(loss_fn, ranks, client=SGD, server=ADAMW):
  algorithm = federated_select.federated_select_ranks(
    loss_fn, client, server, ranks=ranks, placement=placements.ALONE
  )
  return algorithm, jax.jit(algorithm.round)


def run_ranks(problem, cohorts, *knobs):
  """States before and after each round, and the metrics of each."""
  algorithm, step = compose_ranks(problem.loss_fn, *knobs)
  states, history = [algorithm.init(problem.trainable)], []
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
    history.append(jax.device_get(metrics))
  return states, history


def largest_ranks(flat, count):
  """Which entries are in the ranks of the largest joint norms, or the head."""
  a, b, head = np.split(flat, [12, 20])
  a, b = a.reshape(6, 2), b.reshape(2, 4)
  norms = [sum(a[:, i] ** 2) + sum(b[i] ** 2) for i in range(2)]
  kept = np.isin(np.arange(2), np.argsort(norms)[2 - count :])
  in_a, in_b = np.tile(kept, 6), np.repeat(kept, 4)
  return np.concatenate([in_a, in_b, np.ones(4, bool)])


def test_selected_ranks_are_their_oracle_in_float64(problem, oracle):
  # Some clients have one rank and some have two.
  cohorts = problem.cohorts(4)
  expected = oracle.flatten(problem.trainable)
  server = oracle.adamw(0.1)
  with jax.enable_x64(True):
    states, _ = run_ranks(problem, cohorts, (1, 2))
  for cohort, state in zip(cohorts, states[1:], strict=True):
    update = np.zeros_like(expected)
    for client, indices, mask, _ in zip(*cohort, strict=True):
      kept = largest_ranks(expected, 1 + client % 2)
      start = np.where(kept, expected, 0)
      trained = local_sgd_within(problem, oracle, start, kept, indices, mask)
      update += start - trained
    expected = server(expected, update / len(cohort.clients))
    got = oracle.flatten(state.trainable)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_columns_and_rows_of_a_rank_are_chosen_together(problem):
  # Where both factors for themselves would choose otherwise.
  a = np.ones((6, 2)) * [1.0, 1.1]
  b = np.ones((2, 4)) * [[2.0], [0.1]]
  mine = problem._replace(trainable={**problem.trainable, "a": a, "b": b})
  algorithm, _ = compose_ranks(problem.loss_fn, (1,))
  state = algorithm.init(mine.trainable)
  got = jax.jit(algorithm.received)(state, KEY)
  np.testing.assert_array_equal(got["a"], np.float32(a * [1, 0]))
  np.testing.assert_array_equal(got["b"], np.float32(b * [[1], [0]]))
  np.testing.assert_array_equal(got["head"], state.trainable["head"])


def test_lora_learns_from_the_first_round_with_the_ranks_it_has(problem):
  # Selecting ranks is not stuck: `b` is received, at zero.
  states, _ = run_ranks(problem, problem.cohorts(1), (1,), SGD, REPLACE)
  moved = [np.asarray(x.trainable["b"]).any(axis=1) for x in states]
  assert [rows.tolist().count(True) for rows in moved] == [0, 1]
  kept = largest_ranks(flat(problem.trainable), 1)
  assert not (flat(states[1].trainable) != flat(states[0].trainable))[
    ~kept
  ].any()


def test_every_layer_has_its_own_ranks():
  rng = np.random.default_rng(3)
  a, b = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 4, 2))
  tree = {"layers": {"q": {"a": a, "b": b}}, "score": np.ones(2)}

  def loss_fn(trainable, frozen, examples, mask, key):
    return 0.0 * trainable["score"].sum(), mask.sum()

  algorithm = federated_select.federated_select_ranks(
    loss_fn, SGD, REPLACE, ranks=(1, 2)
  )
  got = jax.jit(algorithm.received)(algorithm.init(tree), KEY)
  for layer in range(3):
    norms = (a[layer] ** 2).sum(axis=0) + (b[layer] ** 2).sum(axis=1)
    kept = np.isin(np.arange(4), np.argsort(norms)[-2:])
    pair = got["layers"]["q"]
    np.testing.assert_array_equal(pair["a"][layer], np.float32(a[layer] * kept))
    expected = np.float32(b[layer] * kept[:, None])
    np.testing.assert_array_equal(pair["b"][layer], expected)


def test_tiers_pay_for_the_ranks_they_have(problem):
  # 4 entries of a head and 10 of each rank; one byte names the rank.
  cohort = problem.cohort(2, 5, 4)
  _, (metrics,) = run_ranks(problem, [cohort], (1, 2))
  entries = [14, 24, 14]
  assert metrics["download_entries"].tolist() == entries
  assert metrics["upload_entries"].tolist() == entries
  up = [len(wire.dumps(base.Dense(np.zeros(k, np.float32)))) for k in entries]
  assert metrics["upload_bytes"].tolist() == up
  down = metrics["download_bytes"]
  assert all(0 < x - 4 * k < 16 for x, k in zip(down, entries, strict=True))


def test_all_ranks_are_dense_fed_avg(problem):
  # Equal up to rounding, because the program has masks.
  cohorts = problem.cohorts(2)
  cohorts = [x._replace(weights=np.ones(3, np.float32)) for x in cohorts]
  states, _ = run_ranks(problem, cohorts, (2,))
  dense, _ = run(problem, cohorts, 1.0, 0)[-1]
  np.testing.assert_allclose(
    flat(states[-1].trainable), flat(dense.trainable), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  ("ranks", "problem_is"),
  [
    ((0,), "from 1 to all groups"),
    ((3,), "from 1 to all groups"),
    ((), "at least one channel"),
  ],
)
def test_ranks_that_the_pairs_do_not_have_are_refused(
  problem, ranks, problem_is
):
  algorithm = federated_select.federated_select_ranks(
    problem.loss_fn, SGD, ADAMW, ranks=ranks
  )
  with pytest.raises(ValueError, match=problem_is):
    algorithm.init(problem.trainable)
