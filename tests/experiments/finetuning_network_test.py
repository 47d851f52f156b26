"""Federated experiments over a network and under privacy, at no cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.experiments import finetuning, run_folder, runner
from fedjax_llm.federated import network, parameters
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.federated.privacy import guarantees
from tests import toy_regression


@pytest.fixture(scope="module")
def toy():
  return toy_regression.made()


@pytest.fixture(scope="module")
def sizes(toy):
  """Bytes of a message down, and of one up."""
  made = toy.experiment()
  _, line = made.round(made.init(), 0)
  return line["download_bytes_per_client"], line["upload_bytes_per_client"]


def assert_same_bits(tree, other):
  same = jax.tree.map(np.array_equal, jax.device_get(tree), other)
  assert jax.tree.all(same)


def by_hand(toy, answers_of, count, **options):
  """States after rounds in which clients that do not answer weigh nothing."""
  advance = jax.jit(toy.algorithm.round)
  examples, frozen = toy.task.population.examples, toy.task.frozen
  sample, key = toy.sampler(**options), jax.random.key(toy.task.seed)
  state, states = toy.algorithm.init(toy.task.trainable), []
  for number in range(count):
    cohort = sample(number)
    answers = np.float32(answers_of(number, cohort))
    cohort = cohort._replace(weights=answers * cohort.weights)
    state, _ = advance(state, frozen, examples, cohort, key)
    states.append(jax.device_get(state))
  return states


# Up is 4 and 16 times slower than down.
LINKS = (
  network.Link(0.1, 0.025, 0.1, 0.01),
  network.Link(0.01, 0.000625, 0.25, 0.1),
)


def seconds_by_hand(client, sizes):
  """Of clients with as many examples as their number and one, 2 a step."""
  steps = [1, 1, 2, 2, 3, 3][client]
  down, up = sizes
  if client % 2 == 0:
    return 0.1 + down * 8 / 100_000 + steps * 0.01 + 0.1 + up * 8 / 25_000
  return 0.25 + down * 8 / 10_000 + steps * 0.1 + 0.25 + up * 8 / 625


def test_a_round_takes_as_long_as_its_slowest_client(toy, sizes):
  made = toy.experiment(network=network.Network(tiers=LINKS, seed=0))
  state, sample = made.init(), toy.sampler()
  for number in range(3):
    state, line = made.round(state, number)
    chosen = sample(number).clients
    slowest = max(seconds_by_hand(client, sizes) for client in chosen)
    assert line["simulated_seconds"] == pytest.approx(slowest, rel=1e-9)
    assert line["selected"] == line["answered"] == 4


def test_dropouts_are_cohorts_whose_weights_are_zero(toy, sizes):
  links = network.Network(
    tiers=LINKS, dropout_before=0.3, dropout_during=0.3, seed=1
  )
  made = toy.experiment(network=links)

  def outcome(number, cohort):
    return links.outcome(cohort, np.zeros(4), round_number=number, wanted=4)

  expected = by_hand(toy, lambda *x: outcome(*x).answered, 4)
  state, sample, answered = made.init(), toy.sampler(), set()
  for number in range(4):
    state, line = made.round(state, number)
    assert_same_bits(state, expected[number])
    answered.add(line["answered"])
    who = outcome(number, sample(number))
    assert line["download_bytes"] == who.started.sum() * sizes[0]
    assert line["upload_bytes"] == who.uploaded.sum() * sizes[1]
  assert answered - {0, 4}


def test_who_is_late_has_sent_but_does_not_count(toy, sizes):
  deadline = 0.5
  is_fast = [seconds_by_hand(client, sizes) < deadline for client in range(6)]
  assert is_fast == [True, False] * 3
  links = network.Network(tiers=LINKS, deadline_seconds=deadline, seed=0)
  made = toy.experiment(network=links)
  expected = by_hand(toy, lambda _, cohort: cohort.clients % 2 == 0, 3)
  state = made.init()
  for number in range(3):
    fast = (toy.sampler()(number).clients % 2 == 0).sum()
    state, line = made.round(state, number)
    assert_same_bits(state, expected[number])
    assert (line["answered"], line["simulated_seconds"]) == (fast, deadline)
    assert line["upload_bytes"] == 4 * sizes[1]


def test_the_first_of_too_many_count_and_all_have_sent(toy, sizes):
  links = network.Network(tiers=LINKS, over_selection=1.5, seed=0)
  made = toy.experiment(network=links)
  ordered = sorted(seconds_by_hand(client, sizes) for client in range(6))

  def first_four(_, cohort):
    order = sorted(
      range(6), key=lambda i: seconds_by_hand(cohort.clients[i], sizes)
    )
    return [i in order[:4] for i in range(6)]

  expected = by_hand(toy, first_four, 2, clients_per_round=6)
  state = made.init()
  for number in range(2):
    state, line = made.round(state, number)
    assert_same_bits(state, expected[number])
    assert (line["selected"], line["answered"]) == (6, 4)
    assert line["simulated_seconds"] == pytest.approx(ordered[3], rel=1e-9)
    assert line["upload_bytes"] == 6 * sizes[1]


def test_a_network_that_asks_for_sizes_compiles_the_round_once(toy, caplog):
  def round_fn(*arguments):  # Not compiled by another test.
    return toy.algorithm.round(*arguments)

  links = network.Network(tiers=LINKS, deadline_seconds=0.5, seed=0)
  made = toy._replace(algorithm=toy.algorithm._replace(round=round_fn))
  made = made.experiment(network=links)
  state, compiled = made.init(), []
  for number in range(2):
    caplog.clear()
    with jax.log_compiles():
      state, _ = made.round(state, number)
    compiled.append([x for x in caplog.messages if x.startswith("Compiling")])
  assert sum("round_fn" in message for message in compiled[0]) == 1
  assert compiled[1] == []


def test_a_round_of_nobody_is_skipped_and_said_so(toy, tmp_path, capsys):
  links = network.Network(tiers=LINKS, dropout_before=1.0, seed=0)
  made = toy.experiment(network=links, rounds=2)
  state, line = made.round(made.init(), 0)
  assert_same_bits(state, jax.device_get(made.init())._replace(round=1))
  assert line["simulated_seconds"] == line["tokens"] == 0
  assert line["download_bytes"] == line["upload_bytes"] == 0
  capsys.readouterr()
  runner.run(made, tmp_path)
  shown = capsys.readouterr()
  message = "none of 4 selected clients answered; it is skipped"
  assert (shown.out + shown.err).count(message) == 2
  start, *lines = run_folder.read_metrics(tmp_path / "metrics.jsonl")
  assert [line["answered"] for line in lines] == [0, 0]
  assert not any("train_loss" in line for line in lines)
  assert lines[-1]["loss"] == start["loss"]


def result(folder):
  """All that a run wrote but the time it took."""
  lines = run_folder.read_metrics(folder / "metrics.jsonl")
  lines = [{k: x for k, x in line.items() if k != "seconds"} for line in lines]
  return lines, np.load(folder / "adapter" / "w.npy").tolist()


def test_a_run_over_a_network_resumes_bit_for_bit(toy, tmp_path):
  links = network.Network(
    tiers=LINKS,
    dropout_before=0.2,
    dropout_during=0.2,
    deadline_seconds=0.9,
    over_selection=1.3,
    seed=0,
  )
  made = toy.experiment(network=links, checkpoint_every=1)

  def dies(state, number):
    if number == 2:
      raise InterruptedError
    return made.round(state, number)

  runner.run(made, tmp_path / "whole")
  with pytest.raises(InterruptedError):
    runner.run(dataclasses.replace(made, round=dies), tmp_path / "x")
  again = toy.experiment(network=links, checkpoint_every=1)
  runner.run(again, tmp_path / "x", name="x")
  one, other = (result(tmp_path / name) for name in ("whole", "x"))
  assert one == other


def test_only_who_is_there_pays_in_a_poisson_round(toy, sizes):
  made = toy.experiment(clients_per_round=2, sampling="poisson")
  sample = toy.sampler(clients_per_round=2, sampling="poisson")
  state, counts = made.init(), []
  for number in range(4):
    there = (sample(number).weights > 0).sum()
    state, line = made.round(state, number)
    assert line["download_bytes"] == there * sizes[0]
    assert line["upload_bytes"] == there * sizes[1]
    counts.append(there)
  assert len(set(counts)) > 1


def test_messages_of_all_that_a_method_trains_are_not_sparse(toy):
  trainable = {**toy.task.trainable, "fixed": jnp.zeros(3)}
  algorithm = parameters.partial(
    lambda loss_fn: fed_avg.fed_avg(
      loss_fn,
      optax.sgd(0.1),
      optax.sgd(1.0),
      placement=toy.task.placement,
    ),
    toy.task.loss_fn,
    is_trained=lambda path: path == "w",
  )
  task = dataclasses.replace(toy.task, trainable=trainable)
  made = toy_regression.Toy(task, algorithm).experiment()
  _, line = made.round(made.init(), 0)
  assert (line["trainable"], line["sparse_messages"]) == (8, 0)
  assert line["download_entries"] == line["upload_entries"] == 4 * 8
  made = toy.experiment()
  _, line = made.round(made.init(), 0)
  # Half of an update is.
  assert (line["sparse_messages"], line["sparse_entries"]) == (4, 4 * 4)


def test_what_a_method_adds_to_the_base_model_is_evaluated_and_exported(
  toy, tmp_path
):
  delta = jnp.arange(8) / 8
  residual = lambda state: {"w": {"delta": delta}}
  adds = toy._replace(algorithm=toy.algorithm._replace(residual=residual))
  adds, plain = adds.experiment(), toy.experiment()
  state, _ = plain.round(plain.init(), 0)
  moved = state._replace(trainable={"w": state.trainable["w"] + delta})
  expected = plain.evaluate(moved)["loss"]
  assert adds.evaluate(state)["loss"] == pytest.approx(expected, rel=1e-6)
  assert plain.evaluate(state)["loss"] != pytest.approx(expected, rel=1e-3)
  adds.export(state, tmp_path)
  np.testing.assert_array_equal(
    np.load(tmp_path / "adapter" / "w.npy"), moved.trainable["w"]
  )


def test_privacy_is_in_the_metrics_and_described_at_the_end(
  toy, tmp_path, capsys
):
  guarantee = guarantees.ClientLevel(2.0, 1e-3, "fixed", 6, 4)
  made = toy.private(fed_avg.fed_avg, 2.0).experiment(
    privacy=guarantee, evaluate_every=2
  )
  runner.run(made, tmp_path)
  lines = run_folder.read_metrics(tmp_path / "metrics.jsonl")
  # Nothing is spent before the first round.
  spent = [None, None, guarantee.epsilon(2), None, guarantee.epsilon(4)]
  assert [x.get("epsilon") for x in lines] == spent
  described = guarantee.describe(4) + "\n"
  assert capsys.readouterr().out.count(described) == 1
  assert (tmp_path / "privacy.txt").read_text(encoding="utf-8") == described


def test_an_infinite_epsilon_is_no_metric(toy):
  guarantee = guarantees.ClientLevel(0.0, 1e-3, "fixed", 6, 4)
  made = toy.private(fed_avg.fed_avg, 0.0).experiment(privacy=guarantee)
  state, _ = made.round(made.init(), 0)
  assert "epsilon" not in made.evaluate(state)


def test_a_private_round_of_nobody_is_said_to_be_noise(toy, capsys):
  links = network.Network(tiers=LINKS, dropout_before=1.0, seed=0)
  made = toy.private(fed_avg.fed_avg, 1.0).experiment(network=links)
  state, _ = made.round(made.init(), 0)
  shown = capsys.readouterr()
  assert "answered; there is only noise." in shown.out + shown.err
  assert np.any(state.trainable["w"])


def test_a_server_that_diverges_is_not_saved_and_clients_not_blamed(
  toy, tmp_path
):
  algorithm = fed_avg.fed_avg(
    toy.task.loss_fn,
    optax.sgd(0.1),
    optax.sgd(float("inf")),
    placement=toy.task.placement,
  )
  made = toy._replace(algorithm=algorithm).experiment(checkpoint_every=1)
  message = "round 1: the server's parameters are not .* lower the server"
  with pytest.raises(FloatingPointError, match=message):
    runner.run(made, tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())
  lines = run_folder.read_metrics(tmp_path / "metrics.jsonl")
  assert [line["round"] for line in lines] == [0]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rounds": 2.5}, "rounds >= 1, a whole number, got 2.5"),
    ({"batch_size": 0}, "batch_size >= 1, a whole number, got 0"),
    ({"local_steps": 0}, "local_steps >= 1"),
    ({"clients_per_round": None}, "clients_per_round >= 1, .* got None"),
  ],
)
def test_a_schedule_counts_in_whole_numbers(changes, message):
  settings = {"rounds": 1} | toy_regression.SETTINGS | changes
  with pytest.raises(ValueError, match=message):
    finetuning.Schedule(**settings)
