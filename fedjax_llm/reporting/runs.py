"""Tables and plots of finished runs: utility against bytes and time.

Bytes are the lengths of the real messages. `conventions` counts bytes by the
formulas of papers instead, for comparison.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import tabulate

from fedjax_llm.experiments import run_folder
from fedjax_llm.reporting import panels

_MEGA = 1e6
_HIGHER_IS_BETTER = {"loss": False, "perplexity": False, "accuracy": True}


@dataclasses.dataclass(frozen=True)
class Run:
  """The content of a run folder.

  Attributes:
    name: the name of the experiment.
    folder: the run folder.
    record: the content of `run.json`.
    lines: the lines of `metrics.jsonl`; the first is from before training.
  """

  name: str
  folder: pathlib.Path
  record: dict[str, Any]
  lines: list[dict[str, Any]]

  @property
  def evaluated(self) -> list[dict[str, Any]]:
    """The lines that have an evaluation."""
    return [line for line in self.lines if "loss" in line]

  def lines_to(self, rounds: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines of the first `rounds` rounds, or all."""
    return [x for x in self.lines if rounds is None or x["round"] <= rounds]

  def total(self, name: str, rounds: int | None = None) -> float:
    """Returns the sum of a metric over the first `rounds` rounds, or all."""
    return sum(line.get(name, 0) for line in self.lines_to(rounds))

  def megabytes(self, rounds: int | None = None) -> float:
    """Returns the megabytes that all clients received and sent."""
    sent = self.total("download_bytes", rounds) / _MEGA
    return sent + self.megabytes_up(rounds)

  def megabytes_up(self, rounds: int | None = None) -> float:
    """Returns the megabytes of all uploads."""
    return self.total("upload_bytes", rounds) / _MEGA


def load(folder: str | os.PathLike) -> list[Run]:
  """Loads the run in `folder`, or the runs in its subfolders.

  Raises:
    ValueError: if there is no run, or a run has no finished round.
  """
  folder = pathlib.Path(folder)
  folders = [folder, *sorted(x for x in folder.glob("*") if x.is_dir())]
  found = [x for x in folders if (x / "run.json").is_file()]
  if not found:
    raise ValueError(
      f"expected a run folder, with a run.json, at {folder} or in it, got none."
      " Give the folder that `fedjax-llm run` wrote."
    )
  runs = []
  for path in found:
    record = json.loads((path / "run.json").read_text())
    lines = run_folder.read_metrics(path / "metrics.jsonl")
    if len(lines) < 2:
      raise ValueError(
        f"expected a finished round in {path}, got none. Wait for the first."
      )
    runs.append(Run(record["experiment"], path.resolve(), record, lines))
  return runs


def conventions(run: Run, rounds: int | None = None) -> dict[str, float]:
  """Returns the bytes of a run in both directions, as papers count them.

  A message with fewer numbers than there are trainable entries counts as
  sparse, even if both ends know the positions and it does not contain them.

  Args:
    run: the run.
    rounds: the number of its first rounds to count; None for all.

  Returns:
    `values`: 4 bytes for each number. `bitmap`: the same, plus one bit for each
    trainable entry in a sparse message. `COO`: the same as `values`, plus 4
    bytes for the position of each number in a sparse message. Empty if the run
    did not record these numbers.
  """
  lines = [x for x in run.lines_to(rounds) if "trainable" in x]
  if not lines:
    return {}
  total = functools.partial(run.total, rounds=rounds)
  values = 4 * (total("download_entries") + total("upload_entries"))
  bits = sum(x["sparse_messages"] * x["trainable"] for x in lines)
  return {
    "values": values,
    "bitmap": values + bits / 8,
    "COO": values + 4 * total("sparse_entries"),
  }


def bytes_to(run: Run, target: float, metric: str = "loss") -> int | None:
  """Returns the bytes in both directions until a target was met.

  It counts bytes up to the first evaluation that meets the target. Nothing is
  interpolated, so compare only runs that are evaluated equally often.

  Args:
    run: the run.
    target: value of the metric on held-out rows.
    metric: "accuracy", or "loss" or "perplexity", where lower is better.

  Returns:
    The bytes of all clients, or None if the target was never met.

  Raises:
    ValueError: if the metric is unknown.
  """
  rounds = _rounds_to(run, target, metric)
  if rounds is None:
    return None
  sent = (run.total(f"{x}_bytes", rounds) for x in ("download", "upload"))
  return int(sum(sent))


def seconds_to(run: Run, target: float, metric: str = "loss") -> float | None:
  """Returns the simulated seconds until a target was met; see `bytes_to`.

  Returns None if the target was never met or the run had no network.
  """
  rounds = _rounds_to(run, target, metric)
  if rounds is None or not any("simulated_seconds" in x for x in run.lines):
    return None
  return run.total("simulated_seconds", rounds)


def _rounds_to(run: Run, target: float, metric: str) -> int | None:
  """Returns the round of the first evaluation that meets a target."""
  if metric not in _HIGHER_IS_BETTER:
    raise ValueError(
      f"expected metric in {', '.join(_HIGHER_IS_BETTER)}, got {metric=}."
    )
  sign = 1 if _HIGHER_IS_BETTER[metric] else -1
  for line in run.evaluated:
    if metric in line and sign * line[metric] >= sign * target:
      return line["round"]
  return None


def table(
  runs: Sequence[Run],
  *,
  targets: Mapping[str, float] | None = None,
  papers: bool = False,
) -> str:
  """Returns a Markdown table: utility before and after, bytes, seconds.

  Args:
    runs: the runs, one for each row.
    targets: targets by metric, or None. They add the bytes and seconds until
      each target was met.
    papers: whether to add bytes by the `conventions` of papers.
  """
  rows = [
    {
      "run": label,
      "rounds": run.lines[-1]["round"],
      "held-out loss": _change(run, "loss", ".3f"),
      "perplexity": _change(run, "perplexity", ".2f"),
      "accuracy": _change(run, "accuracy", ".1%"),
      "MB down": run.total("download_bytes") / _MEGA,
      "MB up": run.total("upload_bytes") / _MEGA,
      "MB total": run.megabytes(),
      **(_of_papers(run) if papers else {}),
      "seconds": run.total("seconds"),
      **_availability(run),
      **_until(run, targets or {}),
    }
    for label, run in zip(_labels(runs), runs, strict=True)
  ]
  # Drops empty columns: classifiers have no perplexity, most runs no network.
  empty = {x for x in rows[0] if all(row[x] == "" for row in rows)}
  rows = [{x: row[x] for x in row if x not in empty} for row in rows]
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", floatfmt=".1f"
  )


def _change(run: Run, name: str, form: str) -> str:
  before, after = run.evaluated[0].get(name), run.evaluated[-1].get(name)
  return "" if after is None else f"{before:{form}} → {after:{form}}"


def _of_papers(run: Run) -> dict[str, Any]:
  counted = conventions(run)
  titles = {"values": "values only", "bitmap": "+ bitmap", "COO": "+ COO"}
  return {f"MB, {title}": _mega(counted.get(x)) for x, title in titles.items()}


def _availability(run: Run) -> dict[str, Any]:
  """Returns the columns of network and privacy for a run's row."""
  selected = run.total("selected")
  answered = run.total("answered") / selected if selected else None
  is_simulated = any("simulated_seconds" in line for line in run.lines)
  return {
    "answered": "" if answered is None else f"{answered:.1%}",
    "simulated seconds": (
      run.total("simulated_seconds") if is_simulated else ""
    ),
    "epsilon": run.evaluated[-1].get("epsilon", ""),
  }


def _until(run: Run, targets: Mapping[str, float]) -> dict[str, Any]:
  columns: dict[str, Any] = {}
  for metric, target in targets.items():
    goal = f"to {metric} {target:g}"
    sent = bytes_to(run, target, metric)
    seconds = seconds_to(run, target, metric)
    columns[f"MB {goal}"] = "not met" if sent is None else _mega(sent)
    columns[f"simulated seconds {goal}"] = "" if seconds is None else seconds
  return columns


def _mega(count: float | None) -> str:
  return "" if count is None else f"{count / _MEGA:.1f}"


def _labels(runs: Sequence[Run]) -> list[str]:
  """Returns the names of runs; for a repeated name, the end of its path."""
  times = collections.Counter(run.name for run in runs)
  alike = [run.folder.parts for run in runs if times[run.name] > 1]
  parts = 1
  while len({x[-parts:] for x in alike}) < len(set(alike)):
    parts += 1
  return [
    "/".join(run.folder.parts[-parts:]) if times[run.name] > 1 else run.name
    for run in runs
  ]


def plot(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Draws held-out loss against megabytes sent, with a curve for each run.

  If nothing was sent, as in pre-training, the loss is drawn against rounds.
  Each curve has its name at its end.
  """
  figure = matplotlib.figure.Figure((panels.WIDTH, 4.5), layout="constrained")
  axes = figure.subplots()
  sent = any(run.megabytes() for run in runs)
  ends, colours, places = {}, {}, []
  for label, run in zip(_labels(runs), runs, strict=True):
    # The first point has sent nothing; a logarithmic axis has no place for it.
    points = [line for line in run.evaluated if line["round"] > 0]
    rounds = [line["round"] for line in points]
    at = [run.megabytes(x) for x in rounds] if sent else rounds
    losses = [line["loss"] for line in points]
    (line,) = axes.plot(at, losses, marker="o", markersize=4)
    ends[label], colours[label] = (at[-1], losses[-1]), line.get_color()
    places += at
  for loss in sorted({run.evaluated[0]["loss"] for run in runs}):
    axes.axhline(loss, color="gray", linestyle=":", linewidth=1)
    axes.annotate(
      "before fine-tuning",
      (0.01, loss),
      xycoords=("axes fraction", "data"),
      va="bottom",
      fontsize="small",
      color="gray",
    )
  axes.margins(y=0.1)
  panels.logarithmic(axes, "x", places)
  axes.set_xlabel(
    "megabytes sent, both directions, all clients" if sent else "round"
  )
  per = any("perplexity" in line for run in runs for line in run.evaluated)
  axes.set_ylabel(f"held-out loss (nats{' per token' if per else ''})")
  axes.grid(alpha=0.3)
  panels.name_ends(axes, ends, colours)
  figure.savefig(path, dpi=150)
