"""Federated Select: clients receive, train and send a part of the model.

Charles et al., "Federated Select: A Primitive for Communication- and
Memory-Efficient Federated Learning", 2022 (arXiv 2208.09432), as FLASC's
authors have it for LoRA: every round the server sends the largest of the
trainable parameters, or the largest ranks, and clients train nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from fedjax_llm.compression import base, groups, sparse
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  factors,
  rounds,
  schedules,
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
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Federated Select, unstructured: the Top-K of the round, trained alone.

  Without a dense round before, as in the authors' code, LoRA can be stuck for
  ever: `b` is zero at the start, so a Top-K that `a` and a head fill has none
  of it; what was not received is not trained, so `b` stays zero; and as long as
  it is, `a` has no gradient. Then a head is all that learns. One dense round,
  the default, which SparseAdapter has as well, sets `b` free if it leaves some
  of it among the largest parameters: `b` must have moved far enough. Else take
  the largest of `a` and of `b` apart:
  `top_k=partial(sparse.top_k_per_group, parameters.owners(trainable))`.

  The support travels down; what comes back is of the same support, so values
  alone travel up.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: share of the parameters that is sent, in (0, 1]; or such shares by
      the round they begin with, from 0 on, counted without the warm-up.
    warm_up_rounds: how many rounds are dense at first; 0 for the authors' code.
    top_k: from a density to what sends the largest parameters.
    **parts: `aggregate` (the uniform mean unless told otherwise), `population`,
      `placement` of `rounds.federated_round`.

  Raises:
    ValueError: if a density or `warm_up_rounds` is out of range.
  """
  if warm_up_rounds < 0:
    raise ValueError(f"expected {warm_up_rounds=} to be 0 or more.")
  parts = {"aggregate": aggregators.uniform_mean()} | parts
  stages = {
    warm_up_rounds + begin: share
    for begin, (share,) in densities.stages(density).items()
  }
  return schedules.staged(
    {
      begin: fed_avg.fed_avg(
        loss_fn,
        client_optimizer,
        server_optimizer,
        channel=_channel(share, top_k),
        **parts,
      )
      for begin, share in ({0: 1.0} | stages).items()
    }
  )


def _channel(density, top_k):
  if density == 1:
    return channels.Channel()
  return received_alone(top_k(density))


def received_alone(
  download: base.Compressor,
  support: Callable[[Any], Any] = sparse.support,
) -> channels.Channel:
  """Clients train and send what they received: its support is known above.

  Args:
    download: of some entries of the parameters.
    support: which entries a payload of it holds.
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
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Federated Select, structured: the largest ranks of every LoRA pair.

  A rank is a column of `a` and its row of `b`, which travel and are trained
  together; each layer has its own choice of them. The largest are those of
  which both as one vector have the largest norm: the norm of their product is
  zero for all at the start, and later for all that were not chosen then, so
  that it would never choose others. What is in no pair, such as a head, travels
  and is trained whole. Down travel values and which ranks they are of, up
  values alone.

  The code of FLASC's authors chooses columns and rows each for themselves, so
  that they do not match, and a client holds more ranks than it should.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    ranks: how many ranks of a pair each tier of clients receives, the best
      last; one of them, if all clients are alike.
    of_client: numbers of clients -> numbers of their tiers; None to deal them
      out in turn, as the authors do.
    **parts: as of `federated_select`.

  Raises:
    ValueError: from `init`, if there is no tier, if there are no LoRA pairs, or
      if a rank is not in [1, that of the pairs].
  """
  tier = of_client or (lambda client: client % len(ranks))
  parts = {"aggregate": aggregators.uniform_mean()} | parts

  def of(trainable):
    owners, rows = _rank_owners(trainable)
    support = functools.partial(groups.support, owners=owners)
    each = [
      received_alone(
        groups.top_k_groups(owners, rows, [x] * len(rows)), support
      )
      for x in ranks
    ]
    return fed_avg.fed_avg(
      loss_fn,
      client_optimizer,
      server_optimizer,
      channel=channels.Tiers(each, tier),
      **parts,
    )

  return rounds.FederatedAlgorithm(
    init=lambda trainable: of(trainable).init(trainable),
    round=lambda state, *rest: of(state.trainable).round(state, *rest),
    received=lambda state, key: of(state.trainable).received(state, key),
  )


def _rank_owners(trainable):
  """Which rank of which layer each entry is of, and the ranks of each layer."""
  owners = jax.tree.map(lambda x: np.full(np.shape(x), -1), trainable)
  numbered, rows, count = {}, [], 0
  for path, pair in factors.pairs(trainable).items():
    *layers, _, rank = pair.a.shape
    number = count + np.arange(np.prod(layers, dtype=int) * rank)
    number = number.reshape(*layers, rank)
    numbered[path] = factors.Pair(
      np.broadcast_to(number[..., None, :], pair.a.shape),
      np.broadcast_to(number[..., :, None], pair.b.shape),
    )
    rows += [rank] * (number.size // rank)
    count += number.size
  owners = factors.put(owners, numbered)
  return np.concatenate([x.ravel() for x in jax.tree.leaves(owners)]), rows
