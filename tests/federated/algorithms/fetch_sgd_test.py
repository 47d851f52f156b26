import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.compression import base, sketch, sparse, wire
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import fed_avg, fetch_sgd
from tests import placements

KEY = jax.random.key(7)
SGD = optax.sgd(0.05, momentum=0.9)
ROWS, COLUMNS, SEED = 3, 8, 11
N = 6 * 2 + 2 * 4 + 4


@functools.cache
def compose(loss_fn, **knobs):
  knobs = dict(rows=ROWS, columns=COLUMNS, density=0.25, seed=SEED) | knobs
  algorithm = fetch_sgd.fetch_sgd(
    loss_fn, SGD, population=7, placement=placements.ALONE, **knobs
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, **knobs):
  """The states before and after each round, and all metrics."""
  algorithm, step = compose(problem.loss_fn, **knobs)
  states, seen = [algorithm.init(problem.trainable)], []
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
    seen.append(jax.device_get(metrics))
  return states, seen


class NumpySketch:
  """A count sketch in plain loops, with the hashes of the library."""

  def __init__(self):
    each = [sketch.hashes(SEED, row, N, COLUMNS) for row in range(ROWS)]
    self.places = [[np.asarray(x).tolist() for x in pair] for pair in each]

  def of(self, vector):
    table = np.zeros((ROWS, COLUMNS))
    for row, (columns, signs) in enumerate(self.places):
      for entry in range(N):
        table[row, columns[entry]] += signs[entry] * vector[entry]
    return table

  def read(self, table):
    result = np.zeros(N)
    for entry in range(N):
      result[entry] = np.median(
        [
          signs[entry] * table[row, columns[entry]]
          for row, (columns, signs) in enumerate(self.places)
        ]
      )
    return result


@pytest.mark.parametrize("settle", [fetch_sgd.subtract, fetch_sgd.clear])
def test_fetch_sgd_is_its_oracle_in_float64(problem, oracle, settle):
  cohorts, tables = problem.cohorts(4), NumpySketch()
  flat = oracle.flatten(problem.trainable)
  momentum = error = np.zeros((ROWS, COLUMNS))
  for cohort in cohorts:
    mean = np.zeros((ROWS, COLUMNS))
    for i in range(len(cohort.clients)):
      trained = oracle.local_sgd(
        problem, flat, cohort.indices[i], cohort.mask[i], 0.05, 0.9
      )
      mean += tables.of(flat - trained) / len(cohort.clients)
    momentum = 0.8 * momentum + mean
    error = error + 0.7 * momentum
    move = oracle.top_k(tables.read(error), 0.25)
    if settle is fetch_sgd.subtract:
      error = error - tables.of(move)
    else:
      touched = tables.of(move) != 0
      momentum, error = (np.where(touched, 0, x) for x in (momentum, error))
    flat = flat - move
  knobs = dict(learning_rate=0.7, momentum=0.8, settle=settle)
  with jax.enable_x64(True):
    states, _ = run(problem, cohorts, **knobs)
    state = jax.device_get(states[-1])
  assert state.error.dtype == np.float64
  close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
  close(oracle.flatten(state.trainable), flat)
  close(state.momentum, momentum.ravel())
  close(state.error, error.ravel())


def test_a_sketch_that_loses_nothing_makes_it_fed_avg_m(problem):
  # Of as many columns as entries, and all of them are moved.
  cohorts = problem.cohorts(3)
  states, _ = run(problem, cohorts, columns=N, density=1.0, momentum=0.6)
  dense = fed_avg.fed_avg(
    problem.loss_fn,
    SGD,
    optax.sgd(1.0, momentum=0.6),
    aggregate=aggregators.uniform_mean(),
    placement=placements.ALONE,
  )
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, states[-1].trainable, expected.trainable)
  np.testing.assert_allclose(states[-1].error, 0, atol=1e-6)


def test_what_is_subtracted_and_what_moved_are_all_that_came(problem, oracle):
  # Sketches of moves and the error sum to the sketches of all updates.
  states, _ = run(problem, problem.cohorts(5), momentum=0.0)
  start, end = (
    oracle.flatten(jax.device_get(states[i].trainable)) for i in (0, -1)
  )
  # Without momentum S_u is the mean sketch of the round.
  came = sum(np.asarray(state.momentum) for state in states[1:])
  moved = NumpySketch().of(start - end).ravel()
  np.testing.assert_allclose(
    moved + states[-1].error, came, rtol=1e-4, atol=1e-5
  )


def test_a_narrow_sketch_diverges_unless_cells_are_cleared(problem):
  # Which the authors' code tells of, in a comment.
  everyone = np.ones(len(problem.examples["y"]), bool)

  def loss(state):
    arguments = (problem.frozen, problem.examples, everyone, KEY)
    return float(problem.loss_fn(state.trainable, *arguments)[0])

  ends = {}
  for settle in (fetch_sgd.subtract, fetch_sgd.clear):
    knobs = dict(seed=0, momentum=0.5, settle=settle)
    states, _ = run(problem, problem.cohorts(15), **knobs)
    ends[settle] = loss(states[-1]) / loss(states[0])
  assert ends[fetch_sgd.subtract] > 2
  assert ends[fetch_sgd.clear] < 0.8


def test_a_client_fetches_the_moves_it_missed_or_the_parameters(problem):
  cohorts = [problem.cohort(*who) for who in ([0, 1], [0], [0], [1], [2])]
  _, seen = run(problem, cohorts)
  vector = np.arange(N, dtype=np.float32)
  move, _ = sparse.top_k(0.25).encode(jnp.asarray(vector), (), KEY)
  move = len(wire.dumps(move))
  dense = len(wire.dumps(base.Dense(vector)))
  assert 2 * move < dense < 4 * move
  fetched = [metrics["download_bytes"].tolist() for metrics in seen]
  assert fetched == [[0, 0], [move], [move], [min(3 * move, dense)], [dense]]
  entries = [metrics["download_entries"].tolist() for metrics in seen]
  k = N // 4
  assert entries[:3] == [[0, 0], [k], [k]] and entries[4] == [N]


def test_who_does_not_answer_has_not_come(problem):
  cohort = problem.cohort(2, 5)
  absent = cohort._replace(weights=np.array([1, 0], np.float32))
  states, _ = run(problem, [cohort, absent])
  assert states[-1].missed.tolist() == [2, 2, 1, 2, 2, 2, 2]


def test_the_sketch_is_what_travels(problem):
  _, (metrics,) = run(problem, problem.cohorts(1))
  table = np.ones(ROWS * COLUMNS, np.float32)
  message = wire.dumps(sketch.Sketch(table, ROWS, SEED, N))
  assert metrics["upload_bytes"].tolist() == [len(message)] * 3
  assert metrics["upload_entries"].tolist() == [table.size] * 3


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"density": 0.0}, "density=0.0"),
    ({"rows": 0}, "rows=0"),
  ],
)
def test_what_is_out_of_range_is_refused(problem, knobs, message):
  with pytest.raises(ValueError, match=message):
    compose(problem.loss_fn, **knobs)
