import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients

KEY = jax.random.key(3)


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


def test_the_cosines_are_measured_where_few_numbers_are_trained():
  assert clients.Placement().has_cosines(clients.FEW)
  assert not clients.Placement().has_cosines(clients.FEW + 1)
  assert clients.Placement(cosines=True).has_cosines(clients.FEW + 1)
  assert not clients.Placement(cosines=False).has_cosines(1)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_cohort_refuses_weights_that_are_no_numbers_of_examples(
  problem, weight
):
  cohort = problem.cohort(2, 0, 5)
  assert clients.check_cohort(cohort) is cohort
  nobody = cohort._replace(weights=np.zeros(3, np.float32))
  assert clients.check_cohort(nobody) is nobody
  weights = np.array([8, weight, 7], np.float32)
  broken = cohort._replace(weights=weights)
  with pytest.raises(ValueError, match="finite weights of at least 0, got"):
    clients.check_cohort(broken)
  # Traced, there is nothing to see.
  jax.jit(clients.check_cohort)(broken)


def test_clients_are_dealt_to_tiers_in_turn():
  assert clients.in_turn(3)(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
