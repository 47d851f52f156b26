import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients, parameters, rounds
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.federated.privacy import dp_sgd, mechanisms
from tests import placements

TREE = {
  "layers": {"q_proj": {"a": 1, "b": 2}, "up": {"a": 3, "b": 4}},
  "score": {"kernel": 5, "bias": 6},
}


def test_a_tree_is_split_by_path_and_combined_again():
  chosen, rest = parameters.split(TREE, lambda path: "q_proj" in path)
  assert jax.tree.leaves(chosen) == [1, 2]
  assert jax.tree.leaves(rest) == [3, 4, 6, 5]
  assert parameters.combine(chosen, rest) == TREE
  assert parameters.combine(rest, chosen) == TREE


def test_paths_tell_factors_from_heads():
  kinds = {path: parameters.factor(path) for path in parameters.paths(TREE)}
  assert kinds == {
    "layers/q_proj/a": "a",
    "layers/q_proj/b": "b",
    "layers/up/a": "a",
    "layers/up/b": "b",
    "score/bias": None,
    "score/kernel": None,
  }


def quadratic(trainable, frozen, examples, mask, key):
  """Pulls the sum of both parameters towards a target."""
  del frozen, key
  total = trainable["x"] + trainable["y"]
  return jnp.where(mask, (total - examples) ** 2, 0).sum(), mask.sum()


def test_what_is_not_trained_stays_and_does_not_travel():
  # One client, one step of rate 1/4 on (x + y - 3)^2: x gets half way.
  algorithm = parameters.partial(
    lambda loss_fn: fed_avg.fed_avg(loss_fn, optax.sgd(0.25), optax.sgd(1.0)),
    quadratic,
    is_trained=lambda path: path == "x",
  )
  trainable = {"x": jnp.array(0.0), "y": jnp.array(1.0)}
  state = algorithm.init(trainable)
  cohort = clients.Cohort(
    np.zeros(1, np.int32),
    np.zeros((1, 1, 1), np.int32),
    np.ones((1, 1, 1), bool),
    np.ones(1, np.float32),
  )
  key = jax.random.key(0)
  state, metrics = jax.jit(algorithm.round, donate_argnums=0)(
    state, {}, jnp.array([3.0]), cohort, key
  )
  assert state.round == 1
  assert state.trainable == {"x": 1.0, "y": 1.0}
  assert algorithm.received(state, key) == {"x": 1.0, "y": 1.0}
  assert metrics["download_entries"].tolist() == [1]
  assert metrics["upload_entries"].tolist() == [1]
  assert trainable["y"] == 1.0  # It was not donated.


def test_a_method_that_trains_nothing_is_refused(problem):
  algorithm = parameters.partial(
    lambda loss_fn: fed_avg.fed_avg(loss_fn, optax.sgd(0.1), optax.sgd(1.0)),
    problem.loss_fn,
    is_trained=lambda path: path == "c",
  )
  with pytest.raises(ValueError, match="found none among a, b, head"):
    algorithm.init(problem.trainable)


def test_what_the_trained_part_promises_is_kept():
  def make(loss_fn):
    train = dp_sgd.local_update(
      loss_fn, optax.sgd(0.1), clip_norm=1.0, noise_multiplier=0.5
    )
    return rounds.federated_round(
      train,
      optax.sgd(1.0),
      aggregate=mechanisms.private_mean(
        clip_norm=1.0, noise_multiplier=2.0, clients=1
      ),
      placement=placements.ALONE,
    )

  algorithm = parameters.partial(
    make, quadratic, is_trained=lambda path: path == "x"
  )
  assert algorithm.noise_multiplier == 2
  assert algorithm.example_noise_multiplier == 0.5
  assert algorithm.placement == placements.ALONE


def test_every_entry_has_an_owner(problem):
  tree = {"layers": {"q": {"a": np.ones((2, 3)), "b": np.ones((3, 1))}}}
  got = parameters.owners(tree)
  assert got.tolist() == [0] * 6 + [1] * 3
  assert parameters.owners(problem.trainable).tolist() == (
    [0] * 12 + [1] * 8 + [2] * 4
  )
