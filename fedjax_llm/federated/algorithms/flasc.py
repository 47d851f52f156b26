"""FLASC: federated LoRA with sparse messages and dense local training.

Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication", 2024
(arXiv 2406.05233). The server sends the Top-K of the trainable parameters,
selected over all of them together. Clients start from these, with zeros
elsewhere, train every entry, and answer with the Top-K of their own update.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from fedjax_llm.compression import sparse
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  rounds,
)
from fedjax_llm.federated.algorithms import fed_avg


def flasc(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  download_density: densities.Density,
  upload_density: densities.Density,
  top_k: sparse.TopK = sparse.top_k,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FLASC (Algorithm 1); if both densities are 1, dense federated LoRA.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the authors use `optax.sgd(rate, momentum=0.9)`.
    server_optimizer: the authors use `server_adamw`.
    download_density: the share of the parameters that is sent, in (0, 1]; or a
      mapping from rounds to the shares that begin there, see
      `densities.decaying`.
    upload_density: the share of an update that is sent; or a mapping, as above.
    top_k: a function from a density to the compressor of downloads. The paper
      takes one Top-K of all parameters, which leaves out `b` while it is
      smaller than `a`. See also `grouped.top_k_per_group`, and
      `compression.relative_to` for the Top-K of what has changed.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a density is out of range.
  """
  stages = densities.stages(download_density, upload_density)
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel={
      begin: _channel(down, up, top_k) for begin, (down, up) in stages.items()
    },
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )


def flasc_tiers(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  tiers: Sequence[tuple[float, float]],
  of_client: Callable[[Any], Any] | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FLASC for clients of different bandwidth, with densities for each tier.

  The mean is over all clients, even for an entry that only the last tier sends.
  The authors' code for tiers sends a task head whole, outside the Top-K of the
  download. Here one Top-K covers all parameters, as in FLASC itself.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the authors use `optax.sgd(rate, momentum=0.9)`.
    server_optimizer: the authors use `server_adamw`.
    tiers: the download and upload density of each tier, in (0, 1], the best
      last; the authors' are (1 / 16, 1 / 16), (1 / 4, 1 / 4), (1, 1).
    of_client: a function from client numbers to tier numbers. If not given,
      client i is in tier i modulo tiers, as in the authors' code.
    aggregate: as in `flasc`.
    population: as in `flasc`.
    placement: as in `flasc`.

  Raises:
    ValueError: if there is no tier, or a density is out of range.
  """
  each = [_channel(*shares) for shares in tiers]
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel=channels.Tiers(each, of_client),
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )


def _channel(download_density, upload_density, top_k=sparse.top_k):
  return channels.Channel(top_k(download_density), sparse.top_k(upload_density))


def server_adamw(
  learning_rate: float, weight_decay: float = 0.01
) -> optax.GradientTransformation:
  """The server optimizer of the authors' code, which the paper calls FedAdam.

  It is AdamW with torch's default decay of 0.01; optax's default is 1e-4.
  """
  return optax.adamw(learning_rate, weight_decay=weight_decay)
