"""Cells of a study: one method, density, rank and seed each, run and recorded.

A figure is a program that lists cells, started from the repository's root.
`run` computes those that its result file does not hold yet, in the order of the
list, some at a time, each in a process with one core. It appends a line of JSON
for each, so that an interrupted study goes on where it stopped. Before it
starts, it says how long that will take, from the lines that are already there.
`fedjax-llm compare FILE` makes the tables and plots.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.experiments import runner as experiment
from fedjax_llm.experiments import tasks

RESULTS = pathlib.Path(__file__).parent / "results"
_SUMMED = {
  "download_bytes",
  "upload_bytes",
  "download_entries",
  "upload_entries",
  "sparse_messages",
  "sparse_entries",
  "simulated_seconds",
  "selected",
  "answered",
}
_PACKAGES = ("fedjax-llm", "jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    task: a name in `problems.PROBLEMS`.
    method: a name in `methods.METHODS`.
    density: share of the entries that is sent, for methods that have one.
    rank: rank of the LoRA factors; the scale of their product is 1.
    seed: seed of every random draw.
    client_rate: learning rate of the clients' SGD with momentum 0.9.
    server_rate: learning rate of the server's optimizer.
    rounds: number of rounds.
    validation: whether to evaluate the validation rows, on which rates are
      chosen, instead of the test rows.
    knobs: names and values of further settings of the task and the method.
  """

  task: str
  method: str
  density: float
  rank: int
  seed: int
  client_rate: float
  server_rate: float
  rounds: int
  validation: bool = False
  knobs: tuple[tuple[str, Any], ...] = ()

  def key(self) -> str:
    """A text that no other cell has."""
    return json.dumps(dataclasses.asdict(self), sort_keys=True)


def arguments(description: str | None, name: str) -> argparse.Namespace:
  """The command line of a figure's program, of the study called `name`."""
  return _parser(description, name).parse_args()


def _parser(description, name):
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("task", nargs="?", default="shakespeare")
  parser.add_argument("--processes", type=int, default=os.cpu_count())
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--rounds", type=int)
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS / name)
  return parser


def program(
  description: str | None,
  name: str,
  suffix: str,
  stages: Sequence[Callable[[argparse.Namespace], Sequence[Cell]]],
  make: Callable[[Cell], tuple[tasks.Task, experiment.Experiment]],
) -> argparse.Namespace:
  """Runs the cells of a figure's program; returns its command line.

  Args:
    description: the docstring of the program.
    name: the folder of the study.
    suffix: what the name of the result file has after that of the task.
    stages: functions from the command line to cells. Each is called when the
      cells before it are recorded.
    make: the task and the experiment of a cell.
  """
  parser = _parser(description, name)
  parser.add_argument("--methods", nargs="+", help="these methods alone")
  given = parser.parse_args()
  path = given.out / f"{given.task}{suffix}.jsonl"
  for stage in stages:
    cells = stage(given)
    if given.methods:
      cells = [cell for cell in cells if cell.method in given.methods]
    run(cells, path, make, processes=given.processes)
  return given


def run(
  cells: Sequence[Cell],
  path: pathlib.Path,
  make: Callable[[Cell], tuple[tasks.Task, experiment.Experiment]],
  *,
  processes: int,
) -> list[dict[str, Any]]:
  """Computes the cells that `path` lacks; returns the records of all cells.

  A cell that diverges is printed and left out; the others go on.

  Args:
    cells: the cells, in the order of computation.
    path: the result file; made if absent.
    make: the task and the experiment of a cell.
    processes: number of cells at a time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  done = {_key(record): record for record in read(path)}
  cells = list(dict.fromkeys(cells))
  missing = [cell for cell in cells if cell.key() not in done]
  known = [x for other in path.parent.glob("*.jsonl") for x in read(other)]
  print(
    f"{path.name}: {len(missing)} of {len(cells)} cells to compute in"
    f" {price(missing, known, processes)}",
    flush=True,
  )
  # Spawned, because JAX's threads do not survive a fork.
  pool = concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context("spawn"), _one_core
  )
  with pool:
    futures = {pool.submit(_compute, cell, make): cell for cell in missing}
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          record = future.result()
        except FloatingPointError as error:
          cell = dataclasses.asdict(futures[future])
          print(f"{_describe(cell)}  left out: {error}", flush=True)
          continue
        done[_key(record)] = record
        known.append(record)
        append(path, record)
        left = [cell for cell in missing if cell.key() not in done]
        rest = price(left, known, processes)
        print(f"{_line(record)}  {rest} left", flush=True)
    except BaseException:
      # Or else all cells would be computed, and recorded nowhere.
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return [done[cell.key()] for cell in cells if cell.key() in done]


def price(
  cells: Sequence[Cell], records: Sequence[dict[str, Any]], processes: int
) -> str:
  """How long cells will take, from the seconds a round of their task took.

  Args:
    cells: the cells to compute.
    records: the records of other cells.
    processes: number of cells at a time.
  """
  seconds = 0.0
  for cell in cells:
    past = [x for x in records if x.get("cell", {}).get("task") == cell.task]
    if not past:
      return f"an unknown time for {cell.task}"
    rounds = [x["seconds"] / x["cell"]["rounds"] for x in past]
    seconds += float(np.median(rounds)) * cell.rounds
  return f"about {seconds / processes / 60:.0f} minutes"


def _line(record):
  last = record["lines"][-1]
  return (
    f"{_describe(record['cell'])}"
    f"  loss {last['loss']:.3f}  accuracy {last['accuracy']:.1%}"
    f"  {record['seconds']:5.0f} s"
  )


def _describe(cell):
  of = lambda name: f"{name} {cell[name]:<8.3g}"
  settings = map(of, ("density", "rank", "seed", "client_rate", "server_rate"))
  return f"{cell['task']} {cell['method']:28} {' '.join(settings)}"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a result file; none if there is no file."""
  return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path):
  """The lines without the half one that a killed process may leave."""
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [line for line in lines if line.endswith("\n")]


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Adds a record to a result file, after all whole lines."""
  end = sum(len(line.encode()) for line in _whole_lines(path))
  with path.open("ab") as file:
    file.truncate(end)
    file.write(f"{json.dumps(record)}\n".encode())


def _key(record):
  return json.dumps(record["cell"], sort_keys=True)


def cache(name: str) -> pathlib.Path:
  """A folder of this machine for what is made once."""
  folder = os.environ.get("FEDJAX_LLM_CACHE", "~/.cache/fedjax_llm")
  return pathlib.Path(folder).expanduser() / name


def _one_core():
  """Settings of a worker, before it starts JAX."""
  os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  )
  os.environ["HF_HUB_OFFLINE"] = "1"


def _compute(cell: Cell, make: Callable[..., Any]) -> dict[str, Any]:
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  jax.config.update("jax_compilation_cache_dir", str(cache("programs")))
  start = time.perf_counter()
  task, made = make(cell)
  lines = _lines(made)
  return {
    "cell": dataclasses.asdict(cell),
    "lines": lines,
    "seconds": time.perf_counter() - start,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "platform": f"{platform.system()} {platform.machine()}",
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "commit": _commit(),
    "data": dict(task.data),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
  }


def _commit() -> str | None:
  """The commit of this file's repository, with a mark if files differ."""
  command = ["git", "describe", "--always", "--dirty"]
  try:
    found = subprocess.run(
      command, cwd=RESULTS.parent, capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None  # Not a clone.
  return found.stdout.strip()


def _lines(experiment: Any) -> list[Any]:
  """Lines as of `metrics.jsonl`, but one for all rounds up to an evaluation."""
  state = experiment.init()
  lines: list[dict[str, Any]] = [{"round": 0, **_evaluate(experiment, state)}]
  line: dict[str, Any] = {}
  for number in range(experiment.rounds):
    state, metrics = experiment.round(state, number)
    for name in _SUMMED & metrics.keys():
      line[name] = line.get(name, 0) + np.asarray(metrics[name]).item()
    line["trainable"] = metrics["trainable"]
    done = number + 1
    if done % experiment.evaluate_every == 0 or done == experiment.rounds:
      lines.append({"round": done, **line, **_evaluate(experiment, state)})
      line = {}
  return lines


def _evaluate(experiment, state):
  return {name: float(x) for name, x in experiment.evaluate(state).items()}
