"""What the study compares: registered methods, and variants of them.

All clients weigh alike, as in FLASC.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.flatten_util import ravel_pytree

from benchmarks import problems, study
from fedjax_llm import compression
from fedjax_llm.compression import sparse
from fedjax_llm.experiments import finetuning, methods, runner, tasks
from fedjax_llm.experiments import knobs as rates
from fedjax_llm.federated import channels, network
from fedjax_llm.federated.algorithms import (
  delta_downloads,
  fed_avg,
  federated_select,
  flasc,
  freezing,
  pruning,
)
from fedjax_llm.federated.privacy import guarantees, mechanisms


def experiment(cell: study.Cell) -> tuple[tasks.Task, runner.Experiment]:
  """The task of a cell, and its method run on it."""
  knobs = dict(cell.knobs)
  task = problems.make(cell, knobs)
  recipe = recipe_of(cell, task, knobs)
  links = None
  if "network" in knobs:
    links = network.Network(tiers=network.ASYMMETRIC, seed=cell.seed)
  made = finetuning.fine_tuning(
    task,
    problems.equal_clients(METHODS[cell.method](recipe)),
    problems.schedule(cell, knobs),
    network=links,
  )
  return task, made


def recipe_of(cell: Any, task: Any, knobs: dict[str, Any]) -> methods.Recipe:
  """What the method of a cell is made of."""
  return methods.Recipe(
    task=task,
    rates=rates.Rates(cell.client_rate, cell.server_rate),
    # In the state, so that cells of other rates share one compiled round.
    server=optax.inject_hyperparams(flasc.server_adamw)(cell.server_rate),
    density=cell.density,
    upload_density=cell.density,
    rank=cell.rank,
    rounds=cell.rounds,
    aggregate=private_mean(cell, task, knobs) if "epsilon" in knobs else None,
  )


def private_mean(cell, task, knobs):
  """Client-level privacy, as if there were `cohort_factor` times more clients.

  A larger population is simulated by less noise: that of a cohort so many times
  larger is divided among the clients there are.
  """
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
  return mechanisms.adaptive_private_mean(
    initial_clip_norm=1.0,
    quantile=0.5,
    noise_multiplier=noise / factor,
    count_noise=max(cohort / 20, noise / factor),
    clients=cohort,
  )


def registered(method: methods.Method, **changes: Any) -> methods.Make:
  """A registered method, with other settings if any are given."""
  return lambda k: methods.METHODS[method](k._replace(**changes))


def _flasc(top_k: Callable[[methods.Recipe], sparse.TopK]) -> methods.Make:
  """FLASC with another Top-K of the download."""
  return lambda k: flasc.flasc(
    *k.optimizers,
    download_density=k.density,
    upload_density=k.density,
    top_k=top_k(k),
    **k.parts,
  )


def _coded(
  bits: int, upload: compression.Compressor | None = None
) -> methods.Make:
  """FLASC whose values have few bits, with Top-K or `upload` on the way up."""

  def make(k):
    top_k = compression.chain(
      sparse.top_k(k.density), compression.lloyd_max(bits)
    )
    channel = channels.Channel(top_k, upload or top_k)
    return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)

  return make


def _moved(k):
  """What has moved most since the start, which the seed draws at both ends."""
  start, _ = ravel_pytree(k.task.trainable)
  return lambda density: compression.relative_to(start, sparse.top_k(density))


def _select(k):
  """Federated Select with one Top-K of everything, as in FLASC's code."""
  return federated_select.federated_select(
    *k.optimizers, density=k.density, **k.parts
  )


def _compact_b(k):
  """`delta_downloads` of `b` alone: `a` stays where the seed has it."""
  make = functools.partial(
    delta_downloads.delta_downloads,
    download=compression.lloyd_max(2),
    upload=compression.lloyd_max(1),
  )
  return freezing.ffa_lora(*k.optimizers, make=make, **k.parts)


def _coarse(k):
  """Every entry, for clients that keep nothing: four bits down, one up."""
  start, _ = ravel_pytree(k.task.trainable)
  channel = channels.Channel(
    compression.relative_to(start, compression.lloyd_max(4)),
    compression.lloyd_max(1),
  )
  return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)


_DENSE = dict(density=1.0, upload_density=1.0)
# By the names in the result files.
METHODS: dict[str, methods.Make] = {
  "dense": registered("flasc", **_DENSE),
  "FLASC": registered("flasc"),
  "FLASC, download alone": registered("flasc", upload_density=1.0),
  "FLASC, upload alone": registered("flasc", density=1.0),
  "FLASC, factors apart": _flasc(methods.apart),
  "FLASC, what moved": _flasc(_moved),
  "FLASC, 4 bits": _coded(4),
  "FLASC, 2 bits": _coded(2),
  "FLASC, 4 bits, EDEN up": _coded(4, compression.eden(0.5)),
  "FLASC, 4 bits, trellis up": _coded(
    4, compression.chain(compression.rotate(), compression.trellis(0.5))
  ),
  "SparseAdapter": registered("sparse_adapter"),
  "Adapter-LTH": registered("adapter_lth"),
  "Federated Select": registered("federated_select"),
  "SparseAdapter, one Top-K": lambda k: pruning.sparse_adapter(
    *k.optimizers, density=k.density, top_k=sparse.top_k, **k.parts
  ),
  "Federated Select, one Top-K": _select,
  "Federated Select, no warm-up": registered(
    "federated_select", warm_up_rounds=0
  ),
  "quantised": registered("quantised"),
  "coarse": _coarse,
  "compact": registered("delta_downloads"),
  "compact, b alone": _compact_b,
  "FFA-LoRA": registered("ffa_lora"),
  "linear probe": registered("linear_probe"),
  "FLASC tiers": registered("flasc_tiers"),
  "zero-padded ranks": registered("zero_padded_lora"),
  "HetLoRA": registered("het_lora"),
  "FlexLoRA": registered("flex_lora"),
  "Federated Select, ranks": registered("federated_select_ranks"),
  # With the private mean of the cell's epsilon.
  "dense, private": registered("flasc", **_DENSE),
  "FLASC, private": registered("flasc"),
  "FFA-LoRA, private": registered("ffa_lora"),
}
