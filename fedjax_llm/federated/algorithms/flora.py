"""FLoRA: the clients' factors are stacked, and merged into the base model.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language
Models with Heterogeneous Low-Rank Adaptations", 2024 (arXiv 2409.05976).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, sparse
from fedjax_llm.federated import (
  aggregators,
  clients,
  factors,
  product_aggregation,
  rounds,
)


def flora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  scale: float,
  ranks: Sequence[int] | None = None,
  of_client: Callable[[Any], Any] | None = None,
  upload: base.Compressor | None = None,
  population: int,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FLoRA: adds `sum_k p_k a_k b_k` to the kernels, and redraws the factors.

  If uploads are exact, the merged product is exact, whatever the clients' ranks
  are. `p_k` is client k's share of the cohort's examples, and its weight in the
  mean of the heads. There is no server optimizer: products are merged at rate
  1.

  A client uploads the update of its factors. It downloads the stacked factors
  of all clients of each round that it missed, or the dense sum of their
  products if that is shorter. The new factors, `a` random and `b` zero, cost
  nothing: both ends draw them from the experiment's seed and the round. A
  client keeps the merged model between its rounds. The paper's clients take
  part in every round.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the paper's is AdamW.
    scale: `LoRA.scale`, the same for all ranks.
    ranks: the rank of each tier, see `factors.tiers`; None for one tier of the
      full rank.
    of_client: numbers of clients -> numbers of their tiers.
    upload: compresses the updates; None for no compression.
    population: the number of clients.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if a rank is out of range.
  """

  def tiers_of(trainable):
    own = ranks or [factors.rank(trainable)]
    tiers = factors.tiers(trainable, own, of_client, upload)
    vector, _ = ravel_pytree(trainable)
    owners = factors.entry_ranks(trainable)
    heads = sparse.select(owners < 0)

    def with_known(channel, rank):
      known = jnp.where((owners >= 0) & (owners < rank), vector, 0)
      download = base.relative_to(known, heads)
      return dataclasses.replace(channel, download=download)

    return tiers._replace(channels=[*map(with_known, tiers.channels, own)])

  def combine(trainable, trained, weights, key):
    present, weights = weights > 0, aggregators.normalised(weights)
    pairs = factors.pairs(trainable)
    keys = dict(zip(pairs, jax.random.split(key, len(pairs)), strict=True))
    anew = {path: factors.redraw(x, keys[path]) for path, x in pairs.items()}
    return product_aggregation.Combined(
      trainable=factors.put(aggregators.weighted_sum(trained, weights), anew),
      added=factors.stacks(trained, weights),
      forwarded=present,
    )

  return product_aggregation.product_round(
    clients.local_update(loss_fn, client_optimizer),
    combine,
    tiers_of,
    ranks=ranks,
    scale=scale,
    population=population,
    placement=placement,
  )
