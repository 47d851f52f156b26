import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients

KEY = jax.random.key(3)
OPTIMIZERS = {
  "momentum": optax.sgd(0.05, momentum=0.9),
  "adam": optax.adam(0.05),  # Its state counts the steps.
}


def together(train):
  """One client through `vmap`, where a condition becomes a selection."""

  def fn(trainable, frozen, examples, indices, mask, key):
    one = lambda indices, mask, key: train(
      trainable, frozen, examples, indices, mask, key
    )
    batched = jax.vmap(one)(indices[None], mask[None], key[None])
    return jax.tree.map(lambda x: x[0], batched)

  return fn


@functools.cache
def program(loss_fn, optimizer, vmapped=False):
  train = clients.local_update(loss_fn, OPTIMIZERS[optimizer])
  return jax.jit(together(train) if vmapped else train)


def run(problem, client, optimizer="momentum", *, vmapped=False, noisy=False):
  """Trains on a cohort of one."""
  loss_fn = problem.noisy_loss_fn if noisy else problem.loss_fn
  return program(loss_fn, optimizer, vmapped)(
    problem.trainable,
    problem.frozen,
    problem.examples,
    client.indices[0],
    client.mask[0],
    KEY,
  )


def steps_of(client, chosen):
  """The same client with these of its steps; -1 is padding."""
  mask = client.mask[:, chosen] & (np.array(chosen) >= 0)[None, :, None]
  return client._replace(indices=client.indices[:, chosen], mask=mask)


def assert_same_bits(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
  ("optimizer", "vmapped"),
  [("momentum", False), ("adam", False), ("adam", True)],
)
def test_a_padded_step_changes_neither_parameters_nor_optimizer(
  problem, optimizer, vmapped
):
  # Were a moment or a count of steps to change, later steps would differ.
  client = problem.cohort(2)
  plain = steps_of(client, [0, 1, 2, 3, -1, -1, -1, -1])
  padded = steps_of(client, [0, -1, 1, -1, -1, 2, 3, -1])
  train = functools.partial(run, problem, optimizer=optimizer, vmapped=vmapped)
  assert_same_bits(train(padded), train(plain))


@pytest.mark.parametrize("vmapped", [False, True])
def test_padding_at_the_end_changes_no_bit(problem, vmapped):
  # Also when training draws random numbers.
  client = problem.cohort(3, steps=3)
  padded = problem.cohort(3, steps=6)
  train = functools.partial(run, problem, vmapped=vmapped, noisy=True)
  assert_same_bits(train(padded), train(client))


def test_what_padded_rows_hold_does_not_matter(problem):
  client = problem.cohort(0)
  indices = np.where(client.mask, client.indices, 7)
  assert (indices != client.indices).any()
  elsewhere = client._replace(indices=indices)
  assert_same_bits(run(problem, elsewhere), run(problem, client))


def test_a_partial_batch_is_the_mean_of_its_examples(problem):
  partial = run(problem, problem.cohort(0, steps=1, batch=4))
  alone = run(problem, problem.cohort(0, steps=1, batch=1))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  jax.tree.map(close, partial, alone)


def test_training_is_sgd_with_momentum(problem, oracle):
  client = problem.cohort(5)
  start = oracle.flatten(problem.trainable)
  expected = oracle.local_sgd(
    problem, start, client.indices[0], client.mask[0], 0.05, 0.9
  )
  got = oracle.flatten(run(problem, client).trainable)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_summed_over_examples_before_each_step(problem):
  client = problem.cohort(1)  # Three examples in steps of two and one.
  expected = 0.0
  for step in range(2):
    before = steps_of(client, [*range(step), -1, -1, -1, -1][:4])
    rows = client.indices[0, step]
    batch = jax.tree.map(lambda x, rows=rows: x[rows], problem.examples)
    total, _ = problem.loss_fn(
      run(problem, before).trainable,
      problem.frozen,
      batch,
      client.mask[0, step],
      KEY,
    )
    expected += total
  training = run(problem, client)
  assert training.count == 3
  np.testing.assert_allclose(training.loss, expected, rtol=1e-5)


def test_each_step_draws_its_own_random_numbers():
  def loss_fn(trainable, frozen, examples, mask, key):
    return trainable * jax.random.normal(key), mask.sum()

  train = jax.jit(clients.local_update(loss_fn, optax.sgd(1.0)))

  def moved(steps):
    mask = np.ones((steps, 1), bool)
    indices = np.zeros((steps, 1), np.int32)
    return train(jnp.zeros(()), {}, {}, indices, mask, KEY).trainable

  once, twice = moved(1), moved(2)
  assert once != 0
  assert abs(twice - 2 * once) > 1e-3


def test_one_at_a_time_a_padded_step_is_not_computed(problem):
  computed = []

  def loss_fn(*args):
    jax.debug.callback(lambda: computed.append(1))
    return problem.loss_fn(*args)

  train = jax.jit(clients.local_update(loss_fn, optax.sgd(0.1)))
  client = problem.cohort(1, steps=8)
  jax.block_until_ready(
    train(
      problem.trainable,
      problem.frozen,
      problem.examples,
      client.indices[0],
      client.mask[0],
      KEY,
    )
  )
  jax.effects_barrier()
  assert len(computed) == 2
