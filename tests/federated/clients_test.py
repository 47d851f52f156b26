import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients
from tests import placements

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
  # Law 22, also when training draws random numbers.
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


def test_proximal_pulls_towards_what_was_received(problem, oracle):
  # FedProx: two steps by hand, the first of which feels no pull.
  rate, mu = 0.05, 0.5
  client = problem.cohort(2, steps=2, batch=1)
  optimizer = optax.chain(clients.proximal(mu), optax.sgd(rate))
  train = jax.jit(clients.local_update(problem.loss_fn, optimizer))
  got = train(
    problem.trainable,
    problem.frozen,
    problem.examples,
    client.indices[0],
    client.mask[0],
    KEY,
  ).trainable
  start = flat = oracle.flatten(problem.trainable)
  for row in client.indices[0, :, 0]:
    x, y = problem.examples["x"][row], problem.examples["y"][row]
    gradient = oracle.gradient(flat, problem.frozen["w"], x, y)
    flat = flat - rate * (gradient + mu * (flat - start))
  np.testing.assert_allclose(oracle.flatten(got), flat, rtol=1e-5, atol=1e-6)


def test_proximal_refuses_to_push():
  with pytest.raises(ValueError, match="mu >= 0"):
    clients.proximal(-0.1)


@pytest.mark.parametrize("clients_per_step", [1, 2, 5])
@pytest.mark.parametrize(
  ("cohort", "on_mesh"), [(5, False), (5, True), (1, True)]
)
def test_all_placements_agree(cohort, on_mesh, clients_per_step):
  # Two devices or steps of two do not divide five clients. Whole numbers, so
  # that the order of additions does not matter.
  def fn(shared, client):
    value, key = client
    sums = {"square": shared * value**2, "count": jnp.int32(1)}
    return sums, (value + shared, jax.random.bits(key))

  mapped = jax.jit(
    clients.map_clients(
      fn,
      placements.on(2 if on_mesh else 1, clients_per_step),
    )
  )
  values = np.arange(3 * cohort, dtype=np.float32).reshape(cohort, 3)
  keys = jax.random.split(KEY, cohort)
  sums, (outputs, drawn) = mapped(jnp.float32(2), (values, keys))
  np.testing.assert_array_equal(sums["square"], 2 * (values**2).sum(0))
  assert sums["count"] == cohort
  np.testing.assert_array_equal(outputs, values + 2)
  assert drawn.tolist() == [int(jax.random.bits(key)) for key in keys]


def test_a_placement_that_is_not_told_is_all_devices_one_client_at_a_time():
  placement = clients.Placement()
  assert placement.mesh.size == jax.device_count() == 2
  assert placement.at_once == 1  # Of a CPU.
  fn = lambda shared, client: (client, jax.lax.axis_index("clients"))
  _, devices = jax.jit(clients.map_clients(fn))((), jnp.zeros(4))
  assert devices.tolist() == [0, 0, 1, 1]


def test_a_placement_refuses_what_it_cannot_place():
  with pytest.raises(ValueError, match="clients_per_step >= 1, got 0"):
    clients.Placement(clients_per_step=0)
  kinds = jax.sharding.AxisType
  other = jax.make_mesh((2,), ("batch",), axis_types=(kinds.Auto,))
  with pytest.raises(ValueError, match='an Auto axis "clients", got'):
    clients.Placement(other)
  explicit = jax.make_mesh((2,), ("clients",), axis_types=(kinds.Explicit,))
  with pytest.raises(ValueError, match="jax.make_mesh `axis_types"):
    clients.Placement(explicit)
