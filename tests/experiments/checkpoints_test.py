"""What is restored is what was saved, to the bit, whatever was killed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.experiments import checkpoints


class State(NamedTuple):
  """A state whose fields are in no alphabetical order."""

  round: Any
  factors: Any
  optimizer: Any
  nothing: Any = ()


def state_of(seed):
  key = jax.random.key(seed)
  factors = {
    "b": jax.random.normal(key, (3, 2)),
    "a": jnp.array([jnp.inf, -0.0, 1e-42], jnp.bfloat16),
  }
  return State(jnp.int32(seed), factors, optax.adam(0.1).init(factors))


def assert_same_bits(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder, *rounds):
  with checkpoints.Checkpoints(folder) as saved:
    for number in rounds:
      saved.save(number, state_of(number))


def test_the_latest_state_is_restored_bit_for_bit(tmp_path):
  save(tmp_path, 1, 2, 3)
  with checkpoints.Checkpoints(tmp_path) as saved:
    latest, state = saved.restore(state_of(0))
  assert latest == 3
  assert_same_bits(state, state_of(3))


def test_without_a_checkpoint_the_first_state_is_given_back(tmp_path):
  first = state_of(0)
  with checkpoints.Checkpoints(tmp_path) as saved:
    assert saved.restore(first) == (0, first)


def test_the_last_two_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_saving_is_over_before_the_state_is_donated(tmp_path):
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = jnp.zeros(1 << 20)
  with checkpoints.Checkpoints(tmp_path) as saved:
    for number in range(5):
      saved.save(number, {"x": state})
      state = advance(advance(state))
  with checkpoints.Checkpoints(tmp_path) as saved:
    _, last = saved.restore({"x": state})
  np.testing.assert_array_equal(last["x"], np.full(1 << 20, 8))


def test_what_a_killed_process_left_half_done_is_dropped(tmp_path):
  save(tmp_path, 1)
  half = tmp_path / "2.orbax-checkpoint-tmp"
  (half / "default").mkdir(parents=True)
  (half / "default" / "manifest.ocdbt").write_bytes(b"half")
  with checkpoints.Checkpoints(tmp_path) as saved:
    latest, state = saved.restore(state_of(0))
    saved.save(2, state_of(2))
  assert latest == 1
  assert_same_bits(state, state_of(1))
  assert not half.exists()


@pytest.mark.parametrize(
  "like",
  [
    {"x": jnp.zeros((2, 3))},
    {"x": jnp.zeros((3, 2), jnp.bfloat16)},
    {"y": jnp.zeros((3, 2))},
    {"x": jnp.zeros((3, 2)), "y": jnp.zeros(())},
  ],
  ids=["shape", "dtype", "name", "structure"],
)
def test_a_state_of_another_make_is_refused(tmp_path, like):
  with checkpoints.Checkpoints(tmp_path) as saved:
    saved.save(1, {"x": jnp.zeros((3, 2))})
  with checkpoints.Checkpoints(tmp_path) as saved, pytest.raises(ValueError):
    saved.restore(like)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_state_moves_to_another_number_of_devices(tmp_path, before, after):
  def on(devices, state):
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("clients",))
    return jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.P()))

  with checkpoints.Checkpoints(tmp_path) as saved:
    saved.save(1, on(before, state_of(1)))
  like = on(after, state_of(0))
  with checkpoints.Checkpoints(tmp_path) as saved:
    _, state = saved.restore(like)
  assert_same_bits(state, state_of(1))
  placed = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
  assert placed(state) == placed(like)
