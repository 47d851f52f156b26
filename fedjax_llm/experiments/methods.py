"""All federated methods by name, made from the same few settings.

`configs/methods.py` runs one on the command line; `benchmarks/flasc` compares
them. What each method sends and trains is in `docs/methods.md`.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, grouped, levels, quantize, sparse
from fedjax_llm.experiments import knobs, tasks
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  parameters,
)
from fedjax_llm.federated.algorithms import (
  delta_downloads,
  eco_lora,
  ef21,
  fed_avg,
  fed_ex_lora,
  fed_sa_lora,
  fed_sb,
  fed_srd,
  federated_select,
  fetch_sgd,
  flasc,
  flex_lora,
  flora,
  freezing,
  het_lora,
  pruning,
  scaffold,
)


class Recipe(NamedTuple):
  """The settings that methods are made from; each uses some of them.

  Attributes:
    task: the model and the data.
    rates: the learning rates, and the clients' optimizer.
    server: the server's optimizer.
    density: share of the entries that a sparse method sends.
    upload_density: share of the entries in FLASC's uploads.
    rank: rank of the LoRA factors.
    rounds: number of rounds.
    warm_up_rounds: dense rounds before Federated Select.
    aggregate: the aggregator; None for the method's own.
  """

  task: tasks.Task
  rates: knobs.Rates
  server: optax.GradientTransformation
  density: float
  upload_density: float
  rank: int
  rounds: int
  warm_up_rounds: int = 1
  aggregate: aggregators.Aggregator | None = None

  @property
  def client(self) -> optax.GradientTransformation:
    """The clients' optimizer."""
    return self.rates.client

  @property
  def parts(self) -> dict[str, Any]:
    """The keyword arguments of all methods."""
    parts: dict[str, Any] = {
      "population": len(self.task.population.names),
      "placement": self.task.placement,
    }
    return parts | ({"aggregate": self.aggregate} if self.aggregate else {})

  @property
  def optimizers(self) -> tuple[Any, Any, Any]:
    """The first three arguments of most methods."""
    return self.task.loss_fn, self.client, self.server

  @property
  def averaging(self) -> tuple[Any, Any, Any]:
    """The same arguments with a server that adds the mean update as it is."""
    return self.task.loss_fn, self.client, optax.sgd(1.0)

  @property
  def ranks(self) -> tuple[int, ...]:
    """The ranks of three tiers: a sixteenth, a quarter and all of `rank`."""
    return tuple(max(1, self.rank // share) for share in (16, 4, 1))


Make = Callable[[Recipe], Any]


def _adaptive(server: Callable[[float], Any]) -> Make:
  return lambda k: fed_avg.fed_avg(
    k.task.loss_fn, k.client, server(k.rates.server_learning_rate), **k.parts
  )


def _fed_prox(k: Recipe) -> Any:
  client = optax.chain(clients.proximal(0.01), k.client)
  return fed_avg.fed_avg(k.task.loss_fn, client, optax.sgd(1.0), **k.parts)


def _flasc_tiers(k: Recipe) -> Any:
  shares = [rank / k.rank for rank in k.ranks]
  tiers = list(zip(shares, shares, strict=True))
  return flasc.flasc_tiers(*k.optimizers, tiers=tiers, **k.parts)


def _error_feedback(k: Recipe) -> Any:
  upload = base.error_feedback(sparse.top_k(k.density))
  channel = channels.Channel(upload=upload)
  return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)


def _fetch_sgd(k: Recipe) -> Any:
  """Sends sketches with `density` * n cells; a tenth as many entries move."""
  vector, _ = ravel_pytree(k.task.trainable)
  return fetch_sgd.fetch_sgd(
    k.task.loss_fn,
    k.client,
    rows=5,
    columns=max(1, round(k.density * vector.size / 5)),
    density=k.density / 10,
    settle=fetch_sgd.clear,
    **k.parts,
  )


def _quantised(k: Recipe) -> Any:
  """Sends each entry in 32 * `density` bits: 1 to 6 bits, or 8."""
  bits = max(1, min(8, round(32 * k.density)))
  coarse = (
    quantize.lloyd_max(bits) if bits < 7 else levels.stochastic_uniform(8)
  )
  start, _ = ravel_pytree(k.task.trainable)
  channel = channels.Channel(base.relative_to(start, coarse), coarse)
  return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)


def apart(k: Recipe) -> Callable[[float], base.Compressor]:
  """Returns a Top-K with three groups: all `a`, all `b`, and the head."""
  owners = parameters.owners(k.task.trainable)
  return functools.partial(grouped.top_k_per_group, owners)


def _adapter_lth(k: Recipe) -> Any:
  schedule = densities.decaying(
    1.0,
    k.density ** (1 / 3),
    every=math.ceil(k.rounds / 6),
    rounds=k.rounds,
    floor=k.density,
  )
  return pruning.adapter_lth(
    *k.optimizers, density=schedule, top_k=apart(k), **k.parts
  )


def _scale(k: Recipe) -> float:
  return k.task.adapter.scale if k.task.adapter else 1.0


METHODS: dict[str, Make] = {
  "fed_avg": lambda k: fed_avg.fed_avg(*k.averaging, **k.parts),
  "fed_adam": _adaptive(fed_avg.fed_adam),
  "fed_yogi": _adaptive(fed_avg.fed_yogi),
  "fed_adagrad": _adaptive(fed_avg.fed_adagrad),
  "fed_avg_m": _adaptive(fed_avg.fed_avg_m),
  "fed_adamw": lambda k: fed_avg.fed_avg(*k.optimizers, **k.parts),
  "fed_prox": _fed_prox,
  "scaffold": lambda k: scaffold.scaffold(
    k.task.loss_fn, k.rates.client_learning_rate, optax.sgd(1.0), **k.parts
  ),
  "full_fine_tuning": lambda k: fed_avg.fed_avg(*k.optimizers, **k.parts),
  "linear_probe": lambda k: freezing.linear_probe(*k.optimizers, **k.parts),
  "flasc": lambda k: flasc.flasc(
    *k.optimizers,
    download_density=k.density,
    upload_density=k.upload_density,
    **k.parts,
  ),
  "flasc_tiers": _flasc_tiers,
  "top_k_with_error_feedback": _error_feedback,
  "ef21": lambda k: ef21.ef21(
    *k.averaging, upload=sparse.top_k(k.density), **k.parts
  ),
  "fetch_sgd": _fetch_sgd,
  "quantised": _quantised,
  "delta_downloads": lambda k: delta_downloads.delta_downloads(
    *k.optimizers,
    download=quantize.lloyd_max(2),
    upload=quantize.lloyd_max(1),
    **k.parts,
  ),
  "sparse_adapter": lambda k: pruning.sparse_adapter(
    *k.optimizers, density=k.density, top_k=apart(k), **k.parts
  ),
  "adapter_lth": _adapter_lth,
  "federated_select": lambda k: federated_select.federated_select(
    *k.optimizers,
    density=k.density,
    warm_up_rounds=k.warm_up_rounds,
    top_k=apart(k) if k.warm_up_rounds else sparse.top_k,
    **k.parts,
  ),
  "federated_select_ranks": lambda k: federated_select.federated_select_ranks(
    *k.optimizers, ranks=k.ranks, **k.parts
  ),
  "zero_padded_lora": lambda k: het_lora.zero_padded_lora(
    *k.optimizers, ranks=k.ranks, **k.parts
  ),
  "het_lora": lambda k: het_lora.het_lora(
    *k.averaging, ranks=k.ranks, **k.parts
  ),
  "flex_lora": lambda k: flex_lora.flex_lora(
    k.task.loss_fn, k.client, ranks=k.ranks, **k.parts
  ),
  "flora": lambda k: flora.flora(
    k.task.loss_fn, k.client, scale=_scale(k), **k.parts
  ),
  "ffa_lora": lambda k: freezing.ffa_lora(*k.optimizers, **k.parts),
  "ro_lora": lambda k: freezing.ro_lora(*k.optimizers, **k.parts),
  "fed_sa_lora": lambda k: fed_sa_lora.fed_sa_lora(*k.optimizers, **k.parts),
  "fed_ex_lora": lambda k: fed_ex_lora.fed_ex_lora(
    k.task.loss_fn, k.client, scale=_scale(k), **k.parts
  ),
  "fed_sb": lambda k: fed_sb.fed_sb(
    *k.optimizers,
    bases=fed_sb.random_bases(jax.random.key(k.task.seed)),
    **k.parts,
  ),
  "eco_lora": lambda k: eco_lora.eco_lora(
    *k.optimizers,
    segment_count=4,
    a_densities=(k.density, 1.0),
    b_densities=(k.density, 1.0),
    **k.parts,
  ),
  "fed_srd": lambda k: fed_srd.fed_srd(
    k.task.loss_fn,
    k.client,
    upload_density=k.density,
    download_density=k.density,
    **k.parts,
  ),
}
# Methods that take a private mean as their `aggregate`.
PRIVATE = ("fed_adamw", "flasc", "ffa_lora", "full_fine_tuning", "linear_probe")
# The names, as choices of a command line.
if TYPE_CHECKING:
  Method = str
else:
  Method = Literal[tuple(METHODS)]
