"""HetLoRA: clients of different ranks, truncated down and padded up.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of
On-Device Foundation Models", 2024 (arXiv 2401.06432); and the simple one that
FLASC's authors compare with under that name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  factors,
  gathering,
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
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Truncation to a client's rank, and the plain mean of padded updates.

  What only tiers of high rank send is divided by all clients.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    ranks: of the tiers, see `factors.tiers`; the best last. Those of FLASC's
      authors unless told otherwise.
    of_client: numbers of clients -> numbers of their tiers.
    upload: what compresses the updates; None for nothing.
    **parts: `aggregate` (the uniform mean unless told otherwise), `population`,
      `placement` of `rounds.federated_round`.

  Raises:
    ValueError: from `init`, if a rank is out of range.
  """
  parts = {"aggregate": aggregators.uniform_mean()} | parts

  # Made of the tree at hand, because which entries are which depends on it.
  def of(trainable):
    tiers = factors.tiers(trainable, ranks, of_client, upload)
    return fed_avg.fed_avg(
      loss_fn, client_optimizer, server_optimizer, channel=tiers, **parts
    )

  return rounds.FederatedAlgorithm(
    init=lambda trainable: of(trainable).init(trainable),
    round=lambda state, *rest: of(state.trainable).round(state, *rest),
    received=lambda state, key: of(state.trainable).received(state, key),
  )


class State(NamedTuple):
  """What the server keeps between rounds: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters, of full rank.
    optimizer: state of the server optimizer.
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
  the last of them, from `cut = max(1, floor(decay * r))` on: the Frobenius norm
  of these columns of `a` times that of these rows of `b`, added up over all
  modules. If that sum is smaller after training than it was in what the client
  received, the client is of rank `cut` from then on, and sends no more than
  that. The server replaces its factors by the mean of the clients', padded with
  zeros and weighted by `||a_k b_k||`, the Frobenius norm of all modules'
  products together. So a rank that nobody in a round has becomes zero in both
  factors, and is lost: no client can train it again.

  The paper is of one module; one rank and one weight for a client, over all of
  them, is how it is read here. So are heads averaged. If all products are zero,
  clients count alike. Lengths of messages follow the ranks, and tell them.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the server's parameters minus the mean; the paper
      replaces: `optax.sgd(1.0)`.
    ranks: of the tiers before any pruning, see `factors.tiers`.
    of_client: numbers of clients -> numbers of their tiers.
    decay: which share of the ranks a pruning keeps, in (0, 1]; 1 for no
      pruning and no penalty.
    penalty: weight of the penalty in the loss, at least 0.
    population: number of clients.
    placement: see `clients.Placement`; all devices if not given.

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
    # Its value is taken off again: the loss that is reported is the data's.
    return total + count * (pull - jax.lax.stop_gradient(pull)), count

  def answer(shared, train, client, rank, key):
    del client, key  # Nothing is random.
    trainable, frozen = shared
    vector, unravel = ravel_pytree(trainable)
    owners = factors.entry_ranks(trainable)
    cuts = [max(1, int(decay * x)) for x in range(factors.rank(trainable) + 1)]
    cut = jnp.array(cuts, jnp.int32)[rank]
    start = jnp.where(owners < rank, vector, 0)
    training = train(start, (frozen, cut))
    is_pruned = _tail(training.trainable, cut) < _tail(unravel(start), cut)
    rank = jnp.where(is_pruned, cut, rank)
    trained, _ = ravel_pytree(training.trainable)
    update = start - jnp.where(owners < rank, trained, 0)
    nbytes, entries = _sizes(trainable)[rank]
    return start, training, channels.Message(update, rank, nbytes, entries)

  at_clients = gathering.gather(
    clients.local_update(penalised, client_optimizer),
    answer,
    placement=placement,
  )

  def init(trainable):
    tiers = factors.tiers(trainable, ranks, of_client)
    tier = tiers.of_client(jnp.arange(population))
    state = State(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      ranks=jnp.array(ranks, jnp.int32)[tier],
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    return rounds.replicate(jax.tree.map(jnp.array, state), placement)

  def round_fn(state, frozen, examples, cohort, key):
    own = state.ranks[cohort.clients]
    answers = at_clients(
      state.trainable,
      state.round,
      (state.trainable, frozen),
      own,
      examples,
      cohort,
      key,
    )
    mean = gathering.mean(answers.trained, _shares(answers))
    updates, optimizer = server_optimizer.update(
      jax.tree.map(jnp.subtract, state.trainable, mean),
      state.optimizer,
      state.trainable,
    )
    after = State(
      round=state.round + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer,
      ranks=state.ranks.at[cohort.clients].set(answers.memory),
    )
    after = rounds.unless_nobody(answers.weights.any(), after, state)
    down = _sizes(state.trainable)[own]
    metrics = {"download_bytes": down[:, 0], "download_entries": down[:, 1]}
    return rounds.replicate(after, placement), answers.metrics | metrics

  return rounds.FederatedAlgorithm(
    init, round_fn, received=lambda state, key: state.trainable
  )


def _shares(answers):
  """Weights of clients by the norms of their products; they sum to one."""
  present = (answers.weights > 0).astype(answers.weights.dtype)

  def norm(trained):
    squares = map(factors.squared_norm, factors.pairs(trained).values())
    return jnp.sqrt(jnp.maximum(sum(squares), 0))

  norms = present * jax.vmap(norm)(answers.trained)
  return gathering.normalised(jnp.where(norms.any(), norms, present))


def _tail(trainable, cut):
  """How strong the ranks from `cut` on are, over all modules."""

  def strength(pair):
    last = (jnp.arange(pair.a.shape[-1]) >= cut).astype(pair.a.dtype)
    a, b = jnp.sum(pair.a**2, axis=-2), jnp.sum(pair.b**2, axis=-1)
    square = (a @ last) * (b @ last)
    # Where a norm is zero, its gradient is taken for zero.
    root = jnp.sqrt(jnp.where(square == 0, 1, square))
    return jnp.sum(jnp.where(square == 0, 0, root))

  return sum(map(strength, factors.pairs(trainable).values()))


def _sizes(trainable):
  """Sizes of messages by rank, from 0 on: int32 [ranks + 1, 2]."""
  vector, _ = ravel_pytree(trainable)
  owners = factors.entry_ranks(trainable)
  counts = [int(np.sum(owners < x)) for x in range(factors.rank(trainable) + 1)]
  sizes = [product_aggregation.size(x, vector.dtype) for x in counts]
  return jnp.array(sizes, jnp.int32)
