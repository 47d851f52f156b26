"""FLASC-Search: finds a rank and a density with few runs.

Kuo, Raje, Rajesh, Smith, 2024 (arXiv 2406.05233). This is our reading of an
abstract: start from a small rank and density, and keep comparing one
configuration of larger rank with one of larger density. Here both grow by the
same factor, so both configurations send about the same number of entries.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple


class Trial(NamedTuple):
  """A configuration and its result.

  Attributes:
    rank: the rank of the adapters.
    density: the density of the messages.
    utility: the result; larger is better.
    nbytes: the bytes that the run sent.
  """

  rank: int
  density: float
  utility: float
  nbytes: int


class Search(NamedTuple):
  """What a search found.

  Attributes:
    best: the trial of the highest utility within the bounds.
    trials: all trials, in order.
  """

  best: Trial
  trials: tuple[Trial, ...]


def flasc_search(
  measure: Callable[[int, float], tuple[float, int]],
  *,
  rank: int,
  density: float,
  max_rank: int,
  most_bytes: float = float("inf"),
  factor: int = 4,
) -> Search:
  """Grows rank or density, whichever gains more utility per byte.

  Each step measures `(factor * rank, density)` and `(rank, factor * density)`,
  if they are within the bounds. It goes on from the better one: the one that
  gained more utility for each additional byte, or, if neither gained, lost less
  utility. Their bytes are nearly equal; they differ by the supports and by the
  parameters in no LoRA pair.

  Args:
    measure: runs a configuration: (rank, density) -> (utility, bytes sent).
    rank: the first rank, in [1, `max_rank`].
    density: the first density, in (0, 1].
    max_rank: the largest rank.
    most_bytes: the largest number of bytes that a run may send; a configuration
      that sends more is discarded.
    factor: the factor by which rank or density grows, at least 2.

  Raises:
    ValueError: if an argument is out of range, or the first configuration sends
      more than `most_bytes`.
  """
  if not 1 <= rank <= max_rank or not 0 < density <= 1 or factor < 2:
    raise ValueError(
      "flasc_search expected rank in [1, max_rank], density in (0, 1] and"
      f" factor >= 2, got {rank=}, {max_rank=}, {density=}, {factor=}."
    )
  last = Trial(rank, density, *measure(rank, density))
  if last.nbytes > most_bytes:
    raise ValueError(
      f"flasc_search started from a run of {last.nbytes} bytes, which is over"
      f" {most_bytes=}. Start from a smaller rank or density."
    )
  trials, affordable = [last], [last]
  while last:
    pair = (
      (last.rank * factor, last.density),
      (last.rank, last.density * factor),
    )
    within = [x for x in pair if x[0] <= max_rank and x[1] <= 1]
    tried = [Trial(*x, *measure(*x)) for x in within]
    trials += tried
    fitting = [x for x in tried if x.nbytes <= most_bytes]
    affordable += fitting
    worth = functools.partial(_worth, last)
    last = max(fitting, key=worth, default=None)
  best = max(affordable, key=lambda x: (x.utility, -x.nbytes))
  return Search(best, tuple(trials))


def _worth(last, trial):
  """Returns the gain per additional byte; without a gain, the (whole) loss."""
  gain = trial.utility - last.utility
  more = max(1, trial.nbytes - last.nbytes)
  return gain / more if gain > 0 else gain
