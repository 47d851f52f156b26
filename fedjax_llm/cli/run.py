"""What the commands on configs and runs do, once arguments are parsed."""

import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tyro

from fedjax_llm.experiments import runner
from fedjax_llm.reporting import clients, studies, study_plots, study_tables
from fedjax_llm.reporting import runs as report


def run(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Runs or resumes what a config makes, and reports.

  Args:
    make: the config's `experiment` function; returns an `Experiment`, or
      several by name, each of which gets a subfolder.
    out: folder of the run.
    name: of the config.
    knobs: arguments of `make`; the others have their defaults.

  Raises:
    KeyboardInterrupt: after Ctrl-C, telling how to go on.
  """
  arguments = inspect.signature(make).bind(**knobs)
  arguments.apply_defaults()
  knobs = arguments.arguments
  made = make(**knobs)
  several = isinstance(made, Mapping)
  for label, experiment in (made if several else {name: made}).items():
    folder = out / label if several else out
    people = experiment.population
    if people is not None and people.dropped:
      print(
        f"{label}: {people.dropped:,} records have nothing to learn within"
        " a row and are left out."
      )
    try:
      runner.run(experiment, folder, name=label, knobs=knobs)
    except runner.Interrupted as stop:
      raise KeyboardInterrupt(
        f"{label} {stop}; its state is saved. The same command goes on from"
        " there."
      ) from None
  runs = report.load(out)
  report.plot(runs, out / "loss.png")
  print(f"\n{report.table(runs)}\n\nPlot: {out / 'loss.png'}")


def data(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Tells and draws which client has what, and trains nothing.

  Args:
    make: as for `run`; of several experiments, the first one's clients.
    out: folder of the picture; made if absent.
    name: of the config.
    knobs: arguments of `make`; the others have their defaults.

  Raises:
    ValueError: if the experiment has no clients.
  """
  made = make(**knobs)
  first = next(iter(made.values())) if isinstance(made, Mapping) else made
  if first.population is None:
    raise ValueError(
      f"data expected a config with clients, got {name}, which has none."
    )
  out.mkdir(parents=True, exist_ok=True)
  clients.plot(first.population, out / "data.png", name=name)
  shown = clients.table(first.population, name=name)
  print(f"{shown}\n\nPlot: {out / 'data.png'}")


def export(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Writes the adapter of the last checkpoint of a run, finished or not.

  Args:
    make: the config's `experiment` function.
    out: folder of the run; the adapter is written to `adapter` in it.
    name: of the config.
    knobs: arguments of `make`, those of the run.
  """
  arguments = inspect.signature(make).bind(**knobs)
  arguments.apply_defaults()
  knobs = arguments.arguments
  made = make(**knobs)
  several = isinstance(made, Mapping)
  for label, experiment in (made if several else {name: made}).items():
    folder = out / label if several else out
    done = runner.export(experiment, folder, name=label, knobs=knobs)
    print(f"{label}: round {done}, exported to {folder}")


def compare(
  runs: tyro.conf.Positional[tuple[pathlib.Path, ...]],
  /,
  *,
  out: pathlib.Path = pathlib.Path("compare.png"),
  target_loss: float | None = None,
  target_accuracy: float | None = None,
  conventions: bool = False,
) -> None:
  """Compare finished runs: a table and a plot of utility against bytes.

  Args:
    runs: run folders, or folders of run folders; or a study, a file of JSON
      lines, whose runs are summed up by mean and deviation over seeds.
    out: where to draw the plot.
    target_loss: adds the bytes and simulated seconds until it was first seen
      that the held-out loss was at most so much; not of a study.
    target_accuracy: the same for an accuracy of at least so much, in [0, 1].
    conventions: adds bytes as papers count them: values only, + bitmap, + COO.
  """
  if not runs:
    raise ValueError("compare expected one or more run folders, got none.")
  if all(map(studies.is_study, runs)):
    if target_loss is not None or target_accuracy is not None:
      raise ValueError(
        "a study has the utility of its dense runs for a target, got"
        f" {target_loss=}, {target_accuracy=}. Leave them out."
      )
    entries = [entry for path in runs for entry in studies.load(path)]
    study_plots.plot(entries, out)
    print(study_tables.table(entries, papers=conventions))
    if any(entry.method == studies.REFERENCE for entry in entries):
      of = " of uploads" if studies.is_of_uploads(entries) else ""
      print(f"\nTimes fewer bytes{of} than dense until there:\n")
      print(study_tables.ratio_table(entries))
    print(f"\nPlot: {out}")
    return
  loaded = [run for folder in runs for run in report.load(folder)]
  report.plot(loaded, out)
  given = {"loss": target_loss, "accuracy": target_accuracy}
  targets = {metric: x for metric, x in given.items() if x is not None}
  shown = report.table(loaded, targets=targets, papers=conventions)
  print(f"{shown}\n\nPlot: {out}")
