"""What codecs are fitted on, once for all programs: updates on D1 of a task.

Federated averaging by clients that train by Adam, as CG-FedLLM's do, 10 clients
a round. Kept in a folder of this machine, and recorded again where it is not.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks import problems
from fedjax_llm.codecs import recording
from fedjax_llm.experiments import runner, tasks
from fedjax_llm.experiments import tgap as learned_compression
from fedjax_llm.federated.algorithms import tgap

SHARE = 0.3
ROUNDS = 20
# The last rounds, on which codecs are measured, and to which none is fitted.
HELD_OUT = 0.2


class Recorded(NamedTuple):
  """A task on D2, and what was recorded on D1.

  Attributes:
    task: on D2.
    store: of the updates.
    folder: where what is fitted to them may be kept.
  """

  task: tasks.Task
  store: recording.Store
  folder: pathlib.Path

  @property
  def groups(self) -> list[np.ndarray]:
    """The snapshots of each held-out round."""
    rounds = self.store.rounds
    last = np.unique(rounds)[-round(HELD_OUT * ROUNDS) :]
    return [np.flatnonzero(rounds == number) for number in last]

  @property
  def fitted(self) -> np.ndarray:
    """The snapshots that codecs are fitted to."""
    first = self.groups[0][0]
    return np.asarray(self.store.snapshots[:first])


def parts(cell: Any) -> tuple[tasks.Task, tasks.Task]:
  """The task of a cell on D1 and on D2."""
  task = problems.make(cell, dict(cell.knobs))
  return learned_compression.divided(task, SHARE, seed=cell.seed)


def of(cell: Any) -> Recorded:
  """What is recorded for a cell's task, rank, seed and client rate."""
  first, second = parts(cell)
  cache = os.environ.get("FEDJAX_LLM_CACHE", "~/.cache/fedjax_llm")
  name = f"{cell.task}_{cell.rank}_{cell.seed}_{cell.client_rate:g}"
  folder = pathlib.Path(cache).expanduser() / "recordings" / name
  # Others may read it at the same time, and a run writes even if it is done.
  if not (folder / "adapter").exists():
    runner.run(_recording(first, cell), folder)
  return Recorded(second, recording.Store(folder / "recording"), folder)


def client_optimizer(rate: float) -> optax.GradientTransformation:
  """Of all clients of the study."""
  return optax.adamw(rate, weight_decay=0.0)


def _recording(task, cell):
  algorithm = tgap.federated_pretraining(
    task.loss_fn,
    client_optimizer(cell.client_rate),
    optax.sgd(1.0),
    population=len(task.population.names),
    placement=task.placement,
  )
  return learned_compression.recorded(
    task,
    algorithm,
    representation="delta",
    about={"share": SHARE, "seed": cell.seed},
    finish=lambda store, folder: None,
    rounds=ROUNDS,
    **problems.training(cell, {}) | {"evaluate_every": ROUNDS},
  )
