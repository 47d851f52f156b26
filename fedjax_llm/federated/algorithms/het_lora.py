"""HetLoRA: clients of different ranks, truncated down and padded up.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of
On-Device Foundation Models", 2024 (arXiv 2401.06432); and the simple one that
FLASC's authors compare with under that name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  factors,
  product_aggregation,
  rounds,
)
from fedjax_llm.federated.algorithms import fed_avg


def zero_padded_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  ranks: Sequence[int] = (1, 4, 16),
  of_client: Callable[[Any], Any] | None = None,
  upload: base.Compressor | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Truncation to a client's rank, and the plain mean of padded updates.

  A rank that only some tiers send is still divided by all clients.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    ranks: the rank of each tier, see `factors.tiers`; the best last. The
      default is that of FLASC's authors.
    of_client: numbers of clients -> numbers of their tiers.
    upload: compresses the updates; None for no compression.
    aggregate: from updates to one; the uniform mean if not given.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if a rank is out of range.
  """
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel=lambda trainable: factors.tiers(
      trainable, ranks, of_client, upload
    ),
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )


def het_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  ranks: Sequence[int] = (1, 4, 16),
  of_client: Callable[[Any], Any] | None = None,
  decay: float = 0.99,
  penalty: float = 0.01,
  population: int,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """HetLoRA: truncation, rank self-pruning, weights by norms.

  A client of rank r receives the first r ranks. It trains under a penalty on
  its last ranks, from `cut = max(1, floor(decay * r))` on: the Frobenius norm
  of these columns of `a` times that of these rows of `b`, summed over all
  modules. If this sum is smaller after training than before, the client has
  rank `cut` from then on, and sends only so many ranks. The server replaces its
  factors by the mean of the clients', padded with zeros and weighted by
  `||a_k b_k||`, the Frobenius norm of all modules' products together. So a rank
  that no client in a round has becomes zero in both factors. It is lost: no
  client can train it again.

  The paper describes one module. Here a client has one rank and one weight for
  all modules, and heads are averaged by these weights too. If all products are
  zero, every client counts once. A message's length tells the client's rank.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the server's parameters minus the mean; the paper
      replaces: `optax.sgd(1.0)`.
    ranks: the rank of each tier before any pruning, see `factors.tiers`.
    of_client: numbers of clients -> numbers of their tiers.
    decay: the share of the ranks that a pruning keeps, in (0, 1]; 1 for no
      pruning and no penalty.
    penalty: the weight of the penalty in the loss, at least 0.
    population: the number of clients.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm. Its state is a `rounds.ServerState` whose `upload` is the
    rank of each client, int32 [population].

  Raises:
    ValueError: if `decay` or `penalty` is out of range; from `init`, if a rank
      is.
  """
  if not 0 < decay <= 1 or penalty < 0:
    raise ValueError(
      f"expected decay in (0, 1] and penalty >= 0, got {decay=}, {penalty=}."
    )

  def penalised(trainable, shared, examples, mask, key):
    frozen, cut = shared
    total, count = loss_fn(trainable, frozen, examples, mask, key)
    pull = penalty * _tail(trainable, cut)
    # Its value is subtracted again: the reported loss is that of the data.
    return total + count * (pull - jax.lax.stop_gradient(pull)), count

  def answer(shared, client):
    rank = client.memory
    vector, unravel = ravel_pytree(shared.trainable)
    owners = factors.entry_ranks(shared.trainable)
    largest = factors.rank(shared.trainable)
    cuts = [max(1, int(decay * x)) for x in range(largest + 1)]
    cut = jnp.array(cuts, jnp.int32)[rank]
    start = jnp.where(owners < rank, vector, 0)
    training = client.train(unravel(start), (shared.frozen, cut))
    is_pruned = _tail(training.trainable, cut) < _tail(unravel(start), cut)
    rank = jnp.where(is_pruned, cut, rank)
    trained, _ = ravel_pytree(training.trainable)
    padded = jnp.where(owners < rank, trained, 0)
    received = (vector - padded, _norm(unravel(padded)))
    sizes = _sizes(shared.trainable)[rank]
    message = channels.Message(received, rank, *sizes)
    return answers.Answer(training, start - trained, message, start - padded)

  algorithm = rounds.federated_round(
    clients.local_update(penalised, client_optimizer),
    server_optimizer,
    aggregate=_weighted_by_norms(),
    placement=placement,
    answer=answer,
  )

  def init(trainable):
    tiers = factors.tiers(trainable, ranks, of_client)
    tier = tiers.of_client(jnp.arange(population))
    own = jnp.array(ranks, jnp.int32)[tier]
    own = clients.replicate(own, algorithm.placement)
    return algorithm.init(trainable)._replace(upload=own)

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = algorithm.round(state, frozen, examples, cohort, key)
    own = answers.take(state.upload, cohort.clients)
    nbytes, entries = _sizes(state.trainable)[own].T
    sizes = {"download_bytes": nbytes, "download_entries": entries}
    return after, metrics | sizes

  return algorithm._replace(init=init, round=round_fn)


def _weighted_by_norms() -> aggregators.Aggregator:
  """The mean of updates that come with the norms to weight them by.

  If all norms are zero, every client counts once.
  """
  mean, alike = aggregators.weighted_mean(), aggregators.uniform_mean()

  def share(received, weight, state):
    update, norm = received
    by_norm = mean.share(update, jnp.where(weight > 0, norm, 0), state)
    return by_norm, alike.share(update, weight, state)

  def finish(total, state, key):
    (by_norm, norm), once = total
    weighted, _ = mean.finish((by_norm, norm), state, key)
    plain, _ = alike.finish(once, state, key)
    return jnp.where(norm > 0, weighted, plain), state

  return aggregators.Aggregator(lambda: (), share, finish)


def _norm(trainable):
  """The Frobenius norm of all products together."""
  squares = map(factors.squared_norm, factors.pairs(trainable).values())
  return jnp.sqrt(jnp.maximum(sum(squares), 0))


def _tail(trainable, cut):
  """The strength of the ranks from `cut` on, summed over all modules."""

  def strength(pair):
    last = (jnp.arange(pair.a.shape[-1]) >= cut).astype(pair.a.dtype)
    a, b = jnp.sum(pair.a**2, axis=-2), jnp.sum(pair.b**2, axis=-1)
    square = (a @ last) * (b @ last)
    # Where a norm is zero, its gradient counts as zero.
    root = jnp.sqrt(jnp.where(square == 0, 1, square))
    return jnp.sum(jnp.where(square == 0, 0, root))

  return sum(map(strength, factors.pairs(trainable).values()))


def _sizes(trainable):
  """Bytes and entries of a message by rank, from 0 on: int32 [ranks + 1, 2]."""
  vector, _ = ravel_pytree(trainable)
  owners = factors.entry_ranks(trainable)
  counts = [int(np.sum(owners < x)) for x in range(factors.rank(trainable) + 1)]
  sizes = [product_aggregation.size(x, vector.dtype) for x in counts]
  return jnp.array(sizes, jnp.int32)
