"""Studies: runs over methods and seeds, summed up by mean and deviation.

A study is a file of JSON lines, one a run: `cell`, what tells the run from
others, and `lines`, those of its `metrics.jsonl`, where one may stand for all
rounds up to an evaluation. Runs that differ in their seed alone are one entry
of the tables and plots.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_llm.reporting import runs as report

_MEGA = 1e6
REFERENCE = "dense"


@dataclasses.dataclass(frozen=True)
class Entry:
  """The runs of one method and its settings, one for each seed.

  Attributes:
    method: its name.
    cell: the settings without the seed.
    runs: of all seeds, evaluated after the same rounds.
  """

  method: str
  cell: dict[str, Any]
  runs: tuple[report.Run, ...]

  def label(self, shown: Sequence[str]) -> str:
    """The method, with the settings `shown`."""
    settings = [
      f"{name} {short(self.cell[name])}" for name in shown if name in self.cell
    ]
    return ", ".join([self.method, *settings])

  def final(self, metric: str) -> np.ndarray:
    """The metric at the end, of every seed."""
    return np.array([run.evaluated[-1][metric] for run in self.runs])

  def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Megabytes sent by each evaluation but the first, and the mean metric."""
    lines = [run.evaluated[1:] for run in self.runs]
    sent = [
      [run.megabytes(line["round"]) for line in evaluated]
      for run, evaluated in zip(self.runs, lines, strict=True)
    ]
    values = [[line[metric] for line in evaluated] for evaluated in lines]
    return np.mean(sent, axis=0), np.mean(values, axis=0)

  def megabytes(self, rounds: int | None = None) -> float:
    """Megabytes sent both ways in the first `rounds` rounds, or all."""
    return float(np.mean([run.megabytes(rounds) for run in self.runs]))

  def megabytes_up(self, rounds: int | None = None) -> float:
    """Megabytes of uploads in the first `rounds` rounds, or all."""
    return float(np.mean([run.megabytes_up(rounds) for run in self.runs]))

  def seconds(self, rounds: int | None = None) -> float:
    """Simulated seconds of the first `rounds` rounds, or all; 0 if none."""
    totals = [run.total("simulated_seconds", rounds) for run in self.runs]
    return float(np.mean(totals))

  def as_papers_count(self, rounds: int | None = None) -> dict[str, float]:
    """Megabytes by each of `runs.conventions`, mean of the seeds."""
    lines = [[x for x in run.lines if _is_by(x, rounds)] for run in self.runs]
    counted = [
      report.conventions(dataclasses.replace(run, lines=kept))
      for run, kept in zip(self.runs, lines, strict=True)
    ]
    names = counted[0]
    return {x: float(np.mean([c[x] for c in counted])) / _MEGA for x in names}


def is_study(path: str | os.PathLike) -> bool:
  """Whether a path is of a study, and not of a run."""
  return pathlib.Path(path).suffix == ".jsonl"


def load(path: str | os.PathLike) -> list[Entry]:
  """The entries of a study: methods as first met, the costly settings first.

  Raises:
    ValueError: if there is no run in it.
  """
  path = pathlib.Path(path)
  records = [json.loads(line) for line in path.read_text().splitlines()]
  if not records:
    raise ValueError(f"expected runs in {path}, found none.")
  entries: dict[str, list[tuple[int, dict[str, Any], report.Run]]] = {}
  for record in records:
    cell = dict(record["cell"])
    seed = cell.pop("seed")
    cell |= dict(cell.pop("knobs", ()))
    run = report.Run(cell["method"], path, record, record["lines"])
    entries.setdefault(json.dumps(cell), []).append((seed, cell, run))
  found = []
  for several in entries.values():
    several.sort(key=lambda x: x[0])
    _, cell, _ = several[0]
    found.append(Entry(cell["method"], cell, tuple(x[2] for x in several)))
  methods = list(dict.fromkeys(entry.method for entry in found))
  settings = lambda cell: [-cell[x] for x in ("rank", "density")]
  place = lambda x: (methods.index(x.method), *settings(x.cell))
  return sorted(found, key=place)


def metric_of(entry: Entry) -> tuple[str, bool]:
  """The metric that tells the utility of a task, and whether more is better."""
  last = entry.runs[0].evaluated[-1]
  return ("loss", False) if "perplexity" in last else ("accuracy", True)


def reference_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
  """The dense entry of the same task, the highest rank and the fewest knobs.

  Of several, the longest that is not longer than `entry`, or the shortest.
  """
  ignored = {"method", "density", "rank", "rounds"}
  ignored |= {"client_rate", "server_rate"}
  of = lambda cell: {x: cell[x] for x in cell if x not in ignored}
  alike = [
    x
    for x in entries
    if x.method == REFERENCE and of(x.cell).items() <= of(entry.cell).items()
  ]

  def preference(dense):
    rounds, most = dense.cell["rounds"], entry.cell["rounds"]
    length = (1, rounds) if rounds <= most else (0, -rounds)
    return dense.cell["rank"], -len(dense.cell), length

  return max(alike, key=preference, default=None)


def target_of(reference: Entry, metric: str, higher: bool) -> float:
  """The utility that is one standard deviation worse than the reference's."""
  final = reference.final(metric)
  return final.mean() - (1 if higher else -1) * deviation(final)


def rounds_to(
  entry: Entry, target: float, metric: str, higher: bool
) -> int | None:
  """The round after which the mean was first seen to meet a target, or None."""
  _, values = entry.curve(metric)
  met = np.flatnonzero(values >= target if higher else values <= target)
  evaluated = entry.runs[0].evaluated[1:]
  return evaluated[met[0]]["round"] if met.size else None


def is_of_uploads(entries: Sequence[Entry]) -> bool:
  """Whether downloads are alike, so that entries differ in uploads alone."""
  down = [
    (entry.megabytes() - entry.megabytes_up()) / entry.cell["rounds"]
    for entry in entries
  ]
  return len(entries) > 1 and max(down) <= 1.01 * min(down)


def shown(entries: Sequence[Entry]) -> list[str]:
  """The settings in which the entries differ, for labels and columns.

  Learning rates only where nothing else tells two entries apart.
  """
  names = dict.fromkeys(name for entry in entries for name in entry.cell)
  hidden = {"method", "client_rate", "server_rate", "validation"}
  differs = lambda name: len({str(x.cell.get(name)) for x in entries}) > 1
  found = [name for name in names if name not in hidden and differs(name)]
  told = lambda: {x.label(found) for x in entries}
  for name in ("server_rate", "client_rate"):
    if len(told()) < len(entries) and differs(name):
      found.append(name)
  return found


def cost_to(
  entry: Entry, levels: np.ndarray, cost: Callable[[int], float]
) -> np.ndarray:
  """What it cost until the mean over seeds first met each utility level.

  Linear between evaluations; NaN where it was never met.

  Args:
    entry: of which method.
    levels: of its metric.
    cost: of so many rounds, such as `entry.megabytes` or `entry.seconds`.
  """
  metric, higher = metric_of(entry)
  sign = 1 if higher else -1
  spent = [cost(line["round"]) for line in entry.runs[0].evaluated]
  values = [[x[metric] for x in run.evaluated] for run in entry.runs]
  best = np.maximum.accumulate(sign * np.mean(values, axis=0))
  levels = sign * np.asarray(levels)
  # Between what was better first and what was seen before it.
  first = np.searchsorted(best, levels)
  around = [slice(max(i - 1, 0), i + 1) for i in first]
  return np.array(
    [
      np.interp(level, best[pair], spent[pair], right=np.nan)
      for level, pair in zip(levels, around, strict=True)
    ]
  )


def ratios(
  entries: Sequence[Entry], cost: Callable[[Entry, int], float]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """How many times less than dense LoRA a method cost at each utility.

  Args:
    entries: of one task, with a reference.
    cost: of an entry's first rounds, such as `Entry.megabytes`.

  Returns:
    The levels that the dense runs of the reference's rank passed, in ascending
    order, and by method the ratios there, at the best of its settings; NaN
    where it never was.
  """
  metric, higher = metric_of(entries[0])
  first = reference_of(entries[0], entries)
  if first is None:
    raise ValueError(f"ratios expected entries of {REFERENCE}, found none.")
  references = [
    entry
    for entry in entries
    if reference_of(entry, entries) is entry
    and entry.cell["rank"] == first.cell["rank"]
  ]
  levels = np.unique(np.concatenate([x.curve(metric)[1] for x in references]))
  # What the untrained model has already would cost nothing.
  start = first.runs[0].evaluated[0][metric]
  levels = levels[levels > start] if higher else levels[levels < start]
  least = lambda several: np.fmin.reduce(
    [cost_to(x, levels, functools.partial(cost, x)) for x in several]
  )
  dense = least(references)
  methods = dict.fromkeys(entry.method for entry in entries)
  of = lambda method: [x for x in entries if x.method == method]
  return levels, {method: dense / least(of(method)) for method in methods}


def _is_by(line, rounds):
  return rounds is None or line["round"] <= rounds


def deviation(values: np.ndarray) -> float:
  """The standard deviation over seeds, by n - 1; 0 of one seed."""
  return float(values.std(ddof=1)) if values.size > 1 else 0.0


def short(value: Any) -> str:
  """A density such as 1/16 as that."""
  if isinstance(value, float) and 0 < value < 1 and (1 / value).is_integer():
    return f"1/{round(1 / value)}"
  return f"{value:g}" if isinstance(value, float) else str(value)
