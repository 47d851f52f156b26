import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.federated import clients, mapping

KEY = jax.random.key(4)


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

  mesh = clients.device_mesh(jax.devices()[: 2 if on_mesh else 1])
  mapped = jax.jit(mapping.over_devices(fn, mesh, clients_per_step))
  values = np.arange(3 * cohort, dtype=np.float32).reshape(cohort, 3)
  keys = jax.random.split(KEY, cohort)
  sums, (outputs, drawn) = mapped(jnp.float32(2), (values, keys))
  np.testing.assert_array_equal(sums["square"], 2 * (values**2).sum(0))
  assert sums["count"] == cohort
  np.testing.assert_array_equal(outputs, values + 2)
  assert drawn.tolist() == [int(jax.random.bits(key)) for key in keys]


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_rows_are_mapped_where_one_is_in_steps_that_do_not_divide_them(at_once):
  fn = lambda shared, row: (row**2, shared * row)
  rows = jnp.arange(5.0)
  total, outputs = jax.jit(mapping.in_steps(fn, at_once))(3.0, rows)
  assert total == 30
  assert outputs.tolist() == [0, 3, 6, 9, 12]
