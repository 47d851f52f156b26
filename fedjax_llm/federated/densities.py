"""Densities: the share of a vector that is sent, constant or by rounds.

The size of a message is static, so every density is a stage of
`schedules.staged` and a compiled branch: use only a few.
"""

from collections.abc import Mapping

Density = float | Mapping[int, float]


def decaying(
  start: float,
  decay: float,
  *,
  every: int,
  rounds: int,
  floor: float = 0.0,
) -> dict[int, float]:
  """Returns densities `start * decay ** (round // every)`, at least `floor`.

  Args:
    start: the first density, in (0, 1].
    decay: the ratio of each density to the one before it, in (0, 1]; 1 for no
      decay.
    every: the number of rounds with the same density, at least 1.
    rounds: the number of rounds, at least 1; later ones keep the last density.
    floor: the least density, in [0, 1].

  Returns:
    A dictionary from rounds to the densities that begin there, with at most
    `ceil(rounds / every)` entries.

  Raises:
    ValueError: if an argument is out of range.
  """
  shares = {"start": start, "decay": decay}
  if not all(0 < share <= 1 for share in shares.values()):
    raise ValueError(f"decaying expected shares in (0, 1], got {shares}.")
  if every < 1 or rounds < 1 or not 0 <= floor <= 1:
    raise ValueError(
      "decaying expected every >= 1, rounds >= 1 and floor in [0, 1], got"
      f" {every=}, {rounds=}, {floor=}."
    )
  densities: dict[int, float] = {}
  last = None
  for step, begin in enumerate(range(0, rounds, every)):
    density = max(floor, start * decay**step)
    if density != last:
      densities[begin] = last = density
  return densities


def stages(*densities: Density) -> dict[int, tuple[float, ...]]:
  """Joins schedules into a dictionary from rounds to tuples of densities.

  Raises:
    ValueError: if a schedule has no density for round 0.
  """
  schedules = [x if isinstance(x, Mapping) else {0: x} for x in densities]
  for schedule in schedules:
    if 0 not in schedule or min(schedule) < 0:
      raise ValueError(
        "a schedule of densities expected rounds from 0 on, got"
        f" {sorted(schedule)}."
      )
  at = lambda schedule, begin: schedule[max(x for x in schedule if x <= begin)]
  begins = sorted(set().union(*schedules))
  return {x: tuple(at(each, x) for each in schedules) for x in begins}
