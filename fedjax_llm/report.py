"""Tables and plots of finished runs: utility against bytes."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import tabulate

from fedjax_llm import experiment

_MEGA = 1e6


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run folder tells.

  Attributes:
    name: of the experiment.
    folder: where it is.
    record: its `run.json`.
    lines: its `metrics.jsonl`; the first is of the model before training.
  """

  name: str
  folder: pathlib.Path
  record: dict[str, Any]
  lines: list[dict[str, Any]]

  @property
  def evaluated(self) -> list[dict[str, Any]]:
    """The lines that hold an evaluation."""
    return [line for line in self.lines if "loss" in line]

  def total(self, name: str, rounds: int | None = None) -> float:
    """The sum of a metric over the first `rounds` rounds, or all."""
    return sum(
      line.get(name, 0)
      for line in self.lines
      if rounds is None or line["round"] <= rounds
    )

  def megabytes(self, rounds: int | None = None) -> float:
    """Megabytes sent in both directions by all clients."""
    sent = self.total("download_bytes", rounds)
    return (sent + self.total("upload_bytes", rounds)) / _MEGA


def load(folder: str | os.PathLike) -> list[Run]:
  """The run in `folder`, or the runs in its subfolders.

  Raises:
    ValueError: if there is none, or one has no finished round.
  """
  folder = pathlib.Path(folder)
  folders = [folder, *sorted(x for x in folder.glob("*") if x.is_dir())]
  found = [x for x in folders if (x / "run.json").is_file()]
  if not found:
    raise ValueError(
      f"expected a run folder, with a run.json, at {folder} or in it; got none."
    )
  runs = []
  for path in found:
    record = json.loads((path / "run.json").read_text())
    lines = experiment.read_metrics(path / "metrics.jsonl")
    if len(lines) < 2:
      raise ValueError(f"the run in {path} has no finished round yet.")
    runs.append(Run(record["experiment"], path.resolve(), record, lines))
  return runs


def table(runs: Sequence[Run]) -> str:
  """A Markdown table: utility before and after, bytes, seconds."""
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
      "seconds": run.total("seconds"),
    }
    for label, run in zip(_labels(runs), runs, strict=True)
  ]
  # Classifiers have no perplexity, pre-training may have no accuracy.
  empty = {x for x in rows[0] if all(row[x] == "" for row in rows)}
  rows = [{x: row[x] for x in row if x not in empty} for row in rows]
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", floatfmt=".1f"
  )


def _change(run: Run, name: str, form: str) -> str:
  before, after = run.evaluated[0].get(name), run.evaluated[-1].get(name)
  return "" if after is None else f"{before:{form}} → {after:{form}}"


def _labels(runs: Sequence[Run]) -> list[str]:
  """The runs' names; for a name that comes twice, the end of the folder."""
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
  """Draws held-out loss against megabytes sent, a curve a run.

  Where nobody sent anything, as in pre-training, it is drawn against rounds.
  """
  figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  sent = any(run.megabytes() for run in runs)
  for label, run in zip(_labels(runs), runs, strict=True):
    # The first point has sent nothing; a logarithmic axis has no place for it.
    points = [line for line in run.evaluated if line["round"] > 0]
    rounds = [line["round"] for line in points]
    axes.plot(
      [run.megabytes(x) for x in rounds] if sent else rounds,
      [line["loss"] for line in points],
      marker="o",
      markersize=4,
      label=label,
    )
  starts = {run.evaluated[0]["loss"] for run in runs}
  for loss in sorted(starts):
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
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter("{x:g}")
  axes.set_xlabel(
    "megabytes sent, both directions, all clients" if sent else "round"
  )
  per = any("perplexity" in line for run in runs for line in run.evaluated)
  axes.set_ylabel(f"held-out loss (nats{' per token' if per else ''})")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=150)
