"""Knobs that configs share do what their docstrings say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.experiments import knobs
from fedjax_llm.federated import clients


def steps(optimizer, gradients):
  """Where 1 goes by these gradients."""
  x, state = jnp.ones(()), optimizer.init(jnp.ones(()))
  for gradient in gradients:
    updates, state = optimizer.update(jnp.float32(gradient), state, x)
    x = optax.apply_updates(x, updates)
  return float(x)


def test_clients_step_with_momentum():
  rates = knobs.Rates(client_learning_rate=0.1)
  velocity, expected = 0.0, 1.0
  for gradient in (1.0, -2.0, 0.5):
    velocity = 0.9 * velocity + gradient
    expected -= 0.1 * velocity
  got = steps(rates.client, (1.0, -2.0, 0.5))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_server_decays_weights():
  rates = knobs.Rates(client_learning_rate=0.1, server_learning_rate=0.01)
  # Adam's first step is the rate's; decay takes 1 % of the rate of x = 1.
  expected = 1 - 0.01 * (1 + 0.01)
  np.testing.assert_allclose(steps(rates.server, (3.0,)), expected, rtol=1e-5)


def test_a_placement_is_on_all_devices():
  assert knobs.Compute().settings["placement"] == clients.Placement()
  three = knobs.Compute(clients_per_step=3).settings["placement"]
  assert three == clients.Placement(clients_per_step=3)
  assert three.mesh.size == jax.device_count() == 2


def test_a_model_is_its_folder_where_there_is_one_and_else_its_hub_name(
  tmp_path, monkeypatch
):
  find = lambda: knobs._model("minilm-l6", "someone/MiniLM")
  monkeypatch.delenv("FEDJAX_LLM_MODELS", raising=False)
  assert find() == "someone/MiniLM"
  monkeypatch.setenv("FEDJAX_LLM_MODELS", str(tmp_path))
  assert find() == "someone/MiniLM"
  (tmp_path / "minilm-l6").mkdir()
  assert find() == str(tmp_path / "minilm-l6")
