"""Tunes learning rates on validation rows: of clients, and of the server.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.rates TASK

The clients' rate is tuned without compression and used for all codecs. The
server's rate is tuned for each codec. Some codes shrink updates, for which a
rate of 1 is too small; others add noise, for which it may be too large. Each
codec is run at a constant rate of 1, as in CG-FedLLM, where the mean replaces
the adapter, and at rates of 1, 2 and 4 that fall to a tenth over the rounds.
Then a rate of 3 is run where 2 was best, and a rate of 8 where 4 was best.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

from benchmarks import study
from benchmarks.cg_fedllm import methods

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ROUNDS_OF_CLIENT_RATES = 10
ROUNDS = {"shakespeare": 30, "library": 15, "dolly": 15}
SEED = 100
DECAY = (("server_decay", True),)
SERVERS = ((1.0, ()), (2.0, DECAY), (1.0, DECAY), (4.0, DECAY))
# What is also run, by the best of these.
FURTHER = {(2.0, DECAY): (3.0, DECAY), (4.0, DECAY): (8.0, DECAY)}
# At half a bit, with all seeds. All but the unbiased one also run with error
# feedback; its error may be larger than the update.
MAIN = (
  *("STC", "EDEN", "trellis", "our transform code"),
  "our transform code, unbiased",
)
WITH_FEEDBACK = MAIN[:-1]
# With one seed. The paper's autoencoder transmits nothing and is not tuned.
OTHERS = ("Top-K", "PowerSGD", "PCA", "our autoencoder")
# A rate, and further knobs.
Server = tuple[float, tuple[tuple[str, Any], ...]]


def of(task: str, folder: pathlib.Path = study.RESULTS / "cg_fedllm") -> float:
  """Returns the clients' rate with the lowest uncompressed validation loss."""
  best = _best(task, folder, "dense", (), ROUNDS_OF_CLIENT_RATES)
  if best is None:
    raise ValueError(f"no rates of {task} in {folder}: run rates {task} first.")
  return best["client_rate"]


def of_server(
  task: str,
  method: str,
  knobs: tuple[tuple[str, Any], ...],
  folder: pathlib.Path = study.RESULTS / "cg_fedllm",
) -> Server:
  """Returns the server's rate and its knobs; a constant 1 if it is not tuned.

  Args:
    task: name of a task in `problems.PROBLEMS`.
    method: name of a codec, or "dense".
    knobs: knobs of the cell, without those of the server.
    folder: folder of the results.
  """
  best = _best(task, folder, method, knobs, ROUNDS[task])
  if best is None:
    return SERVERS[0]
  decay = DECAY if dict(best["knobs"]).get("server_decay") else ()
  return best["server_rate"], decay


def knobs(bits: float, feedback: bool = False) -> tuple[tuple[str, Any], ...]:
  """The knobs of a cell with a codec."""
  return (("bits", bits), ("error_feedback", feedback))


def _best(task, folder, method, knobs, rounds):
  """The cell of the lowest final loss, among those of so many rounds."""
  found = []
  for record in study.read(folder / f"{task}_rates.jsonl"):
    cell = record["cell"]
    own = {x: y for x, y in cell["knobs"] if x != "server_decay"}
    if (cell["method"], cell["rounds"], own) == (method, rounds, dict(knobs)):
      found.append((record["lines"][-1]["loss"], cell))
  return min(found, key=lambda x: x[0], default=(None, None))[1]


def _of_clients(task):
  cell = study.Cell(
    *(task, "dense", 1.0, 16, SEED, RATES[0], 1.0, ROUNDS_OF_CLIENT_RATES),
    validation=True,
  )
  return [dataclasses.replace(cell, client_rate=rate) for rate in RATES]


def _tuned():
  """Names and knobs of what is tuned."""
  tuned = [("dense", ())]
  tuned += [(name, knobs(0.5)) for name in (*MAIN, *OTHERS)]
  tuned += [(name, knobs(0.5, feedback=True)) for name in WITH_FEEDBACK]
  return tuned


def _cell(task, rate, name, own, server):
  server_rate, decay = server
  return study.Cell(
    *(task, name, 1.0, 16, SEED, rate, server_rate, ROUNDS[task], True),
    knobs=(*own, *decay),
  )


def _of_servers(task, rate):
  """One cell for each server and codec, all codecs of a server in a row."""
  return [
    _cell(task, rate, *setting, server)
    for server, setting in itertools.product(SERVERS, _tuned())
  ]


def _further(task, rate, folder):
  """One more cell for each codec whose best server so far is in `FURTHER`."""
  best = [(x, of_server(task, *x, folder)) for x in _tuned()]
  return [
    _cell(task, rate, *setting, FURTHER[server])
    for setting, server in best
    if server in FURTHER
  ]


if __name__ == "__main__":
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}_rates.jsonl"
  study.run(
    *(_of_clients(given.task), path, methods.experiment),
    processes=given.processes,
  )
  rate = of(given.task, given.out)
  cells = _of_servers(given.task, rate)
  # The first cell with a codec makes the recording for the others.
  study.run(cells[:2], path, methods.experiment, processes=1)
  study.run(cells, path, methods.experiment, processes=given.processes)
  cells = _further(given.task, rate, given.out)
  study.run(cells, path, methods.experiment, processes=given.processes)
