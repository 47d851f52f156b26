"""Densities: which share of a vector is sent, the same always or by rounds.

The size of a message is static, so every density is a stage of
`schedules.staged` and a compiled branch: let them be few.
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
  """The densities `start * decay ** (round // every)`, but at least `floor`.

  Args:
    start: of the first rounds, in (0, 1].
    decay: what a density is of the one before it, in (0, 1]; 1 for none.
    every: for how many rounds each density holds, at least 1.
    rounds: how many rounds there will be, at least 1; later ones keep the last
      density.
    floor: the last density, in [0, 1].

  Returns:
    Densities by the round they begin with, at most `ceil(rounds / every)`.

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
  """The densities that hold together, by the round they begin with.

  Raises:
    ValueError: if a schedule says nothing of round 0.
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
