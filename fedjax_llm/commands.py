"""What the commands do, once their arguments are parsed."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_llm import experiment as experiments


def run(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Runs or resumes what a config makes.

  Args:
    make: the config's `experiment` function; returns an `Experiment`, or
      several by name, each of which gets a subfolder.
    out: folder of the run.
    name: of the config.
    knobs: arguments of `make`.
  """
  made = make(**knobs)
  several = made if isinstance(made, dict) else {name: made}
  for label, experiment in several.items():
    folder = out / label if isinstance(made, dict) else out
    experiments.run(experiment, folder, name=label, knobs=knobs)


def compare():
  """Placeholder."""


def evaluate():
  """Placeholder."""
