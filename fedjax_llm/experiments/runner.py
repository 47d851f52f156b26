"""A run: rounds, evaluation, metrics, checkpoints, in one resumable folder.

An `Experiment` is what a config constructs: pure functions of a state. `run`
advances it and writes

    run.json        resolved knobs, versions, device, data fingerprint
    metrics.jsonl   a line a round
    checkpoints/    the last states
    ...             what the experiment exports when it is done

The same call on the same folder resumes; killed at any moment and resumed, it
ends with the same bits as if it had never stopped.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from fedjax_llm.experiments import checkpoints, interrupts

_PACKAGES = ("fedjax-llm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# What a resumed run must share with the run it continues.
_IDENTITY = ("experiment", "knobs", "data")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What is computed, round by round. All functions are deterministic.

  Attributes:
    rounds: how many rounds there are.
    init: makes the state before the first round, a tree of arrays.
    round: (state, round number from 0) -> the next state and its metrics,
      scalars such as `train_loss`; the state passed in may be donated.
    evaluate: state -> `loss` and other metrics.
    export: (state, folder) -> None; writes the result of the finished run.
    data: what identifies the data, such as their fingerprint.
    population: the clients and what they train on, a `data.batches.Population`;
      None if there are no clients.
    prepare: (folder) -> None; called before anything else, for rounds that
      write into the folder of the run themselves. None if they do not. Rounds
      after the last checkpoint of a killed process are computed again.
    evaluate_every: rounds between evaluations; the first state and the last
      are always evaluated.
    checkpoint_every: rounds between checkpoints.
  """

  rounds: int
  init: Callable[[], Any]
  round: Callable[[Any, int], tuple[Any, Mapping[str, Any]]]
  evaluate: Callable[[Any], Mapping[str, float]]
  export: Callable[[Any, pathlib.Path], None]
  data: Mapping[str, str]
  population: Any = None
  prepare: Callable[[pathlib.Path], None] | None = None
  evaluate_every: int = 5
  checkpoint_every: int = 5

  def __post_init__(self):
    for name in ("rounds", "evaluate_every", "checkpoint_every"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"expected {name} >= 1, got {value}.")


class Interrupted(Exception):
  """The user asked to stop; the round was finished and its state saved."""


def run(
  experiment: Experiment,
  folder: str | os.PathLike,
  *,
  name: str | None = None,
  knobs: Mapping[str, Any] | None = None,
) -> None:
  """Runs or resumes `experiment` in `folder`.

  Args:
    experiment: what to run.
    folder: where; made if absent.
    name: what the experiment is called, for its record and progress bar; the
      folder's name if not given.
    knobs: what the experiment was made with; a resumed run must have the same.

  Raises:
    ValueError: if the folder holds a run of something else.
    Interrupted: after SIGINT, when the round is finished and saved.
    FloatingPointError: if a metric is not finite.
  """
  folder = pathlib.Path(folder).resolve()
  name = name or folder.name
  _claim(folder, _record(experiment, name, knobs))
  if experiment.prepare:
    experiment.prepare(folder)
  saved = checkpoints.Checkpoints(folder / "checkpoints")
  with saved, interrupts.Interrupt() as interrupt:
    first, state = saved.restore(experiment.init())
    log = Log(folder / "metrics.jsonl", rounds=first)
    if not log.lines:
      log.append({"round": 0, **_floats(experiment.evaluate(state))})
    bar = tqdm.tqdm(
      total=experiment.rounds, initial=first, desc=name, unit="round"
    )
    with bar:
      for done in range(first + 1, experiment.rounds + 1):
        state, line = _advance(experiment, state, done)
        log.append(line)
        stop = interrupt.asked  # Read once: it may be set at any moment.
        last = done == experiment.rounds
        if last or stop or done % experiment.checkpoint_every == 0:
          saved.save(done, state)
        _show(bar, log)
        if stop and not last:
          raise Interrupted(f"stopped after round {done}")
  experiment.export(state, folder)
  record = json.loads((folder / "run.json").read_text())
  finished = {"finished": _now(), "peak_memory_bytes": peak_memory()}
  _write(folder / "run.json", json.dumps(finished | record, indent=2) + "\n")


def export(
  experiment: Experiment,
  folder: str | os.PathLike,
  *,
  name: str | None = None,
  knobs: Mapping[str, Any] | None = None,
) -> int:
  """Exports the last checkpoint of a run, finished or not.

  Args:
    experiment: what was run.
    folder: where it was run, and where the result is written to.
    name: as in `run`.
    knobs: as in `run`.

  Returns:
    The round of the checkpoint.

  Raises:
    ValueError: if the folder holds no checkpoint, or a run of something else.
  """
  folder = pathlib.Path(folder).resolve()
  if not (folder / "checkpoints").is_dir():
    raise ValueError(
      f"expected a run with checkpoints in {folder}, found none."
    )
  _claim(folder, _record(experiment, name or folder.name, knobs))
  if experiment.prepare:
    experiment.prepare(folder)
  with checkpoints.Checkpoints(folder / "checkpoints") as saved:
    done, state = saved.restore(experiment.init())
  if not done:
    raise ValueError(f"the run in {folder} has no checkpoint yet.")
  experiment.export(state, folder)
  return done


def _record(experiment, name, knobs):
  """What `run.json` says of a run before it starts."""
  return {
    "experiment": name,
    # What is no JSON value, such as a path, is recorded by its text.
    "knobs": json.loads(json.dumps(dict(knobs or {}), default=str)),
    "data": dict(experiment.data),
    **_environment(),
  }


def _advance(experiment, state, done):
  """One round: its next state, and the line for `metrics.jsonl`."""
  start = time.perf_counter()
  state, metrics = experiment.round(state, done - 1)
  line = {"round": done, **_floats(metrics)}
  line["seconds"] = time.perf_counter() - start
  if done % experiment.evaluate_every == 0 or done == experiment.rounds:
    line |= _floats(experiment.evaluate(state))
  if bad := [key for key, x in line.items() if not math.isfinite(x)]:
    raise FloatingPointError(
      f"round {done}: {', '.join(bad)} not finite. The last checkpoint is kept;"
      " lower the learning rate."
    )
  return state, line


def _floats(metrics: Mapping[str, Any]) -> dict[str, float | int]:
  return {name: np.asarray(x).item() for name, x in metrics.items()}


def _show(bar: tqdm.tqdm, log: "Log") -> None:
  """Advances the progress bar, with the last losses and the bytes so far."""
  line = log.lines[-1]
  evaluated = [x["loss"] for x in log.lines if "loss" in x]
  shown = {"held-out": f"{evaluated[-1]:.3f}"}
  if "train_loss" in line:
    shown["train"] = f"{line['train_loss']:.3f}"
  if "download_bytes" in line:
    sent = sum(
      x.get("download_bytes", 0) + x.get("upload_bytes", 0) for x in log.lines
    )
    shown["sent"] = f"{sent / 1e6:.1f}MB"
  bar.set_postfix(shown, refresh=False)
  bar.update()


class Log:
  """`metrics.jsonl`: a line a round, on disk before the round's checkpoint."""

  def __init__(self, path: pathlib.Path, *, rounds: int):
    """Opens the log, keeping the lines up to round `rounds`.

    Lines of later rounds, or half a line, are what a killed process wrote
    after its last checkpoint; those rounds are computed again.
    """
    kept = read_metrics(path, rounds) if rounds else []
    _write(path, "".join(json.dumps(line) + "\n" for line in kept))
    self.lines = kept
    self._path = path

  def append(self, line: dict[str, Any]) -> None:
    """Writes a line."""
    self.lines.append(line)
    with self._path.open("a") as file:
      file.write(json.dumps(line) + "\n")


def read_metrics(
  path: pathlib.Path, rounds: int | None = None
) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`, up to round `rounds`."""
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  parsed = [json.loads(line) for line in lines if line.endswith("\n")]
  return [x for x in parsed if rounds is None or x["round"] <= rounds]


def _claim(folder: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes `run.json`, or checks that the one there is of this experiment."""
  path = folder / "run.json"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(record, indent=2) + "\n")
    return
  before = json.loads(path.read_text())
  differences = [
    f"{name}: {old!r} there, {new!r} now"
    for part in _IDENTITY
    for name, old, new in _differences(part, before.get(part), record[part])
  ]
  if differences:
    raise ValueError(
      f"{folder} holds a run with other settings:\n  "
      + "\n  ".join(differences)
      + "\nGive the same settings to resume it, or another --out."
    )


def _differences(name, old, new):
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [(name, old, new)] if old != new else []
  return [
    (key, old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]


def _environment() -> dict[str, Any]:
  """Versions, device and date, for the record."""
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "device": f"{jax.device_count()} x {device.device_kind}",
    "platform": f"{platform.system()} {platform.machine()}",
    "started": _now(),
  }


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


def _write(path: pathlib.Path, text: str) -> None:
  """Replaces a file; a killed process leaves the old one or the new."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def peak_memory() -> int | None:
  """The most memory this process has held so far, in bytes, where known."""
  if sys.platform == "win32":
    return None
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak
