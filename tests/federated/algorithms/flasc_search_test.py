import jax
import numpy as np
import optax
import pytest

from fedjax_llm.federated.algorithms import flasc, flasc_search
from tests import placements

KEY = jax.random.key(6)


def trace(utility, nbytes=lambda rank, density: round(1000 * rank * density)):
  """Measures by formulas, and remembers what it was asked."""
  asked = []

  def measure(rank, density):
    asked.append((rank, density))
    return utility(rank, density), nbytes(rank, density)

  return measure, asked


def test_the_search_follows_what_helps():
  # Rank helps as far as 16, density does not.
  measure, asked = trace(lambda rank, density: min(rank, 16) + density / 100)
  found = flasc_search.flasc_search(
    measure, rank=1, density=1 / 64, max_rank=64
  )
  assert asked == [
    (1, 1 / 64),
    *((4, 1 / 64), (1, 1 / 16)),
    *((16, 1 / 64), (4, 1 / 16)),
    # Neither helps much from here, density a little.
    *((64, 1 / 64), (16, 1 / 16)),
    *((64, 1 / 16), (16, 1 / 4)),
    *((64, 1 / 4), (16, 1.0)),
    (64, 1.0),
  ]
  assert found.best[:2] == (16, 1.0)
  assert [trial[:2] for trial in found.trials] == asked


# Rank gains a little more than density, for twice the bytes more.
RUNS = {
  (1, 0.25): (-1.0, 10),
  (4, 0.25): (-0.67, 70),
  (1, 1.0): (-0.7, 40),
  (4, 1.0): (-0.5, 90),
  (16, 1.0): (-0.6, 400),
}


def test_what_costs_more_must_gain_more_than_in_proportion():
  found = flasc_search.flasc_search(
    lambda *knobs: RUNS[knobs], rank=1, density=0.25, max_rank=16
  )
  # From (4, 0.25) it would go on to (16, 0.25).
  assert [trial[:2] for trial in found.trials] == list(RUNS)
  assert found.best == (4, 1.0, -0.5, 90)


def test_what_is_over_the_budget_is_tried_but_not_kept():
  found = flasc_search.flasc_search(
    lambda *knobs: RUNS[knobs],
    rank=1,
    density=0.25,
    max_rank=4,
    most_bytes=50,
  )
  assert [trial[:2] for trial in found.trials] == list(RUNS)[:4]
  assert found.best == (1, 1.0, -0.7, 40)


def test_a_search_where_nothing_gains_goes_where_least_is_lost():
  measure, asked = trace(lambda rank, density: -rank - 10 * density)
  found = flasc_search.flasc_search(measure, rank=1, density=1 / 4, max_rank=16)
  assert asked[1:] == [(4, 0.25), (1, 1.0), (16, 0.25), (4, 1.0), (16, 1.0)]
  assert found.best == found.trials[0]


def test_of_equal_utility_the_cheaper_is_the_best():
  measure, _ = trace(lambda rank, density: 1.0)
  found = flasc_search.flasc_search(
    measure, rank=1, density=1 / 16, max_rank=16
  )
  assert found.best[:2] == (1, 1 / 16)


def test_a_search_measures_real_runs(problem):
  everyone = np.ones(len(problem.examples["y"]), bool)

  def measure(rank, density):
    rng = np.random.default_rng(rank)
    trainable = {
      "a": rng.uniform(-0.4, 0.4, (6, rank)),
      "b": np.zeros((rank, 4)),
      "head": problem.trainable["head"],
    }
    algorithm = flasc.flasc(
      problem.loss_fn,
      optax.sgd(0.05, momentum=0.9),
      flasc.server_adamw(0.05),
      download_density=density,
      upload_density=density,
      placement=placements.ALONE,
    )
    step = jax.jit(algorithm.round)
    state, nbytes = algorithm.init(trainable), 0
    for cohort in problem.cohorts(3):
      arguments = (problem.frozen, problem.examples, cohort, KEY)
      state, metrics = step(state, *arguments)
      nbytes += int(metrics["download_bytes"].sum())
      nbytes += int(metrics["upload_bytes"].sum())
    arguments = (problem.frozen, problem.examples, everyone, KEY)
    return -float(problem.loss_fn(state.trainable, *arguments)[0]), nbytes

  found = flasc_search.flasc_search(
    measure, rank=1, density=0.5, max_rank=2, factor=2
  )
  tried = [trial[:2] for trial in found.trials]
  assert tried == [(1, 0.5), (2, 0.5), (1, 1.0), (2, 1.0)]
  small, *_, large = found.trials
  assert small.nbytes < large.nbytes
  assert found.best.utility == max(trial.utility for trial in found.trials)


@pytest.mark.parametrize(
  "wrong", [{"rank": 0}, {"rank": 9}, {"density": 0.0}, {"factor": 1}]
)
def test_what_is_out_of_range_is_refused(wrong):
  measure, asked = trace(lambda rank, density: 0.0)
  knobs = {"rank": 1, "density": 0.5, "max_rank": 8} | wrong
  with pytest.raises(ValueError, match="search expected"):
    flasc_search.flasc_search(measure, **knobs)
  assert not asked


def test_a_start_that_is_too_dear_is_refused():
  measure, _ = trace(lambda rank, density: 0.0)
  with pytest.raises(ValueError, match="smaller rank or density"):
    flasc_search.flasc_search(
      measure, rank=4, density=0.5, max_rank=8, most_bytes=1999
    )
