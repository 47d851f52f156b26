"""Federated Select: clients receive, train and send a part of the model.

Charles et al., "Federated Select: A Primitive for Communication- and
Memory-Efficient Federated Learning", 2022 (arXiv 2208.09432), in the version of
FLASC's authors for LoRA: in every round the server sends the largest trainable
parameters, or the largest ranks, and clients train nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optax

from fedjax_llm.compression import base, grouped, sparse
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  factors,
  rounds,
)
from fedjax_llm.federated.algorithms import fed_avg


def federated_select(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: densities.Density,
  warm_up_rounds: int = 1,
  top_k: sparse.TopK = sparse.top_k,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Federated Select, unstructured: clients train the round's Top-K only.

  Without a dense first round, LoRA can be stuck for ever (the authors' code has
  none). `b` is zero at the start, so a Top-K that `a` and a head fill has no
  entry of `b`. Entries that are not received are not trained, so `b` stays
  zero, and while it is zero `a` has no gradient: only a head learns. One dense
  round, the default here and in SparseAdapter, helps if it moves entries of `b`
  far enough to be among the largest. If not, select from `a` and `b`
  separately: `top_k=partial(grouped.top_k_per_group, parameters.owners(tree))`.

  The support travels down. The update has the same support, so only values
  travel up.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: the share of the parameters that is sent, in (0, 1]; or a mapping
      from rounds, counted from 0 after the warm-up, to the shares that begin
      there.
    warm_up_rounds: the number of dense first rounds; 0 in the authors' code.
    top_k: a function from a density to the compressor of downloads.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a density or `warm_up_rounds` is out of range.
  """
  if warm_up_rounds < 0:
    raise ValueError(f"expected {warm_up_rounds=} to be 0 or more.")
  stages = {0: channels.Channel()} | {
    warm_up_rounds + begin: _channel(share, top_k)
    for begin, (share,) in densities.stages(density).items()
  }
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel=stages,
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )


def _channel(density, top_k):
  if density == 1:
    return channels.Channel()
  return received_alone(top_k(density))


def received_alone(
  download: base.Compressor,
  support: Callable[[Any], Any] = sparse.support,
) -> channels.Channel:
  """Returns a channel whose clients train and send only what they received.

  Both ends know the support, so only values travel up.

  Args:
    download: a compressor that sends some entries of the parameters.
    support: a function from a payload to a mask of the entries that it has.
  """
  return channels.Channel(
    download=download,
    upload=lambda payload: sparse.select(support(payload), payload.values.size),
    trains=support,
  )


def federated_select_ranks(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  ranks: Sequence[int],
  of_client: Callable[[Any], Any] | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Federated Select, structured: the largest ranks of every LoRA pair.

  A rank is a column of `a` and its row of `b`, which travel and are trained
  together; each layer has its own choice of ranks. The largest ranks have the
  largest norm of column and row as one vector. The norm of their product would
  not work: it is zero for all ranks at the start, and later for all ranks that
  were never chosen. Parameters in no pair, such as a head, travel and are
  trained whole. Values and the numbers of their ranks travel down; only values
  travel up.

  The code of FLASC's authors chooses columns and rows independently. So they do
  not match, and a client has more ranks than it should.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    ranks: the number of ranks of a pair that each tier receives, the best tier
      last; a single tier if all clients are alike.
    of_client: a function from client numbers to tier numbers. If not given,
      client i is in tier i modulo tiers, as in the authors' code.
    aggregate: as in `federated_select`.
    population: as in `federated_select`.
    placement: as in `federated_select`.

  Raises:
    ValueError: from `init`, if there is no tier, if there are no LoRA pairs, or
      if a rank is not in [1, rank of the pairs].
  """

  def tiers(trainable):
    owners, rows = factors.rank_owners(trainable)
    support = functools.partial(grouped.support, owners=owners)
    each = [
      received_alone(
        grouped.top_k_groups(owners, rows, [x] * len(rows)), support
      )
      for x in ranks
    ]
    return channels.Tiers(each, of_client)

  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel=tiers,
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )
