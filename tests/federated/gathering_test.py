import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.federated import channels, clients, gathering
from tests import placements

KEY = jax.random.key(2)
SGD = optax.sgd(0.05, momentum=0.9)


def answer(shared, train, client, memory, key):
  """Sends the update as it is; a client remembers one visit more."""
  del client, key
  trainable, frozen = shared
  start, _ = ravel_pytree(trainable)
  training = train(start, frozen)
  trained, _ = ravel_pytree(training.trainable)
  size = jnp.int32(start.size)
  message = channels.Message(start - trained, memory + 1, 4 * size, size)
  return start, training, message


@functools.cache
def compiled(loss_fn):
  local_update = clients.local_update(loss_fn, SGD)
  return jax.jit(
    gathering.gather(local_update, answer, placement=placements.ALONE)
  )


def gather(problem, cohort, examples):
  start = problem.trainable
  memory = jnp.zeros(len(cohort.clients))
  shared = (start, problem.frozen)
  return compiled(problem.loss_fn)(
    start, jnp.int32(0), shared, memory, examples, cohort, KEY
  )


def flat(trees, oracle, i):
  return oracle.flatten(jax.tree.map(lambda x: np.asarray(x[i]), trees))


def test_each_client_is_gathered_as_it_trained(problem, oracle):
  cohort = problem.cohort(2, 0, 5)
  start = oracle.flatten(problem.trainable)
  with jax.enable_x64(True):
    answers = jax.device_get(gather(problem, cohort, problem.examples))
  for i in range(3):
    expected = oracle.local_sgd(
      problem, start, cohort.indices[i], cohort.mask[i], 0.05, 0.9
    )
    got = flat(answers.trained, oracle, i)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
  assert answers.weights.tolist() == [8, 1, 7]
  assert answers.memory.tolist() == [1, 1, 1]
  assert answers.metrics["tokens"] == 8 + 1 + 7


def test_who_is_left_out_has_zeros_and_the_memory_it_had(problem, oracle):
  # One diverges, one is of weight zero.
  cohort = problem.cohort(2, 0, 5)
  cohort = cohort._replace(weights=np.array([8, 1, 0], np.float32))
  broken = jax.tree.map(np.copy, problem.examples)
  broken["y"][cohort.indices[1][cohort.mask[1]]] = np.nan
  answers = gather(problem, cohort, broken)
  assert answers.weights.tolist() == [8, 0, 0]
  assert answers.memory.tolist() == [1, 0, 0]
  assert answers.metrics["finite"].tolist() == [True, False, True]
  assert flat(answers.trained, oracle, 0).any()
  for i in (1, 2):
    assert not flat(answers.trained, oracle, i).any()


def test_weights_are_normalised_unless_all_are_zero():
  got = gathering.normalised(jnp.array([1.0, 0.0, 3.0]))
  assert got.tolist() == [0.25, 0, 0.75]
  assert gathering.normalised(jnp.zeros(2)).tolist() == [0, 0]
  trees = {"x": jnp.array([[1.0, 2.0], [9.0, 9.0], [5.0, 6.0]])}
  assert gathering.mean(trees, got)["x"].tolist() == [4, 5]
