"""Studies: runs over methods and seeds, with means and standard deviations.

A study is a file of JSON lines, one for each run. `cell` has the method, the
settings and the seed of the run. `lines` has the lines of its `metrics.jsonl`;
one line may sum up all rounds before an evaluation. Runs that differ only in
the seed form one entry of tables and plots.
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
  """The runs of one method with the same settings, one for each seed.

  Attributes:
    method: the name of the method.
    cell: the settings without the seed.
    runs: the runs of all seeds, evaluated after the same rounds.
  """

  method: str
  cell: dict[str, Any]
  runs: tuple[report.Run, ...]

  def label(self, shown: Sequence[str]) -> str:
    """Returns the name of the method and the settings named in `shown`."""
    settings = [
      f"{name} {short(self.cell[name])}" for name in shown if name in self.cell
    ]
    return ", ".join([self.method, *settings])

  def final(self, metric: str) -> np.ndarray:
    """Returns the metric of each seed at the last evaluation."""
    return np.array([run.evaluated[-1][metric] for run in self.runs])

  def curve(self, metric: str) -> np.ndarray:
    """Returns the mean of a metric over seeds at each evaluation."""
    values = [[line[metric] for line in run.evaluated] for run in self.runs]
    return np.mean(values, axis=0)

  def megabytes(self, rounds: int | None = None) -> float:
    """Returns megabytes received and sent in the first rounds, or in all."""
    return float(np.mean([run.megabytes(rounds) for run in self.runs]))

  def megabytes_up(self, rounds: int | None = None) -> float:
    """Returns megabytes of uploads in the first `rounds` rounds, or in all."""
    return float(np.mean([run.megabytes_up(rounds) for run in self.runs]))

  def seconds(self, rounds: int | None = None) -> float:
    """Returns simulated seconds of the first `rounds` rounds, or of all.

    The result is 0 if the runs had no network.
    """
    totals = [run.total("simulated_seconds", rounds) for run in self.runs]
    return float(np.mean(totals))

  def as_papers_count(self, rounds: int | None = None) -> dict[str, float]:
    """Returns the mean megabytes by each of `runs.conventions`."""
    counted = [report.conventions(run, rounds) for run in self.runs]
    names = counted[0]
    return {x: float(np.mean([c[x] for c in counted])) / _MEGA for x in names}


def is_study(path: str | os.PathLike) -> bool:
  """Returns whether a path is the file of a study, not the folder of a run."""
  return pathlib.Path(path).suffix == ".jsonl"


def load(path: str | os.PathLike) -> list[Entry]:
  """Loads the entries of a study.

  Methods keep the order of the file. The entries of a method are sorted by rank
  and density, the largest first.

  Raises:
    ValueError: if the file has no run.
  """
  path = pathlib.Path(path)
  records = [json.loads(line) for line in path.read_text().splitlines()]
  if not records:
    raise ValueError(
      f"expected runs in {path}, found none. Give the file of a study."
    )
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
  """Returns the metric of a task, and whether a higher value is better."""
  last = entry.runs[0].evaluated[-1]
  return ("loss", False) if "perplexity" in last else ("accuracy", True)


def reference_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
  """Returns the dense entry to compare an entry with, or None.

  It has the same task, the highest rank and the fewest knobs. Among several, it
  is the longest one that is not longer than `entry`, or else the shortest one.
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
  """Returns the reference's mean metric, made worse by one deviation."""
  final = reference.final(metric)
  return final.mean() - (1 if higher else -1) * deviation(final)


def rounds_to(
  entry: Entry, target: float, metric: str, higher: bool
) -> int | None:
  """Returns the round of the first evaluation whose mean meets a target.

  Returns None if there is none.
  """
  values = entry.curve(metric)[1:]
  met = np.flatnonzero(values >= target if higher else values <= target)
  evaluated = entry.runs[0].evaluated[1:]
  return evaluated[met[0]]["round"] if met.size else None


def is_of_uploads(entries: Sequence[Entry]) -> bool:
  """Returns whether the entries download the same, and differ only in uploads.

  The bytes that they download in a round may differ by 1%.
  """
  down = [
    (entry.megabytes() - entry.megabytes_up()) / entry.cell["rounds"]
    for entry in entries
  ]
  return len(entries) > 1 and max(down) <= 1.01 * min(down)


def shown(entries: Sequence[Entry]) -> list[str]:
  """Returns the names of the settings that differ, for labels and columns.

  Learning rates are included only if two entries differ in nothing else.
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
  """Returns the cost until the mean over seeds first met each level.

  The cost is interpolated linearly between evaluations. It is NaN for a level
  that was never met.

  Args:
    entry: the entry.
    levels: the levels of its metric.
    cost: function from a number of rounds to the cost of the first ones, such
      as `entry.megabytes` or `entry.seconds`.
  """
  metric, higher = metric_of(entry)
  sign = 1 if higher else -1
  spent = [cost(line["round"]) for line in entry.runs[0].evaluated]
  best = np.maximum.accumulate(sign * entry.curve(metric))
  levels = sign * np.asarray(levels)
  # Interpolates between the first evaluation that is better and the one before.
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
  """Returns the cost of dense LoRA divided by that of each method.

  Args:
    entries: the entries of one task, including a reference.
    cost: function from an entry and a number of rounds to their cost, such as
      `Entry.megabytes`.

  Returns:
    The levels of the metric that dense runs of the reference's rank reached, in
    ascending order; and the ratios at these levels, by method. A ratio uses the
    method's cheapest setting, and is NaN if the method never met the level.

  Raises:
    ValueError: if there is no reference.
  """
  metric, higher = metric_of(entries[0])
  first = reference_of(entries[0], entries)
  if first is None:
    raise ValueError(
      f"ratios expected entries of {REFERENCE}, found none. Add runs of it."
    )
  references = [
    entry
    for entry in entries
    if reference_of(entry, entries) is entry
    and entry.cell["rank"] == first.cell["rank"]
  ]
  curves = [entry.curve(metric) for entry in references]
  levels = np.unique(np.concatenate([curve[1:] for curve in curves]))
  # Levels that the untrained model meets cost nothing.
  start = first.runs[0].evaluated[0][metric]
  levels = levels[levels > start] if higher else levels[levels < start]
  least = lambda several: np.fmin.reduce(
    [cost_to(x, levels, functools.partial(cost, x)) for x in several]
  )
  dense = least(references)
  methods = dict.fromkeys(entry.method for entry in entries)
  of = lambda method: [x for x in entries if x.method == method]
  return levels, {method: dense / least(of(method)) for method in methods}


def deviation(values: np.ndarray) -> float:
  """Returns the sample standard deviation over seeds; 0 for one seed."""
  return float(values.std(ddof=1)) if values.size > 1 else 0.0


def short(value: Any) -> str:
  """Returns a short text of a value; a density of 0.0625 becomes "1/16"."""
  if isinstance(value, float) and 0 < value < 1 and (1 / value).is_integer():
    return f"1/{round(1 / value)}"
  return f"{value:g}" if isinstance(value, float) else str(value)
