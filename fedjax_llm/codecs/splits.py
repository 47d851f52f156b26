"""Which recorded updates a codec is fitted to, and which ones judge it.

Those of the last rounds judge, as it will be used on rounds that come after.
"""

import math
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
  """Which snapshots are for what, and what is known of those to fit to.

  Attributes:
    train: int [count], snapshots to fit to.
    held_out: of each round that is not fitted to, its snapshots: two or more.
    mean: float32 [n], of those to fit to.
    energy: float64 [n], the mean square of these.
  """

  train: np.ndarray
  held_out: list[np.ndarray]
  mean: np.ndarray
  energy: np.ndarray

  @property
  def scale(self) -> float:
    """The root mean square of all entries of the snapshots to fit to."""
    return math.sqrt(self.energy.mean())


def split(
  snapshots: np.ndarray,
  rounds: np.ndarray | None = None,
  *,
  held_out: float = 0.2,
) -> Split:
  """Holds out the last rounds.

  Args:
    snapshots: float32 [count, n], in the order of time; may be memory-mapped.
    rounds: int [count], the round of each; None if unknown.
    held_out: share of the rounds.

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
      f"fit expected a snapshot to fit to and two to hold out, got"
      f" {len(snapshots)} of {len(each)} rounds. Record more rounds."
    )
  total, energy = np.zeros((2, snapshots.shape[1]))
  for number in train:
    total += snapshots[number]
    energy += np.square(snapshots[number], dtype=np.float64)
  mean = (total / len(train)).astype(np.float32)
  return Split(train, groups, mean, energy / len(train))
