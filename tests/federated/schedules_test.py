from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.compression import sparse
from fedjax_llm.federated import channels, rounds, schedules
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(8)


class State(NamedTuple):
  """What the toy algorithms keep."""

  round: Any
  trainable: Any


def adds(number):
  """A toy algorithm: a round adds a number, and a client receives its own."""
  return rounds.FederatedAlgorithm(
    init=lambda trainable: State(jnp.int32(0), jnp.asarray(trainable)),
    round=lambda state, *rest: (
      State(state.round + 1, state.trainable + number),
      {"upload_bytes": jnp.int32(number)},
    ),
    received=lambda state, key: state.trainable * 0 + number,
  )


def play(algorithm, count):
  """What was added in each round, what would be received before it, metrics."""
  step, receive = jax.jit(algorithm.round), jax.jit(algorithm.received)
  states, received, nbytes = [algorithm.init(0.0)], [], []
  for _ in range(count):
    received.append(int(receive(states[-1], KEY)))
    state, metrics = step(states[-1])
    states.append(state)
    nbytes.append(int(metrics["upload_bytes"]))
  assert step._cache_size() == 1
  added = np.diff([int(state.trainable) for state in states]).tolist()
  assert [int(state.round) for state in states] == list(range(count + 1))
  return added, received, nbytes


def test_each_stage_lasts_until_the_next():
  stages = {3: adds(10), 0: adds(1), 4: adds(100)}
  expected = [1, 1, 1, 10, 100, 100]
  assert play(schedules.staged(stages), 6) == (expected,) * 3


def test_algorithms_alternate_from_the_first():
  algorithm = schedules.alternating(adds(1), adds(10), adds(100))
  assert play(algorithm, 5) == ([1, 10, 100, 1, 10],) * 3


def test_any_rule_of_the_round_chooses():
  algorithm = schedules.by_round(
    adds(1), adds(10), choose=lambda number: jnp.int32(number % 3 == 2)
  )
  assert play(algorithm, 6) == ([1, 1, 10, 1, 1, 10],) * 3


def test_one_algorithm_is_itself():
  alone = adds(1)
  assert schedules.staged({0: alone}) is alone
  assert schedules.alternating(alone) is alone


def test_a_residual_is_that_of_the_first():
  residual = lambda state: state.trainable
  first = adds(1)._replace(residual=residual)
  assert schedules.alternating(first, adds(2)).residual is residual


@pytest.mark.parametrize(
  "kind", ["noise_multiplier", "example_noise_multiplier"]
)
def test_the_noise_is_the_least_of_all_and_none_if_one_has_none(kind):
  with_noise = lambda *each: [adds(1)._replace(**{kind: x}) for x in each]
  noise = lambda *each: getattr(schedules.alternating(*with_noise(*each)), kind)
  assert noise(2.0, 0.5) == 0.5
  assert noise(0.0, 0.5) == 0
  assert noise(2.0, None) is None


def test_algorithms_of_one_placement_take_turns_at_it():
  here, there = placements.on(1, 1), placements.on(2, 1)
  at = lambda placement: adds(1)._replace(placement=placement)
  assert schedules.alternating(at(there), at(there)).placement == there
  with pytest.raises(ValueError, match="need one placement"):
    schedules.alternating(at(here), at(there))


@pytest.mark.parametrize("starts", [(), (1,), (-1, 0)])
def test_stages_begin_with_round_zero(starts):
  with pytest.raises(ValueError, match="begins with round 0"):
    schedules.staged({start: adds(1) for start in starts})


def test_no_algorithm_takes_no_turn():
  with pytest.raises(ValueError, match="one or more algorithms"):
    schedules.alternating()


@pytest.mark.parametrize(
  "other",
  [
    lambda trainable: State(jnp.int32(0), jnp.zeros(2)),
    lambda trainable: State(jnp.int32(0), jnp.int32(0)),
    lambda trainable: State(jnp.int32(0), (jnp.float32(0),)),
  ],
)
def test_states_of_other_shapes_types_or_structures_are_refused(other):
  algorithm = schedules.alternating(adds(1), adds(2)._replace(init=other))
  with pytest.raises(ValueError, match="need states of one structure"):
    algorithm.init(0.0)


def test_stages_of_one_algorithm_are_that_algorithm(problem):
  # To rounding: what is fused in a branch may be fused otherwise alone.
  make = lambda: fed_avg.fed_avg(
    problem.loss_fn,
    optax.sgd(0.05, momentum=0.9),
    optax.adam(0.05),
    channel=channels.Channel(upload=sparse.top_k(0.5)),
    placement=placements.ALONE,
  )
  states = []
  for algorithm in (make(), schedules.staged({0: make(), 2: make()})):
    step, state = jax.jit(algorithm.round), algorithm.init(problem.trainable)
    for cohort in problem.cohorts(3):
      arguments = (problem.frozen, problem.examples, cohort, KEY)
      state, _ = step(state, *arguments)
    states.append(state)
  jax.tree.map(
    lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6),
    *states,
  )
