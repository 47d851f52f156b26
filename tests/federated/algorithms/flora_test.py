import functools
import math

import jax
import numpy as np
import optax

from fedjax_llm.federated.algorithms import flora
from tests import placements

KEY = jax.random.key(3)
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)
RANKS = (1, 2)


@functools.cache
def compose(loss_fn, scale):
  algorithm = flora.flora(
    loss_fn,
    SGD,
    scale=scale,
    ranks=RANKS,
    population=7,
    placement=placements.ALONE,
  )
  return algorithm, jax.jit(algorithm.round)


def play(problem, cohorts):
  algorithm, step = compose(problem.scaled_loss_fn, problem.scale)
  states = [jax.device_get(algorithm.init(problem.trainable))]
  frozen = {"kernel": problem.frozen["w"]}
  for cohort in cohorts:
    state, _ = step(states[-1], frozen, problem.examples, cohort, KEY)
    states.append(jax.device_get(state))
  return states


def test_flora_is_its_oracle_in_float64(problem, oracle):
  # Clients have ranks 1 and 2 and are weighted by their examples. The oracle
  # takes only the random factors from the algorithm.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    states = play(problem, cohorts)
  head, delta = problem.trainable["head"], np.zeros((6, 4))
  for cohort, before, after in zip(cohorts, states, states[1:], strict=False):
    base = problem._replace(frozen={"w": problem.frozen["w"] + delta})
    heads, product = np.zeros(4), np.zeros((6, 4))
    for client, indices, mask, weight in zip(*cohort, strict=True):
      rank = RANKS[client % 2]
      share = weight / cohort.weights.sum(dtype=np.float64)
      a, b = np.copy(before.trainable["a"]), np.zeros((2, 4))
      a[:, rank:] = 0
      start = np.concatenate([a.ravel(), b.ravel(), head])
      trained = oracle.local_sgd(
        base, start, indices, mask, RATE, 0.9, problem.scale
      )
      a, b, own = np.split(trained, [12, 20])
      heads += share * own
      for i in range(rank):
        column, row = a.reshape(6, 2)[:, i], b.reshape(2, 4)[i]
        product += share * np.outer(column, row)
    head, delta = heads, delta + problem.scale * product
    got = after.trainable["head"]
    assert got.dtype == np.float64
    # Entries may be the small difference of numbers near 1.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
    near(got, head)
    near(after.residual["delta"], delta)
  assert np.abs(delta).max() > 1e-3


def test_factors_are_drawn_anew_every_round_as_at_the_start(problem):
  cohorts = problem.cohorts(3)
  states, again = play(problem, cohorts), play(problem, cohorts)
  drawn = [x.trainable["a"] for x in states[1:]]
  assert all((x != y).all() for x, y in zip(drawn, drawn[1:], strict=False))
  assert max(np.abs(x).max() for x in drawn) <= 1 / math.sqrt(6)
  assert not any(x.trainable["b"].any() for x in states)
  jax.tree.map(np.testing.assert_array_equal, states, again)


def test_what_the_next_clients_receive_is_what_the_server_has(problem):
  # Those of the last tier, of full rank.
  algorithm, _ = compose(problem.scaled_loss_fn, problem.scale)
  state = play(problem, problem.cohorts(1))[-1]
  jax.tree.map(
    np.testing.assert_array_equal,
    algorithm.received(state, KEY),
    state.trainable,
  )
