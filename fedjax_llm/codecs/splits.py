"""Splits recorded updates: some fit a codec, the others evaluate it.

The last rounds evaluate it, because a codec is used in rounds after those that
it was fitted to.
"""

import math
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
  """The snapshots to fit to, their moments, and the held-out snapshots.

  Attributes:
    train: indices of the snapshots to fit to, int [count].
    held_out: for each held-out round, the indices of its snapshots, two or
      more.
    mean: mean of the snapshots to fit to, float32 [n].
    energy: mean square of each entry over these snapshots, float64 [n].
  """

  train: np.ndarray
  held_out: list[np.ndarray]
  mean: np.ndarray
  energy: np.ndarray

  @property
  def scale(self) -> float:
    """Root mean square of all entries of the snapshots to fit to."""
    return math.sqrt(self.energy.mean())


def split(
  snapshots: np.ndarray,
  rounds: np.ndarray | None = None,
  *,
  held_out: float = 0.2,
) -> Split:
  """Holds out the last rounds.

  Args:
    snapshots: recorded vectors in the order of time, float32 [count, n]; may be
      memory-mapped.
    rounds: round of each snapshot, int [count]. If None, each snapshot counts
      as a round.
    held_out: fraction of the rounds to hold out, in (0, 1).

  Returns:
    The split. If a held-out round has fewer than two snapshots, `held_out` has
    one group with the snapshots of all held-out rounds.

  Raises:
    ValueError: if `held_out` is not in (0, 1), or there are too few snapshots.
  """
  if not 0 < held_out < 1:
    raise ValueError(f"fit expected held_out in (0, 1), got {held_out=}.")
  numbers = np.arange(len(snapshots)) if rounds is None else np.asarray(rounds)
  each = np.unique(numbers)
  last = each[len(each) - math.ceil(held_out * len(each)) :]
  is_last = np.isin(numbers, last)
  train = np.flatnonzero(~is_last)
  groups = [np.flatnonzero(numbers == number) for number in last]
  if any(len(group) < 2 for group in groups):
    groups = [np.flatnonzero(is_last)]
  if len(train) < 1 or len(groups[0]) < 2:
    raise ValueError(
      "fit expected at least one snapshot to fit to and two to hold out, got"
      f" {len(snapshots)} snapshots of {len(each)} rounds. Record more rounds."
    )
  total, energy = np.zeros((2, snapshots.shape[1]))
  for number in train:
    total += snapshots[number]
    energy += np.square(snapshots[number], dtype=np.float64)
  mean = (total / len(train)).astype(np.float32)
  return Split(train, groups, mean, energy / len(train))
