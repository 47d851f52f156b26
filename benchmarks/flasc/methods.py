"""What the study compares: each method as it is composed from the library."""

import functools
import math
from typing import Any

import optax
from jax.flatten_util import ravel_pytree

from benchmarks import problems, study
from fedjax_llm import compression
from fedjax_llm.compression import sparse
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated import (
  aggregators,
  channels,
  densities,
  network,
  parameters,
  rounds,
)
from fedjax_llm.federated.algorithms import (
  delta_downloads,
  fed_avg,
  federated_select,
  flasc,
  flex_lora,
  freezing,
  het_lora,
  pruning,
)
from fedjax_llm.federated.privacy import guarantees, mechanisms


def experiment(cell: study.Cell) -> tuple[tasks.Task, runner.Experiment]:
  """The task of a cell, and its method run on it."""
  knobs = dict(cell.knobs)
  task = problems.make(cell, knobs)
  made = finetuning.federated(
    task,
    make(cell, task, knobs),
    rounds=cell.rounds,
    **problems.training(cell, knobs),
    **options(cell, knobs),
  )
  return task, made


def make(
  cell: Any, task: Any, knobs: dict[str, Any]
) -> rounds.FederatedAlgorithm:
  """The algorithm of a cell."""
  parts = dict(
    placement=task.placement,
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
  options: dict[str, Any] = {}
  if "network" in knobs:
    options["network"] = network.Network(tiers=TIERS, seed=cell.seed)
  if "epsilon" in knobs:
    options["sampling"] = "poisson"
  return options


def dense(cell, task, client, server, knobs, parts):
  return _flasc(1.0, 1.0)(cell, task, client, server, knobs, parts)


def _flasc(down=None, up=None, top_k=None):
  """FLASC with the cell's density in the directions that have none."""

  def fn(cell, task, client, server, knobs, parts):
    return flasc.flasc(
      task.loss_fn,
      client,
      server,
      download_density=down or cell.density,
      upload_density=up or cell.density,
      top_k=top_k(task) if top_k else sparse.top_k,
      **parts,
    )

  return fn


def _apart(task):
  """The largest of `a`, of `b` and of a head, each a Top-K of its own."""
  owners = parameters.owners(task.trainable)
  return functools.partial(sparse.top_k_per_group, owners)


def _moved(task):
  """What has moved most since the start, which the seed draws at both ends."""
  start, _ = ravel_pytree(task.trainable)
  return lambda density: compression.relative_to(start, sparse.top_k(density))


def _pruned(make, top_k=_apart, schedule=None, **options):
  """A baseline that trains what it downloads."""

  def fn(cell, task, client, server, knobs, parts):
    return make(
      task.loss_fn,
      client,
      server,
      density=schedule(cell) if schedule else cell.density,
      top_k=top_k(task),
      **options,
      **parts,
    )

  return fn


def _global(task):
  """One Top-K of everything, as FLASC's authors have the baselines."""
  del task
  return sparse.top_k


def _thirds(cell):
  """Pruned in three steps, which are over after half of the rounds."""
  return densities.decaying(
    1.0,
    cell.density ** (1 / 3),
    every=math.ceil(cell.rounds / 6),
    rounds=cell.rounds,
    floor=cell.density,
  )


# Every entry: two bits of what has changed down, one of the update up.
_COMPACT: dict[str, Any] = dict(
  download=compression.lloyd_max(2), upload=compression.lloyd_max(1)
)


def compact(cell, task, client, server, knobs, parts):
  parts = {**_COMPACT, **parts}
  return delta_downloads.delta_downloads(task.loss_fn, client, server, **parts)


def compact_b(cell, task, client, server, knobs, parts):
  """The same of `b` alone: `a` stays where the seed has it."""
  parts = {**_COMPACT, **parts}
  make = delta_downloads.delta_downloads
  return freezing.ffa_lora(task.loss_fn, client, server, make=make, **parts)


def quantised(cell, task, client, server, knobs, parts):
  """Every entry in `density` of 32 bits, both ways."""
  start, _ = ravel_pytree(task.trainable)
  bits = round(32 * cell.density)
  return fed_avg.fed_avg(
    task.loss_fn,
    client,
    server,
    channel=channels.Channel(
      compression.relative_to(start, compression.lloyd_max(bits)),
      compression.lloyd_max(bits),
    ),
    aggregate=aggregators.uniform_mean(),
    **parts,
  )


def coarse(cell, task, client, server, knobs, parts):
  """Every entry, for clients that keep nothing: four bits down, one up."""
  start, _ = ravel_pytree(task.trainable)
  return fed_avg.fed_avg(
    task.loss_fn,
    client,
    server,
    channel=channels.Channel(
      compression.relative_to(start, compression.lloyd_max(4)),
      compression.lloyd_max(1),
    ),
    aggregate=aggregators.uniform_mean(),
    **parts,
  )


# Clients in turn: upload sixteen, eight and four times slower than download.
TIERS = (
  network.Link(4, 0.25, 0.1, 0.2),
  network.Link(16, 2, 0.05, 0.1),
  network.Link(64, 16, 0.02, 0.05),
)
RANKS = (1, 4, 16)


def flasc_tiers(cell, task, client, server, knobs, parts):
  each = [(rank / RANKS[-1], rank / RANKS[-1]) for rank in RANKS]
  return flasc.flasc_tiers(task.loss_fn, client, server, tiers=each, **parts)


def zero_padded_lora(cell, task, client, server, knobs, parts):
  return het_lora.zero_padded_lora(
    task.loss_fn, client, server, ranks=RANKS, **parts
  )


def select_ranks(cell, task, client, server, knobs, parts):
  return federated_select.federated_select_ranks(
    task.loss_fn, client, server, ranks=RANKS, **parts
  )


def het(cell, task, client, server, knobs, parts):
  del server  # The paper's replaces.
  return het_lora.het_lora(
    task.loss_fn, client, optax.sgd(1.0), ranks=RANKS, **parts
  )


def flex(cell, task, client, server, knobs, parts):
  del server  # The method has none.
  return flex_lora.flex_lora(task.loss_fn, client, ranks=RANKS, **parts)


def _private(make):
  """Under client-level privacy, as if there were `cohort_factor` times more.

  A larger population is simulated by less noise: that of a cohort so many times
  larger is divided among the clients there are.
  """

  def fn(cell, task, client, server, knobs, parts):
    factor, cohort = knobs["cohort_factor"], knobs["clients_per_round"]
    guarantee = guarantees.ClientLevel(
      noise_multiplier=1.0,
      delta=knobs["delta"],
      sampling="poisson",
      population=factor * len(task.population.names),
      clients_per_round=factor * cohort,
    )
    noise = guarantees.noise_multiplier_for(
      knobs["epsilon"], cell.rounds, guarantee
    )
    aggregate = mechanisms.adaptive_private_mean(
      initial_clip_norm=1.0,
      quantile=0.5,
      noise_multiplier=noise / factor,
      count_noise=max(cohort / 20, noise / factor),
      clients=cohort,
    )
    return make(
      cell, task, client, server, knobs, {**parts, "aggregate": aggregate}
    )

  return fn


def ffa(cell, task, client, server, knobs, parts):
  return freezing.ffa_lora(
    task.loss_fn,
    client,
    server,
    **{"aggregate": aggregators.uniform_mean()} | parts,
  )


METHODS = {
  "dense": dense,
  "FLASC": _flasc(),
  "FLASC, download alone": _flasc(up=1.0),
  "FLASC, upload alone": _flasc(down=1.0),
  "FLASC, factors apart": _flasc(top_k=_apart),
  "FLASC, what moved": _flasc(top_k=_moved),
  "SparseAdapter": _pruned(pruning.sparse_adapter),
  "Adapter-LTH": _pruned(pruning.adapter_lth, schedule=_thirds),
  "Federated Select": _pruned(federated_select.federated_select),
  "SparseAdapter, one Top-K": _pruned(pruning.sparse_adapter, _global),
  "Federated Select, one Top-K": _pruned(
    federated_select.federated_select, _global
  ),
  "Federated Select, no warm-up": _pruned(
    federated_select.federated_select, _global, warm_up_rounds=0
  ),
  "quantised": quantised,
  "coarse": coarse,
  "compact": compact,
  "compact, b alone": compact_b,
  "FFA-LoRA": ffa,
  "FLASC tiers": flasc_tiers,
  "zero-padded ranks": zero_padded_lora,
  "HetLoRA": het,
  "FlexLoRA": flex,
  "Federated Select, ranks": select_ranks,
  "dense, private": _private(dense),
  "FLASC, private": _private(_flasc()),
  "FFA-LoRA, private": _private(ffa),
}
