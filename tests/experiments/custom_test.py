"""A model and data that are no text, from a few arrays to a resumed run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from fedjax_llm.experiments import finetuning, run_folder, runner, tasks
from fedjax_llm.federated.algorithms import fed_avg

SCHEDULE = finetuning.Schedule(
  rounds=2,
  clients_per_round=3,
  batch_size=4,
  local_epochs=2,
  evaluate_every=1,
  checkpoint_every=1,
)
# Where each of 4 clients starts.
STARTS = [0, 8, 20, 24, 40]


def points(seed, count):
  """Points of a plane, and on which side of a line they lie."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, 2)).astype(np.float32)
  return {"x": x, "y": (x.sum(1) > 0).astype(np.float32)}


def logits(trainable, frozen, x):
  return jnp.tanh(x @ frozen["w"]) @ trainable["w"] + trainable["b"]


def loss_fn(trainable, frozen, examples, mask, key):
  del key  # Deterministic.
  losses = optax.sigmoid_binary_cross_entropy(
    logits(trainable, frozen, examples["x"]), examples["y"]
  )
  return jnp.where(mask, losses, 0).sum(), mask.sum()


def evaluate(trainable, frozen):
  held_out = points(1, 100)
  total, count = loss_fn(trainable, frozen, held_out, np.ones(100, bool), None)
  return {"loss": float(total / count)}


def task(**changes):
  arguments = {
    "trainable": {"w": jnp.zeros(16), "b": jnp.zeros(())},
    "frozen": {"w": jax.random.normal(jax.random.key(0), (2, 16))},
    "examples": points(0, 40),
    "starts": STARTS,
    "evaluate": evaluate,
  } | changes
  return tasks.custom(loss_fn, **arguments)


def experiment(schedule=SCHEDULE, rate=0.3, **changes):
  made = task(**changes)
  algorithm = fed_avg.fed_avg(made.loss_fn, optax.sgd(rate), optax.sgd(1.0))
  return finetuning.fine_tuning(made, algorithm, schedule)


def exported(folder):
  return safetensors.numpy.load_file(
    folder / "adapter" / "trainable.safetensors"
  )


def test_it_trains_exports_and_resumes_to_the_bit(tmp_path):
  runner.run(experiment(), tmp_path / "whole")
  first, *_, last = run_folder.read_metrics(tmp_path / "whole/metrics.jsonl")
  assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)
  assert last["loss"] < 0.9 * first["loss"]
  made = experiment()

  def dies(state, number):
    if number == 1:
      raise InterruptedError
    return made.round(state, number)

  with pytest.raises(InterruptedError):
    runner.run(dataclasses.replace(made, round=dies), tmp_path / "x")
  runner.run(experiment(), tmp_path / "x")
  whole, resumed = exported(tmp_path / "whole"), exported(tmp_path / "x")
  assert whole.keys() == {"w", "b"} and np.any(whole["w"])
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_the_clients_count_by_their_examples():
  # A client's step is its mean gradient, so one step of everybody, weighted by
  # examples, is a step of gradient descent on all of them.
  made = task()
  schedule = finetuning.Schedule(rounds=1, clients_per_round=4, batch_size=16)
  algorithm = fed_avg.fed_avg(made.loss_fn, optax.sgd(0.3), optax.sgd(1.0))
  run = finetuning.fine_tuning(made, algorithm, schedule)
  state, _ = run.round(run.init(), 0)

  def mean_loss(trainable):
    everyone = np.ones(40, bool)
    return (
      loss_fn(trainable, made.frozen, points(0, 40), everyone, None)[0] / 40
    )

  gradient = jax.grad(mean_loss)(made.trainable)
  for name, expected in gradient.items():
    np.testing.assert_allclose(
      state.trainable[name], -0.3 * expected, rtol=1e-5, atol=1e-7
    )


# What a program in Python, without knobs, may change between two calls.
EDITS = {
  "a learning rate": (dict(rate=0.2), "its code or a number in it"),
  "the start": (
    dict(trainable={"w": jnp.ones(16), "b": jnp.zeros(())}),
    "starts from another state",
  ),
  "the seed": (dict(seed=1), "seed: 0 there, 1 now"),
  "the examples": (dict(examples=points(2, 40)), "fingerprint: "),
  "the owners": (dict(starts=[0, 10, 20, 30, 40]), "fingerprint: "),
  "what is frozen": (
    dict(frozen={"w": jnp.ones((2, 16))}),
    "frozen_fingerprint: ",
  ),
  "the batch": (
    dict(schedule=dataclasses.replace(SCHEDULE, batch_size=2)),
    "batch_size: 4 there, 2 now",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("custom")
  runner.run(experiment(), folder)
  return folder


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_program_is_neither_resumed_nor_exported(folder, name):
  changes, message = EDITS[name]
  before = (folder / "run.json").read_bytes()
  for call in (runner.run, runner.export):
    with pytest.raises(ValueError, match=message):
      call(experiment(**changes), folder)
  assert (folder / "run.json").read_bytes() == before


def test_more_rounds_go_on(folder, tmp_path):
  longer = dataclasses.replace(SCHEDULE, rounds=4)
  runner.run(experiment(longer), tmp_path / "whole")
  runner.run(experiment(), tmp_path / "x")
  runner.run(experiment(longer), tmp_path / "x")
  whole, grown = exported(tmp_path / "whole"), exported(tmp_path / "x")
  jax.tree.map(np.testing.assert_array_equal, whole, grown)
  assert json.loads((tmp_path / "x/run.json").read_text())["rounds"] == 4


def test_it_is_saved_as_the_user_says(tmp_path):
  def save(trainable, folder):
    folder.mkdir()
    np.save(folder / "b.npy", trainable["b"])

  runner.run(experiment(save=save), tmp_path)
  assert np.load(tmp_path / "adapter" / "b.npy").shape == ()


def test_an_evaluation_without_a_loss_is_refused(tmp_path):
  made = experiment(evaluate=lambda trainable, frozen: {"error": 1.0})
  with pytest.raises(ValueError, match="with \"loss\", got the keys .'error'"):
    runner.run(made, tmp_path)


def test_bad_arguments_are_refused_in_words():
  with pytest.raises(ValueError, match="integers that increase from 0 to 40"):
    task(starts=[0, 50])
  with pytest.raises(ValueError, match="seed"):
    task(seed=-1)
