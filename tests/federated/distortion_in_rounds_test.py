"""The cosines of rounds: of whom, and that they change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(1)
UPLOAD = channels.Channel(upload=compression.stochastic_uniform(2))


def play(problem, keep_metrics, **parts):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn,
    optax.sgd(0.05, momentum=0.9),
    optax.sgd(1.0),
    channel=UPLOAD,
    **parts,
  )
  step = jax.jit(
    lambda *arguments: algorithm.round(*arguments)[: 1 + keep_metrics]
  )
  state, metrics = algorithm.init(problem.trainable), []
  for cohort in problem.cohorts(4):
    state, *line = step(state, problem.frozen, problem.examples, cohort, KEY)
    metrics += line
  return jax.device_get((state, metrics))


def test_the_cosines_change_no_bit_of_the_parameters(problem):
  # Without metrics the compiler leaves out what only they need.
  with_them, _ = play(problem, True, placement=placements.ALONE)
  without, _ = play(problem, False, placement=placements.ALONE)
  jax.tree.map(np.testing.assert_array_equal, with_them, without)


def test_the_placement_of_clients_changes_only_rounding(problem):
  _, expected = play(problem, True, placement=placements.ALONE)
  for where in ((1, placements.EVERYBODY), (2, 2)):
    parts = {"placement": placements.on(*where)}
    _, metrics = play(problem, True, **parts)
    for got, line in zip(metrics, expected, strict=True):
      for name in ("update_cosine", "innovation_cosine"):
        assert 0 < line[name] < 1
        assert got[name] == pytest.approx(line[name], abs=1e-4)


def test_a_client_that_is_left_out_is_in_no_cosine(problem):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn, optax.sgd(0.05), optax.sgd(1.0), placement=placements.ALONE
  )
  step = jax.jit(algorithm.round)
  cohort = problem.cohort(3, 4)
  examples = jax.tree.map(np.copy, problem.examples)
  examples["x"][cohort.indices[1][cohort.mask[1]]] = np.nan
  state = algorithm.init(problem.trainable)
  _, metrics = step(state, problem.frozen, examples, cohort, KEY)
  assert metrics["update_cosine"] == pytest.approx(1)
  assert metrics["innovation_cosine"] == 0  # Of one client.


def test_a_codec_that_loses_what_is_a_client_s_own_is_seen(problem):
  def of_one_for_all(vector, key):
    del key
    return base.Dense(jnp.ones_like(vector))

  constant = base.stateless(of_one_for_all, lambda payload: payload.values)
  for codec, is_seen in ((constant, True), (compression.sign(), False)):
    algorithm = fed_avg.fed_avg(
      problem.loss_fn,
      optax.sgd(0.05),
      optax.sgd(1.0),
      channel=channels.Channel(upload=codec),
      placement=placements.ALONE,
    )
    _, metrics = jax.jit(algorithm.round)(
      algorithm.init(problem.trainable),
      problem.frozen,
      problem.examples,
      problem.cohort(2, 3, 5),
      KEY,
    )
    assert (metrics["innovation_cosine"] < 0.05) == is_seen
