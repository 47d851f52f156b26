import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_sa_lora
from tests import placements

KEY = jax.random.key(3)
SGD = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)
SHARED = 12  # Entries of `a`, the first of the oracle's flat vector.


@functools.cache
def compose(loss_fn, server, **parts):
  algorithm = fed_sa_lora.fed_sa_lora(
    loss_fn, SGD, server, population=7, placement=placements.ALONE, **parts
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, server=REPLACE, examples=None, **parts):
  """The states before and after each round, and the last metrics."""
  algorithm, step = compose(problem.loss_fn, server, **parts)
  states, metrics = [algorithm.init(problem.trainable)], None
  examples = problem.examples if examples is None else examples
  for cohort in cohorts:
    state, metrics = step(states[-1], problem.frozen, examples, cohort, KEY)
    states.append(state)
  return states, metrics


def test_fed_sa_lora_is_its_oracle_in_float64(problem, oracle):
  # Six rounds, so that clients come back to the factors they kept.
  cohorts = problem.cohorts(6)
  start = oracle.flatten(problem.trainable)
  shared = start[:SHARED]
  own = {client: start[SHARED:] for client in range(7)}
  taken_part = set()
  with jax.enable_x64(True):
    states, _ = run(problem, cohorts)
    algorithm, _ = compose(problem.loss_fn, REPLACE)
    for cohort, state in zip(cohorts, states[1:], strict=True):
      update = 0.0
      for client, indices, mask, weight in zip(*cohort, strict=True):
        flat = np.concatenate([shared, own[client]])
        after = oracle.local_sgd(problem, flat, indices, mask, 0.05, 0.9)
        update += np.float64(weight) * (shared - after[:SHARED])
        own[client] = after[SHARED:]
        taken_part.add(int(client))
      shared = shared - update / cohort.weights.sum()
      close = functools.partial(
        np.testing.assert_allclose, rtol=1e-12, atol=1e-14
      )
      for client in range(7):
        mine = oracle.flatten(fed_sa_lora.personal(state, client))
        close(mine, np.concatenate([shared, own[client]]))
      mean = np.mean([own[client] for client in taken_part], axis=0)
      received = oracle.flatten(algorithm.received(state, KEY))
      close(received, np.concatenate([shared, mean]))
      np.testing.assert_array_equal(oracle.flatten(state.trainable), received)
  visits = np.bincount(np.concatenate([x.clients for x in cohorts]))
  assert visits.max() > 1  # Somebody did come back.


def test_before_anyone_took_part_all_have_the_initial_parameters(problem):
  (state,), _ = run(problem, [])
  initial = jax.tree.map(np.float32, problem.trainable)
  jax.tree.map(np.testing.assert_array_equal, state.trainable, initial)
  mine = fed_sa_lora.personal(state, 4)
  jax.tree.map(np.testing.assert_array_equal, mine, initial)


def test_only_a_travels(problem):
  _, metrics = run(problem, problem.cohorts(1))
  size = len(wire.dumps(base.Dense(np.zeros(SHARED, np.float32))))
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [size] * 3
  # And it may be compressed, with a memory of each client.
  upload = compression.error_feedback(compression.top_k(0.25))
  channel = channels.Channel(compression.top_k(0.5), upload)
  states, metrics = run(problem, problem.cohorts(2), channel=channel)
  assert metrics["download_entries"].tolist() == [6] * 3
  assert metrics["upload_entries"].tolist() == [3] * 3
  algorithm, _ = compose(problem.loss_fn, REPLACE, channel=channel)
  received = algorithm.received(states[-1], KEY)
  assert np.count_nonzero(received["a"]) == 6
  np.testing.assert_array_equal(received["b"], states[-1].trainable["b"])


def test_those_who_are_not_there_keep_what_they_have(problem):
  cohort = problem.cohort(2, 5, 3)
  diverges = jax.tree.map(np.copy, problem.examples)
  diverges["x"][cohort.indices[1][cohort.mask[1]]] = np.nan
  absent = cohort._replace(weights=cohort.weights * np.float32([1, 0, 1]))
  for cohorts, examples in (([cohort], diverges), ([absent], None)):
    states, _ = run(problem, cohorts, examples=examples)
    before, after = (jax.device_get(state) for state in states)
    moved = (after.own["b"] != before.own["b"]).any(axis=(1, 2))
    assert np.flatnonzero(moved).tolist() == [2, 3]
    assert np.flatnonzero(after.has_trained).tolist() == [2, 3]


def test_a_round_of_nobody_changes_its_number_alone(problem):
  cohort = problem.cohort(2, 5)
  nobody = cohort._replace(weights=np.zeros(2, np.float32))
  states, _ = run(problem, [cohort, nobody], optax.adam(0.1))
  before, after = states[1:]
  assert (before.round, after.round) == (1, 2)
  same = after._replace(inner=after.inner._replace(round=before.round))
  jax.tree.map(np.testing.assert_array_equal, same, before)


def test_what_is_shared_can_be_chosen(problem):
  # `b` shared and `a` personal: the mirror image.
  states, metrics = run(
    problem, problem.cohorts(1), is_shared=lambda path: path == "b"
  )
  assert metrics["upload_entries"].tolist() == [8] * 3
  assert states[-1].own["a"].shape == (7, 6, 2)


def test_nothing_to_share_and_frozen_entries_are_refused(problem):
  make = functools.partial(
    fed_sa_lora.fed_sa_lora, problem.loss_fn, SGD, SGD, population=7
  )
  with pytest.raises(ValueError, match="nothing to share among a, b, head"):
    make(is_shared=lambda path: path == "c").init(problem.trainable)
  channel = channels.Channel(trains=lambda payload: payload.values > 0)
  with pytest.raises(ValueError, match="trains all parameters"):
    make(channel=channel)
