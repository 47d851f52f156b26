"""Federated fine-tuning, as an experiment.

task = tasks.language_model(records.streams(corpora.standard_library()), ...)
algorithm = flasc.flasc(task.loss_fn, optax.sgd(0.1), ...)
experiment = finetuning.federated(task, algorithm, rounds=20, ...)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import tqdm

from fedjax_llm.data import cohorts
from fedjax_llm.experiments import runner, tasks
from fedjax_llm.federated import clients, draws, fidelity, rounds
from fedjax_llm.federated import network as networks
from fedjax_llm.federated.privacy import guarantees
from fedjax_llm.models import lora

Observer = Callable[[int, clients.Cohort, Mapping[str, Any]], None]


def federated(
  task: tasks.Task,
  algorithm: rounds.FederatedAlgorithm,
  *,
  rounds: int,
  clients_per_round: int,
  batch_size: int,
  local_epochs: int = 1,
  local_steps: int | None = None,
  weighting: Literal["uniform", "examples"] = "uniform",
  sampling: Literal["fixed", "poisson"] = "fixed",
  network: networks.Network | None = None,
  privacy: guarantees.Guarantee | None = None,
  observe: Observer | None = None,
  evaluate_every: int = 5,
  checkpoint_every: int = 5,
) -> runner.Experiment:
  """Runs a federated algorithm on a task.

  Args:
    task: what is fine-tuned, on what.
    algorithm: how.
    rounds: how many rounds.
    clients_per_round: how many clients train in each.
    batch_size: rows a local step.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round; None for no limit.
    weighting: of the clients, see `data.cohorts.cohort_sampler`.
    sampling: of the clients, see `data.cohorts.cohort_sampler`.
    network: the clients' links and how reliable these are; None if everybody
      answers, at once.
    privacy: what `algorithm` guarantees. Its epsilon is a metric of each
      evaluation, unless it is infinite, and what it says of the run is printed
      and exported as `privacy.txt`.
    observe: is told of every round what the algorithm tells, to record it. Of
      rounds that are computed again after a process was killed it is told
      again.
    evaluate_every: rounds between evaluations.
    checkpoint_every: rounds between checkpoints.

  Returns:
    An experiment. Its `loss` and the PEFT folder `adapter` that it exports are
    of the model as clients receive it, which for FLASC is the masked one;
    `server_loss` is that of the parameters the server keeps. Bytes are of all
    messages that were sent in a round together, and of the largest one;
    `entries` are the numbers in them, and a message with fewer of these than
    there are `trainable` is a sparse one. With a network there are too the
    clients `selected` and `answered`, and the round's `simulated_seconds`.
    `train_loss` and `tokens` are of those that answered; a round of nobody has
    no `train_loss`. If the algorithm tells them there is `update_cosine`, and
    with two answers or more `innovation_cosine`: see `federated.fidelity`. If
    by it nothing arrives, the run says so, once.

  Raises:
    ValueError: if more clients are to be selected than there are, or they are
      not sampled as `privacy` is accounted for, or `algorithm` adds less noise.
  """
  links = network or networks.IDEAL
  _check(task, links, privacy, sampling, clients_per_round, local_epochs)
  _check_noise(algorithm, privacy)
  sample = cohorts.cohort_sampler(
    task.population,
    clients_per_round=links.selected(clients_per_round),
    batch_size=batch_size,
    local_epochs=local_epochs,
    local_steps=local_steps,
    weighting=weighting,
    sampling=sampling,
    seed=task.seed,
  )
  key = draws.key(task.seed)
  placement = task.placement.everywhere
  examples = jax.device_put(task.population.examples, placement)
  compiled = jax.jit(
    algorithm.round, donate_argnums=0, out_shardings=(placement, None)
  )
  evaluate, export = _results(task, algorithm, privacy, key)
  gate = fidelity.Gate(tqdm.tqdm.write)

  def init():
    return jax.device_put(algorithm.init(task.trainable), placement)

  def advance(state, cohort):
    state, metrics = compiled(state, task.frozen, examples, cohort, key)
    return state, jax.device_get(metrics)

  def round_fn(state, number):
    cohort = sample(number)
    # Of a Poisson sample all are wanted, however many they are.
    wanted = len(cohort.clients) if sampling == "poisson" else clients_per_round
    state, metrics, outcome, seconds = links.round(
      advance, state, cohort, round_number=number, wanted=wanted
    )
    diverged = outcome.answered & ~metrics["finite"]
    _check_finite(task, number, cohort.clients[diverged])
    line: dict[str, Any] = outcome.sent(metrics, _trained_entries(state))
    line["tokens"] = metrics["tokens"]
    if outcome.answered.any():
      named = ("train_loss", "update_cosine", "innovation_cosine")
      line |= {name: metrics[name] for name in named if name in metrics}
      if outcome.answered.sum() < 2:
        line.pop("innovation_cosine", None)  # Of one client there is none.
      gate.see(line.get("innovation_cosine"))
    else:
      # A private mean must not show it, so the server steps on the noise.
      is_noisy = algorithm.noise_multiplier is not None
      tqdm.tqdm.write(
        f"round {number + 1}: none of {outcome.selected.sum()} selected clients"
        f" answered; {'there is only noise' if is_noisy else 'it is skipped'}."
      )
    if observe:
      observe(number, outcome.cohort(cohort), metrics)
    if network:
      line["selected"] = outcome.selected.sum()
      line["answered"] = outcome.answered.sum()
      line["simulated_seconds"] = seconds
    return state, line

  return runner.Experiment(
    rounds=rounds,
    init=init,
    round=round_fn,
    evaluate=evaluate,
    export=export,
    data=task.data,
    population=task.population,
    evaluate_every=evaluate_every,
    checkpoint_every=checkpoint_every,
  )


def _check(task, links, privacy, sampling, clients_per_round, local_epochs):
  """Refuses what cannot be sampled, or not as privacy is accounted for."""
  population = len(task.population.names)
  if links.over_selection > 1:
    # Whose answer counts would depend on who else is there.
    if sampling == "poisson" or isinstance(privacy, guarantees.ClientLevel):
      raise ValueError(
        "expected over_selection=1 with Poisson sampling or privacy of clients,"
        f" got {links.over_selection}."
      )
    if (selected := links.selected(clients_per_round)) > population:
      raise ValueError(
        f"expected to select at most {population} clients, all there are, got"
        f" {selected}: {clients_per_round=} over-selected"
        f" {links.over_selection} times."
      )
  if privacy:
    privacy.check(sampling, clients_per_round, population, local_epochs)


def _check_noise(algorithm, privacy):
  """Refuses privacy of clients that the algorithm does not provide."""
  if not isinstance(privacy, guarantees.ClientLevel):
    return
  got = algorithm.noise_multiplier
  if got is None or got < privacy.noise_multiplier:
    raise ValueError(
      f"expected an algorithm with noise_multiplier={privacy.noise_multiplier},"
      f" for which its privacy is accounted, got {got}. Make it with such a"
      " mechanisms.private_mean as its `aggregate`, if it tells its"
      " noise_multiplier."
    )


def _check_finite(task, number, diverged):
  if diverged.size:
    names = ", ".join(task.population.names[client] for client in diverged)
    raise FloatingPointError(
      f"round {number + 1}: the update of {names} is not finite and was not"
      " sent. Lower client_learning_rate; the last checkpoint is kept."
    )


def _trained_entries(state: Any) -> int:
  """How many numbers are trained: of a method on a part of them, its part."""
  while hasattr(state, "inner"):
    state = state.inner
  return sum(x.size for x in jax.tree.leaves(state.trainable))


def _results(task, algorithm, privacy, key):
  """What measures a state, and what exports it."""
  received = jax.jit(algorithm.received)
  residual_of = algorithm.residual or (lambda state: None)

  def evaluate(state):
    sent, kept = received(state, key), state.trainable
    residual = residual_of(state)
    frozen = (
      task.frozen if residual is None else lora.add(task.frozen, residual)
    )
    result = task.evaluate(sent, frozen)
    same = jax.tree.all(jax.tree.map(np.array_equal, sent, kept))
    server = result if same else task.evaluate(kept, frozen)
    result |= {f"server_{name}": x for name, x in server.items()}
    done = int(state.round)
    if privacy and done and math.isfinite(privacy.epsilon(done)):
      result["epsilon"] = privacy.epsilon(done)
    return result

  def export(state, folder):
    trained, residual = received(state, key), residual_of(state)
    task.save_adapter(trained, folder / "adapter", residual=residual)
    if privacy:
      described = privacy.describe(int(state.round))
      print(described)
      (folder / "privacy.txt").write_text(described + "\n")

  return evaluate, export
