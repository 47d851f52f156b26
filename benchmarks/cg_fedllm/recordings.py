"""Recorded updates on D1 of a task, which all programs fit codecs to.

They are recorded during federated averaging with 10 clients a round that train
with Adam, as in CG-FedLLM. A recording is cached in a folder of the machine.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks import problems, study
from fedjax_llm.codecs import recording
from fedjax_llm.experiments import runner, tasks
from fedjax_llm.experiments import tgap as experiments
from fedjax_llm.federated.algorithms import tgap

SHARE = 0.3
ROUNDS = 20
# Share of the rounds, the last ones, that codecs are measured on.
HELD_OUT = 0.2


class Recorded(NamedTuple):
  """A task on D2, and what was recorded on D1.

  Attributes:
    task: task on D2.
    store: store of the updates on D1.
    folder: folder for what is fitted to them.
  """

  task: tasks.Task
  store: recording.Store
  folder: pathlib.Path

  @property
  def groups(self) -> list[np.ndarray]:
    """The numbers of the snapshots of each held-out round."""
    rounds = self.store.rounds
    last = np.unique(rounds)[-round(HELD_OUT * ROUNDS) :]
    return [np.flatnonzero(rounds == number) for number in last]

  @property
  def fitted(self) -> np.ndarray:
    """The snapshots that codecs are fitted to."""
    first = self.groups[0][0]
    return np.asarray(self.store.snapshots[:first])


def parts(cell: Any) -> tuple[tasks.Task, tasks.Task]:
  """Returns the task of a cell on D1 and on D2."""
  task = problems.make(cell, dict(cell.knobs))
  return experiments.divided(task, SHARE, seed=cell.seed)


def of(cell: Any) -> Recorded:
  """Returns the recording of a cell's task, rank, seed and client rate."""
  first, second = parts(cell)
  name = f"{cell.task}_{cell.rank}_{cell.seed}_{cell.client_rate:g}"
  folder = study.cache("recordings") / name
  # A finished run writes again, and another process may read at that time.
  if not (folder / "adapter").exists():
    runner.run(_recording(first, cell), folder)
  return Recorded(second, recording.Store(folder / "recording"), folder)


def client_optimizer(rate: float) -> optax.GradientTransformation:
  """The optimizer of all clients of the study."""
  return optax.adamw(rate, weight_decay=0.0)


def _recording(task, cell):
  algorithm = tgap.federated_pretraining(
    task.loss_fn,
    client_optimizer(cell.client_rate),
    optax.sgd(1.0),
    population=len(task.population.names),
    placement=task.placement,
  )
  schedule = dataclasses.replace(
    problems.schedule(cell, {}), rounds=ROUNDS, evaluate_every=ROUNDS
  )
  return experiments.recorded(
    task,
    problems.equal_clients(algorithm),
    schedule,
    representation="delta",
    about={"share": SHARE, "seed": cell.seed},
    finish=lambda store, folder: None,
  )
