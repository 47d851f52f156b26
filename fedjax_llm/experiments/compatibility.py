"""Checks that a task, an algorithm, a schedule and a guarantee fit."""

from typing import Any

from fedjax_llm.experiments import tasks
from fedjax_llm.federated import network as networks
from fedjax_llm.federated import rounds
from fedjax_llm.federated.privacy import guarantees


def check(
  task: tasks.Task,
  algorithm: rounds.FederatedAlgorithm,
  schedule: Any,
  links: networks.Network,
  privacy: guarantees.Guarantee | None,
) -> None:
  """Raises an error if the run is impossible or breaks its privacy guarantee.

  Raises:
    ValueError: for the reasons that `finetuning.fine_tuning` lists.
  """
  for name, value, kind in (
    ("task", task, tasks.Task),
    ("algorithm", algorithm, rounds.FederatedAlgorithm),
  ):
    if not isinstance(value, kind):
      raise ValueError(
        "fine_tuning expected (task, algorithm, schedule), got a"
        f" {type(value).__name__} as {name}."
      )
  population = len(task.population.names)
  if algorithm.placement not in (None, task.placement):
    raise ValueError(
      f"expected an algorithm for the task's {task.placement}, got one for"
      f" {algorithm.placement}. Make it with placement=task.placement."
    )
  if algorithm.population not in (None, population):
    raise ValueError(
      f"expected an algorithm for the {population} clients of the task, got one"
      f" for {algorithm.population}. Make it with"
      " population=len(task.population.names)."
    )
  wanted, sampling = schedule.clients_per_round, schedule.sampling
  if links.over_selection > 1:
    # Which answers count would depend on the other clients of the round.
    if sampling == "poisson" or isinstance(privacy, guarantees.ClientLevel):
      raise ValueError(
        "expected over_selection=1 with Poisson sampling or privacy of clients,"
        f" got {links.over_selection}."
      )
    if (selected := links.selected(wanted)) > population:
      raise ValueError(
        f"expected to select at most {population} clients, the population, got"
        f" {selected}: clients_per_round={wanted} over-selected"
        f" {links.over_selection} times."
      )
  if privacy is not None:
    _check_noise(algorithm, privacy)
    privacy.check(sampling, wanted, population, schedule.local_epochs)


# By guarantee: the field of an algorithm with the noise, and the remedy.
_NOISE = {
  guarantees.ClientLevel: (
    "noise_multiplier",
    "give it a fl.privacy.private_mean as its `aggregate`",
  ),
  guarantees.ExampleLevel: (
    "example_noise_multiplier",
    "compose it by fl.federated_round of a fl.privacy.dp_sgd.local_update",
  ),
}


def _check_noise(algorithm, privacy):
  """Raises an error if the algorithm lacks the noise of the guarantee."""
  if type(privacy) not in _NOISE:
    raise ValueError(
      "expected privacy to be a ClientLevel or an ExampleLevel, whose noise can"
      f" be checked, got a {type(privacy).__name__}."
    )
  name, remedy = _NOISE[type(privacy)]
  got, expected = getattr(algorithm, name), privacy.noise_multiplier
  if got is None or got < expected:
    raise ValueError(
      f"{type(privacy).__name__} is accounted for noise_multiplier={expected},"
      f" but the algorithm's {name} is {got}: expected an algorithm with that"
      f" much noise. To make one, {remedy}."
    )
