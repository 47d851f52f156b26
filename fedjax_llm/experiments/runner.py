"""A run: rounds, evaluation, metrics and checkpoints, in a resumable folder.

A config makes an `Experiment`, which is a set of functions of a state. `run`
advances the state and writes

    run.json        knobs, data, program, versions, device
    metrics.jsonl   one line a round
    checkpoints/    the last two states that were saved
    ...             what the experiment exports at the end

The same call on the same folder resumes. A run that was killed at any moment
and resumed ends with the same bits as one that never stopped.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tqdm

from fedjax_llm.experiments import checkpoints, interrupts, run_folder


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A computation in rounds. All functions are deterministic.

  Attributes:
    rounds: the number of rounds.
    init: makes the state before the first round, a tree of arrays.
    round: (state, round number from 0) -> the next state and its metrics,
      scalars such as `train_loss`; the state passed in may be donated.
    evaluate: state -> `loss` and other metrics.
    export: (state, folder) -> None; writes the result of the finished run.
    data: names and fingerprints of the data.
    program: first state -> fingerprints and settings of the computation, see
      `programs`. A run does not resume if they differ. If None, only name,
      knobs and data are compared.
    population: the clients and what they train on, a `data.batches.Population`;
      None if there are no clients.
    prepare: (folder) -> None; called before the first round, for experiments
      that write into the folder themselves; None if they do not. After a
      killed process, rounds since the last checkpoint are computed again.
    evaluate_every: rounds between evaluations. The first and the last state are
      always evaluated.
    checkpoint_every: rounds between checkpoints.
  """

  rounds: int
  init: Callable[[], Any]
  round: Callable[[Any, int], tuple[Any, Mapping[str, Any]]]
  evaluate: Callable[[Any], Mapping[str, float]]
  export: Callable[[Any, pathlib.Path], None]
  data: Mapping[str, str]
  program: Callable[[Any], Mapping[str, Any]] | None = None
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
  allow_other_devices: bool = False,
  allow_other_versions: bool = False,
) -> None:
  """Runs or resumes `experiment` in `folder`.

  A run resumes if its name, knobs, data and program are the same. The number of
  rounds may grow: a finished run of 20 rounds can go on to 40.

  Args:
    experiment: what to run.
    folder: where to run it; made if absent.
    name: the name of the experiment, for its record and progress bar; the
      folder's name if not given.
    knobs: the arguments that made the experiment, for its record.
    allow_other_devices: whether to resume a run that began on other devices.
      The last bits of the result may then differ.
    allow_other_versions: whether to resume a run that began with other versions
      of the libraries, with the same effect.

  Raises:
    ValueError: if the folder holds another run. The message says what differs.
    Interrupted: after SIGINT, when the round is finished and saved.
    FloatingPointError: if a metric is not finite.
  """
  folder = pathlib.Path(folder).resolve()
  name = name or folder.name
  first_state = experiment.init()
  run_folder.claim(
    folder,
    _record(experiment, first_state, name, knobs),
    allow_other_devices=allow_other_devices,
    allow_other_versions=allow_other_versions,
  )
  if experiment.prepare:
    experiment.prepare(folder)
  saved = checkpoints.Checkpoints(folder / "checkpoints")
  with saved, interrupts.Interrupt() as interrupt:
    first, state = saved.restore(first_state)
    del first_state  # Not kept beside the state of the run.
    log = run_folder.Log(folder / "metrics.jsonl", rounds=first)
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
  run_folder.finish(folder)


def export(
  experiment: Experiment,
  folder: str | os.PathLike,
  *,
  name: str | None = None,
  knobs: Mapping[str, Any] | None = None,
) -> int:
  """Exports the last checkpoint of a run, finished or not.

  Devices and versions may differ from those of the run: nothing is trained.

  Args:
    experiment: what was run.
    folder: where it was run, and where the result is written to.
    name: as in `run`.
    knobs: as in `run`.

  Returns:
    The round of the checkpoint.

  Raises:
    ValueError: if the folder holds no checkpoint, or another run.
  """
  folder = pathlib.Path(folder).resolve()
  if not (folder / "checkpoints").is_dir():
    raise ValueError(
      f"expected a run with checkpoints in {folder}, found none."
    )
  first_state = experiment.init()
  run_folder.check(
    folder,
    _record(experiment, first_state, name or folder.name, knobs),
    allow_other_devices=True,
    allow_other_versions=True,
  )
  if experiment.prepare:
    experiment.prepare(folder)
  with checkpoints.Checkpoints(folder / "checkpoints") as saved:
    done, state = saved.restore(first_state)
  if not done:
    raise ValueError(f"the run in {folder} has no checkpoint yet.")
  experiment.export(state, folder)
  return done


def _record(experiment, first_state, name, knobs):
  program = experiment.program(first_state) if experiment.program else {}
  return run_folder.record(
    name=name,
    knobs=knobs,
    data=experiment.data,
    program=program,
    rounds=experiment.rounds,
  )


def _advance(experiment, state, done):
  """Runs one round; returns its state and its line for `metrics.jsonl`."""
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


def _show(bar: tqdm.tqdm, log: run_folder.Log) -> None:
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
