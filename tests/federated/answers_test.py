import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import answers, clients, draws
from tests import placements

KEY = jax.random.key(2)
SGD = optax.sgd(0.05, momentum=0.9)


def answer(shared, client):
  """Sends the update as it is; a client remembers one visit more."""
  trainable, frozen = shared
  start, unravel = ravel_pytree(trainable)
  training = client.train(trainable, frozen)
  update = start - ravel_pytree(training.trainable)[0]
  message = answers.message(update, client.memory + 1, base.Dense(update))
  own = unravel(start - update)
  return answers.Answer(training, update, message, update, own)


def share(received, weight, shared):
  del shared
  return weight * received, jnp.int32(weight > 0)


@functools.cache
def compiled(loss_fn, method=answer, **options):
  local_update = clients.local_update(loss_fn, SGD)
  placement = clients.Placement(placements.ALONE.mesh, 1, **options)
  return jax.jit(
    answers.at_clients(local_update, method, share, placement=placement)
  )


def ask(problem, cohort, examples=None, **options):
  return compiled(problem.loss_fn, **options)(
    jnp.int32(0),
    (problem.trainable, problem.frozen),
    jnp.zeros(problem.population),
    problem.examples if examples is None else examples,
    cohort,
    KEY,
  )


def flat(trees, oracle, i):
  return oracle.flatten(jax.tree.map(lambda x: np.asarray(x[i]), trees))


def test_each_client_answers_as_it_trained(problem, oracle):
  cohort = problem.cohort(2, 0, 5)
  start = oracle.flatten(problem.trainable)
  with jax.enable_x64(True):
    got = jax.device_get(ask(problem, cohort))
  total = np.zeros_like(start)
  for i in range(3):
    expected = oracle.local_sgd(
      problem, start, cohort.indices[i], cohort.mask[i], 0.05, 0.9
    )
    one = flat(got.own, oracle, i)
    np.testing.assert_allclose(one, expected, rtol=1e-12, atol=1e-14)
    total += cohort.weights[i] * (start - expected)
  np.testing.assert_allclose(got.total[0], total, rtol=1e-12, atol=1e-13)
  assert got.total[1] == 3
  assert got.weights.tolist() == [8, 1, 7]
  assert got.memory.tolist() == [1, 0, 1, 0, 0, 1, 0]
  assert got.metrics["tokens"] == 8 + 1 + 7
  assert got.metrics["update_cosine"] == pytest.approx(1)


def test_who_is_left_out_adds_nothing_and_keeps_its_memory(problem, oracle):
  # One diverges, one is of weight zero.
  cohort = problem.cohort(2, 0, 5)
  cohort = cohort._replace(weights=np.array([8, 1, 0], np.float32))
  broken = jax.tree.map(np.copy, problem.examples)
  broken["y"][cohort.indices[1][cohort.mask[1]]] = np.nan
  got = ask(problem, cohort, broken)
  assert got.weights.tolist() == [8, 0, 0]
  assert got.total[1] == 1
  assert got.memory.tolist() == [0, 0, 1, 0, 0, 0, 0]
  assert got.metrics["finite"].tolist() == [True, False, True]
  assert flat(got.own, oracle, 0).any()
  for i in (1, 2):
    assert not flat(got.own, oracle, i).any()


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, -1.0])
def test_a_weight_that_counts_no_examples_leaves_its_client_out(
  problem, weight
):
  cohort = problem.cohort(2, 0)
  weights = np.array([8, weight], np.float32)
  got = ask(problem, cohort._replace(weights=weights))
  alone = ask(problem, cohort._replace(weights=np.float32([8, 0])))
  assert got.metrics["finite"].tolist() == [True, True]
  jax.tree.map(np.testing.assert_array_equal, got, alone)


def test_such_a_weight_is_refused_where_it_is_seen(problem):
  cohort = problem.cohort(2, 0)
  weights = np.array([8, np.nan], np.float32)
  fn = answers.at_clients(clients.local_update(problem.loss_fn, SGD), answer)
  with pytest.raises(ValueError, match="finite weights of at least 0, got"):
    fn(0, (), (), (), cohort._replace(weights=weights), KEY)


def test_a_memory_that_overflows_is_not_kept(problem):
  # The update is finite, and so is what arrives.
  def method(shared, client):
    sent = answer(shared, client)
    memory = client.memory + jnp.where(client.number == 0, jnp.inf, 1)
    return sent._replace(message=sent.message._replace(memory=memory))

  got = ask(problem, problem.cohort(2, 0, 5), method=method)
  assert got.metrics["finite"].tolist() == [True, False, True]
  assert got.memory.tolist() == [0, 0, 1, 0, 0, 1, 0]
  assert got.weights.tolist() == [8, 0, 7]


def test_a_client_knows_its_number_its_steps_and_its_keys(problem):
  def method(shared, client):
    own = (client.number, client.steps, client.key(draws.Purpose.UPLOAD))
    own = jax.tree.map(
      lambda x: jax.random.key_data(x) if x is own[2] else x, own
    )
    return answer(shared, client)._replace(own=own)

  got = ask(problem, problem.cohort(2, 0, 5), method=method)
  numbers, steps, keys = got.own
  assert numbers.tolist() == [2, 0, 5]
  assert steps.tolist() == [4, 1, 4]  # In batches of two.
  expected = [
    jax.random.key_data(draws.stream(KEY, draws.Purpose.UPLOAD, 0, client))
    for client in (2, 0, 5)
  ]
  np.testing.assert_array_equal(keys, expected)


def test_the_cosines_are_a_choice_that_changes_nothing_else(problem):
  cohort = problem.cohort(2, 0, 5)
  measured, plain = ask(problem, cohort), ask(problem, cohort, cosines=False)
  names = {"update_cosine", "innovation_cosine"}
  assert measured.metrics.keys() - plain.metrics.keys() == names
  kept = {x: measured.metrics[x] for x in plain.metrics}
  measured = measured._replace(metrics=kept)
  jax.tree.map(np.testing.assert_array_equal, measured, plain)


def test_what_is_taken_is_put_back_where_it_was():
  states = {"x": jnp.arange(8.0).reshape(4, 2), "y": jnp.arange(4)}
  numbers = jnp.array([3, 1])
  rows = answers.take(states, numbers)
  assert rows["x"].tolist() == [[6, 7], [2, 3]]
  changed = answers.put(states, numbers, jax.tree.map(lambda x: -x, rows))
  assert changed["x"].tolist() == [[0, 1], [-2, -3], [4, 5], [-6, -7]]
  assert changed["y"].tolist() == [0, -1, 2, -3]
