"""The commands `run`, `data` and `export`, which take a config."""

import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_llm.experiments import runner


def run(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
  **allowances: bool,
) -> None:
  """Runs or resumes the experiments of a config, then prints and plots them.

  Args:
    make: the config's `experiment` function; returns an `Experiment`, or a
      dictionary of several. Each of several gets a subfolder.
    out: folder of the run.
    name: name of the config.
    knobs: arguments of `make`; the others have their defaults.
    **allowances: allowed differences of a resumed run, as in `runner.run`.

  Raises:
    KeyboardInterrupt: after Ctrl-C; the message says how to resume.
  """
  # Imported here because it is slow: errors of the config come first.
  from fedjax_llm.reporting import runs as report

  knobs = _resolved(make, knobs)
  for label, experiment, folder in _experiments(make, out, name, knobs):
    people = experiment.population
    if people is not None and people.dropped:
      print(
        f"{label}: {people.dropped:,} records are left out: within a row they"
        " have no token to predict."
      )
    try:
      runner.run(experiment, folder, name=label, knobs=knobs, **allowances)
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
  """Shows which client has which data, as a table and a plot; trains nothing.

  Args:
    make: the config's `experiment` function. If it makes several experiments,
      the clients of the first are shown.
    out: folder of the plot; made if absent.
    name: name of the config.
    knobs: arguments of `make`; the others have their defaults.

  Raises:
    ValueError: if the experiment has no clients.
  """
  from fedjax_llm.reporting import clients

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
  """Writes the adapter of a run's last checkpoint; the run may be unfinished.

  Args:
    make: the config's `experiment` function.
    out: folder of the run; the adapter is written to `adapter` in it.
    name: name of the config.
    knobs: arguments of `make` in that run; the others have their defaults.
  """
  knobs = _resolved(make, knobs)
  for label, experiment, folder in _experiments(make, out, name, knobs):
    done = runner.export(experiment, folder, name=label, knobs=knobs)
    print(f"{label}: round {done}, exported to {folder}")


def _resolved(
  make: Callable[..., Any], knobs: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the knobs, with defaults for those that are not given."""
  arguments = inspect.signature(make).bind(**knobs)
  arguments.apply_defaults()
  return arguments.arguments


def _experiments(
  make: Callable[..., Any],
  out: pathlib.Path,
  name: str,
  knobs: Mapping[str, Any],
) -> list[tuple[str, runner.Experiment, pathlib.Path]]:
  """Returns name, experiment and folder of each experiment of a config."""
  made = make(**knobs)
  if not isinstance(made, Mapping):
    return [(name, made, out)]
  return [(label, made[label], out / label) for label in made]
