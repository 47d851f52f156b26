"""A federated experiment at toy size: rounds, evaluation, adapter, resume."""

import contextlib
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_llm as fl
from fedjax_llm import compression
from fedjax_llm.cli import configs
from fedjax_llm.codecs import distortion
from fedjax_llm.data import records
from fedjax_llm.experiments import checkpoints, finetuning, knobs, tasks
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.models import adapters, families, lora
from tests import flat, placements

TOY = configs.load(str(pathlib.Path(__file__).parent.parent / "toy_config.py"))


@pytest.fixture(scope="module")
def made(toy_model):
  return TOY.experiment(model=str(toy_model))


@contextlib.contextmanager
def compilations():
  """What JAX says meanwhile of what it compiles."""
  messages = []

  def emit(record):
    if "Compiling" in record.getMessage():
      messages.append(record.getMessage())

  handler = logging.Handler()
  handler.emit = emit
  logger = logging.getLogger("jax")
  logger.addHandler(handler)
  with jax.log_compiles():
    yield messages
  logger.removeHandler(handler)


@pytest.fixture(scope="module")
def rounds(made):
  """Host copies of the states; metrics and compilations of four rounds."""
  state = made.init()
  states, metrics, compiled = [jax.device_get(state)], [], []
  for number in range(4):
    with compilations() as messages:
      state, row = made.round(state, number)
    states.append(jax.device_get(state))
    metrics.append(row)
    compiled.append(messages)
  return states, metrics, compiled


def placed(made, state):
  """A state on the devices where the experiment has its own."""
  like = made.init()
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)


def assert_same_bits(tree, other):
  same = jax.tree.map(np.array_equal, jax.device_get(tree), other)
  assert jax.tree.all(same)


def test_two_devices_are_used(made):
  assert len(jax.tree.leaves(made.init())[0].sharding.device_set) == 2


def test_training_changes_the_factors_alone(made, rounds):
  states, metrics, _ = rounds
  assert [int(state.round) for state in states] == list(range(5))
  first, last = states[0].trainable, states[-1].trainable
  assert jax.tree.structure(first) == jax.tree.structure(last)
  assert not jax.tree.all(jax.tree.map(np.array_equal, first, last))
  assert all(np.isfinite(row["train_loss"]) for row in metrics)


def test_bytes_are_of_all_clients_and_of_the_largest_message(rounds):
  for row in rounds[1]:
    for direction in ("download", "upload"):
      # Top-K messages have one size.
      everyone = row[f"{direction}_bytes"]
      assert everyone == 3 * row[f"{direction}_bytes_per_client"] > 0


def test_a_round_is_compiled_once_whatever_the_cohort(rounds):
  first, *others = rounds[2]
  assert sum("round_fn" in message for message in first) == 1
  assert others == [[], [], []]


def test_a_restored_state_goes_on_without_compiling(made, rounds, tmp_path):
  states, _, _ = rounds
  with checkpoints.Checkpoints(tmp_path) as saved:
    saved.save(2, placed(made, states[2]))
  like = made.init()
  with checkpoints.Checkpoints(tmp_path) as saved:
    _, state = saved.restore(like)
  with compilations() as messages:
    for number in (2, 3):
      state, _ = made.round(state, number)
  assert messages == []
  assert_same_bits(state, states[4])


def test_placement_and_chunks_do_not_change_the_result(
  made, rounds, toy_model, monkeypatch
):
  one = placements.on(1, 2)
  monkeypatch.setattr(fl, "Placement", lambda **knobs: one)
  other = TOY.experiment(model=str(toy_model))
  state = other.init()
  for number in range(2):
    state, row = other.round(state, number)
    expected = rounds[1][number]
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert row["upload_bytes"] == expected["upload_bytes"]
  # Sums in another order differ by rounding, which Adam's normalisation
  # magnifies where a gradient is near zero: a hundredth of a step of 1e-2.
  for x, y in zip(
    jax.tree.leaves(state.trainable),
    jax.tree.leaves(rounds[0][2].trainable),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=1e-4)


def test_evaluation_is_of_what_clients_receive(made, rounds):
  state = placed(made, rounds[0][4])
  result = made.evaluate(state)
  assert result.keys() == {
    f"{who}{name}"
    for who in ("", "server_")
    for name in ("loss", "perplexity", "accuracy")
  }
  # Half of the factors is not sent.
  assert result["loss"] != result["server_loss"]
  zeros = jax.tree.map(jnp.zeros_like, state.trainable)
  unchanged = made.evaluate(state._replace(trainable=zeros))
  assert unchanged["loss"] == unchanged["server_loss"]


def test_the_exported_adapter_is_what_clients_receive(
  made, rounds, tmp_path, toy_model
):
  state = placed(made, rounds[0][4])
  made.export(state, tmp_path)
  settings, factors = adapters.load(
    tmp_path / "adapter", families.read_config(toy_model)
  )
  assert (settings.rank, settings.alpha) == (2, 4.0)
  assert settings.targets == ("q_proj", "v_proj")
  kept = sent = total = 0
  for x, y in zip(
    jax.tree.leaves(factors), jax.tree.leaves(state.trainable), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_array_equal(x[x != 0], y[x != 0])
    sent, total = sent + (x != 0).sum(), total + x.size
    kept += (y != 0).sum()
  assert sent == total // 2 < kept


def test_a_client_that_diverges_is_named(toy_model):
  made = TOY.experiment(model=str(toy_model), rates=knobs.Rates(jnp.inf))
  with pytest.raises(FloatingPointError, match="the update of step.* is not"):
    state = made.init()
    for number in range(3):
      state, _ = made.round(state, number)


def through(codec_of, toy_model, clients_per_round=3):
  """What is observed of four rounds, and their metrics."""
  task = tasks.language_model(
    records.streams(TOY.corpus(), held_out_rows=1),
    model=str(toy_model),
    adapter=lora.LoRA(rank=2, alpha=4.0),
    sequence_length=16,
    placement=placements.ALONE,
  )
  size = sum(leaf.size for leaf in jax.tree.leaves(task.trainable))
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    optax.sgd(0.1),
    optax.sgd(1.0),
    channel=channels.Channel(upload=codec_of(size)),
    placement=placements.ALONE,
  )
  observed, lines = [], []
  made = finetuning.fine_tuning(
    task,
    algorithm,
    finetuning.Schedule(
      rounds=4,
      clients_per_round=clients_per_round,
      batch_size=2,
      local_steps=1,
    ),
    observe=lambda *what: observed.append(what),
  )
  state = made.init()
  for number in range(4):
    state, line = made.round(state, number)
    lines.append(line)
  return observed, lines


def test_a_codec_that_transmits_nothing_is_told_of_once(toy_model, capsys):
  # The mean of what was recorded is a codec of a small error.
  constant = lambda size: distortion.constant_mean(jnp.full(size, 1e-3))
  _, lines = through(constant, toy_model)
  assert [line["innovation_cosine"] for line in lines] == [0] * 4
  said = capsys.readouterr().out
  warning = "warning: the innovation cosine of the last 3 rounds is 0.000"
  assert said.count(warning) == 1
  assert "more bits" in said and "transform code" in said


def test_a_codec_that_transmits_is_not(toy_model, capsys):
  observed, lines = through(lambda size: compression.sign(), toy_model)
  assert all(0.05 < line["innovation_cosine"] < 1 for line in lines)
  assert all(0 < line["update_cosine"] < 1 for line in lines)
  assert "warning" not in capsys.readouterr().out
  # Rounds are observed with all that the algorithm tells of each client.
  assert [number for number, _, _ in observed] == [0, 1, 2, 3]
  for _, cohort, metrics in observed:
    assert len(cohort.clients) == 3
    assert metrics["finite"].tolist() == [True] * 3


def test_of_one_client_there_is_no_innovation(toy_model):
  _, lines = through(lambda size: compression.sign(), toy_model, 1)
  assert all("innovation_cosine" not in line for line in lines)
  assert all("update_cosine" in line for line in lines)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sequence_length": 33}, "sequence_length <= 32"),
    ({"sequence_length": 0}, "sequence_length >= 1"),
    ({"clients_per_round": 7}, "clients_per_round <= 6"),
    ({"download_density": 2.0}, "density"),
    ({"clients_per_step": 0}, "clients_per_step >= 1"),
    ({"rounds": 0}, "rounds >= 1"),
    ({"model": "./no/folder"}, "no/folder"),
  ],
  ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_knobs_are_refused_before_a_round(toy_model, changes, message):
  with pytest.raises(ValueError, match=message):
    values = {"model": str(toy_model)} | changes
    TOY.experiment(**flat.grouped(TOY.experiment, **values))
