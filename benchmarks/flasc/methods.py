"""What the study compares: each method as it is composed from the library."""

import math
from typing import Any

import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.federated import aggregators, channels, densities, rounds
from fedjax_llm.federated.algorithms import (
  fed_avg,
  federated_select,
  flasc,
  pruning,
)


def make(
  cell: Any, task: Any, knobs: dict[str, Any]
) -> rounds.FederatedAlgorithm:
  """The algorithm of a cell."""
  parts = dict(
    clients_per_step=1,
    mesh=task.mesh,
    population=len(task.population.names),
  )
  return METHODS[cell.method](
    cell,
    task,
    optax.sgd(cell.client_rate, momentum=0.9),
    # In the state, so that cells of other rates share one compiled round.
    optax.inject_hyperparams(flasc.server_adamw)(cell.server_rate),
    knobs,
    parts,
  )


def options(cell: Any, knobs: dict[str, Any]) -> dict[str, Any]:
  """What `finetuning.federated` needs to know of a cell's method."""
  del cell, knobs
  return {}


def dense(cell, task, client, server, knobs, parts):
  return _flasc(1.0, 1.0)(cell, task, client, server, knobs, parts)


def _flasc(down=None, up=None):
  """FLASC with the cell's density in the directions that have none."""

  def fn(cell, task, client, server, knobs, parts):
    return flasc.flasc(
      task.loss_fn,
      client,
      server,
      download_density=down or cell.density,
      upload_density=up or cell.density,
      **parts,
    )

  return fn


def sparse_adapter(cell, task, client, server, knobs, parts):
  return pruning.sparse_adapter(
    task.loss_fn, client, server, density=cell.density, **parts
  )


def adapter_lth(cell, task, client, server, knobs, parts):
  """Pruned in three steps, which are over after half of the rounds."""
  every = math.ceil(cell.rounds / 6)
  schedule = densities.decaying(
    1.0,
    cell.density ** (1 / 3),
    every=every,
    rounds=cell.rounds,
    floor=cell.density,
  )
  return pruning.adapter_lth(
    task.loss_fn, client, server, density=schedule, **parts
  )


def _federated_select(warm_up_rounds):
  def fn(cell, task, client, server, knobs, parts):
    return federated_select.federated_select(
      task.loss_fn,
      client,
      server,
      density=cell.density,
      warm_up_rounds=warm_up_rounds,
      **parts,
    )

  return fn


def _composed(compose):
  """A mean of updates through the channel that `compose` makes."""

  def fn(cell, task, client, server, knobs, parts):
    start, _ = ravel_pytree(task.trainable)
    return fed_avg.fed_avg(
      task.loss_fn,
      client,
      server,
      channel=compose(cell, start),
      aggregate=aggregators.uniform_mean(),
      **parts,
    )

  return fn


def quantised(cell, start):
  """Every entry, in `density` of 32 bits, both ways."""
  del start
  bits = round(32 * cell.density)
  return channels.Channel(
    compression.uniform(bits, block=64), compression.uniform(bits, block=64)
  )


METHODS = {
  "dense": dense,
  "FLASC": _flasc(),
  "FLASC, download alone": _flasc(up=1.0),
  "FLASC, upload alone": _flasc(down=1.0),
  "SparseAdapter": sparse_adapter,
  "Adapter-LTH": adapter_lth,
  "Federated Select": _federated_select(1),
  "Federated Select, no warm-up": _federated_select(0),
  "quantised": _composed(quantised),
}
