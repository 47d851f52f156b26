"""HetLoRA: clients of different ranks, truncated down and padded up.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of
On-Device Foundation Models", 2024 (arXiv 2401.06432); and a simpler method that
FLASC's authors compare with and also call HetLoRA.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
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
  """Truncates downloads to a client's rank, and averages padded updates.

  For a rank that only some tiers send, the mean is still over all clients.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    ranks: the rank of each tier, see `factors.tiers`; the best last. The
      default is that of FLASC's authors.
    of_client: a function from client numbers to tier numbers.
    upload: compresses the updates; None for no compression.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
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


class State(NamedTuple):
  """What the server keeps between rounds: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters, of full rank.
    optimizer: the server optimizer's state.
    ranks: int32 [population], the rank of each client.
  """

  round: Any
  trainable: Any
  optimizer: Any
  ranks: Any


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
  rank `cut` from then on, and sends only its first `cut` ranks. The server
  replaces its factors by the mean of the clients' factors, padded with zeros
  and weighted by `||a_k b_k||`, the Frobenius norm of all modules' products
  together. So a rank that no client in a round has becomes zero in both
  factors. It is lost: no client can train it again.

  The paper describes one module. Here a client has one rank and one weight for
  all modules, and heads are averaged with the same weights. If all products are
  zero, every client counts once. The server sees a client's rank from the
  length of its message.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the server's parameters minus the mean;
      `optax.sgd(1.0)` replaces them by the mean, as in the paper.
    ranks: the rank of each tier before any pruning, see `factors.tiers`.
    of_client: a function from client numbers to tier numbers.
    decay: the share of the ranks that pruning keeps, in (0, 1]; 1 for no
      pruning and no penalty.
    penalty: the weight of the penalty in the loss, at least 0.
    population: the number of clients.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `decay` or `penalty` is out of range; from `init`, if a rank
      is out of range.
  """
  if not 0 < decay <= 1 or penalty < 0:
    raise ValueError(
      f"expected decay in (0, 1] and penalty >= 0, got {decay=}, {penalty=}."
    )

  def penalised(trainable, shared, examples, mask, key):
    frozen, cut = shared
    total, count = loss_fn(trainable, frozen, examples, mask, key)
    pull = penalty * _tail(trainable, cut)
    # Adds a gradient, but no value: the reported loss has no penalty.
    return total + count * (pull - jax.lax.stop_gradient(pull)), count

  def answer(shared, client):
    trainable, frozen = shared
    rank = client.memory
    vector, unravel = ravel_pytree(trainable)
    owners = factors.entry_ranks(trainable)
    cuts = [max(1, int(decay * x)) for x in range(factors.rank(trainable) + 1)]
    cut = jnp.array(cuts, jnp.int32)[rank]
    start = jnp.where(owners < rank, vector, 0)
    training = client.train(unravel(start), (frozen, cut))
    is_pruned = _tail(training.trainable, cut) < _tail(unravel(start), cut)
    rank = jnp.where(is_pruned, cut, rank)
    trained, _ = ravel_pytree(training.trainable)
    sent = start - jnp.where(owners < rank, trained, 0)
    message = channels.Message(sent, rank, *_sizes(trainable)[rank])
    own = unravel(start - sent)
    return answers.Answer(training, start - trained, message, sent, own)

  placement = placement or clients.Placement()
  at_clients = answers.at_clients(
    clients.local_update(penalised, client_optimizer),
    answer,
    placement=placement,
  )

  def init(trainable):
    tiers = factors.tiers(trainable, ranks, of_client)
    tier = tiers.tier_of(jnp.arange(population))
    state = State(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      ranks=jnp.array(ranks, jnp.int32)[tier],
    )
    return rounds.first_state(state, placement)

  def round_fn(state, frozen, examples, cohort, key):
    shared = (state.trainable, frozen)
    arrived = at_clients(
      state.round, shared, state.ranks, examples, cohort, key
    )
    shares = _shares(arrived.own, arrived.weights)
    # Not a sum of shares: a rank that nobody has must become zero exactly.
    mean = aggregators.weighted_sum(arrived.own, shares)
    update = jax.tree.map(jnp.subtract, state.trainable, mean)
    after = rounds.optimizer_step(server_optimizer, state, update)
    after = after._replace(ranks=arrived.memory)
    ranks = answers.take(state.ranks, cohort.clients)
    sizes = downloads.metrics(_sizes(state.trainable)[ranks])
    return rounds.end_round(state, after, arrived, sizes, placement)

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    received=lambda state, key: state.trainable,
    placement=placement,
    population=population,
  )


def _shares(trained, weights):
  """Returns clients' shares by the norms of their products; their sum is 1."""
  present = (weights > 0).astype(weights.dtype)

  def norm(trained):
    squares = map(factors.squared_norm, factors.pairs(trained).values())
    return jnp.sqrt(jnp.maximum(sum(squares), 0))

  norms = present * jax.vmap(norm)(trained)
  return aggregators.normalised(jnp.where(norms.any(), norms, present))


def _tail(trainable, cut):
  """Returns the penalty: the norms of the ranks from `cut` on, all modules."""

  def strength(pair):
    last = (jnp.arange(pair.a.shape[-1]) >= cut).astype(pair.a.dtype)
    a, b = jnp.sum(pair.a**2, axis=-2), jnp.sum(pair.b**2, axis=-1)
    square = (a @ last) * (b @ last)
    # Where a norm is zero, its gradient counts as zero.
    root = jnp.sqrt(jnp.where(square == 0, 1, square))
    return jnp.sum(jnp.where(square == 0, 0, root))

  return sum(map(strength, factors.pairs(trainable).values()))


def _sizes(trainable):
  """Returns a message's bytes and entries by rank: int32 [ranks + 1, 2]."""
  vector, _ = ravel_pytree(trainable)
  owners = factors.entry_ranks(trainable)
  ranks = range(factors.rank(trainable) + 1)
  return product_aggregation.rank_sizes(owners, ranks, vector.dtype)
