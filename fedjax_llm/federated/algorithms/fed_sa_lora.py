"""FedSA-LoRA: `a` is shared, `b` is personal.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation
in Federated Learning", 2024 (arXiv 2410.01463). Every client trains both
factors; only `a` travels and is averaged. Its `b`, and its head if the model
has one, stay with the client until it takes part again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  draws,
  parameters,
  rounds,
)


class FedSAState(NamedTuple):
  """What the server and all clients keep between rounds.

  Attributes:
    inner: the state of the server, of the shared part.
    own: the personal part of every client, [population, ...].
    has_trained: bool [population], who has taken part so far.
  """

  inner: Any
  own: Any
  has_trained: Any

  @property
  def round(self) -> Any:
    """How many rounds are done."""
    return self.inner.round

  @property
  def trainable(self) -> Any:
    """The shared part with the mean of the personal ones, see `fed_sa_lora`."""
    return parameters.combine(self.inner.trainable, _mean(self))


def personal(state: FedSAState, client: int) -> Any:
  """The parameters of one client: to evaluate it on its own data.

  Args:
    state: of `fed_sa_lora`.
    client: number of the client; one that never took part has the initial
      personal part.
  """
  own = jax.tree.map(lambda x: x[client], state.own)
  return parameters.combine(state.inner.trainable, own)


def fed_sa_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  is_shared: Callable[[str], bool] = lambda path: (
    parameters.factor(path) == "a"
  ),
  channel: channels.Channel | None = None,
  aggregate: aggregators.Aggregator | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FedSA-LoRA; its state grows with the population.

  `received` and `state.trainable`, which evaluation and export use, have the
  mean of the personal parts of the clients that have taken part so far (the
  initial one before anyone did). The paper evaluates each client with its own:
  see `personal`.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: of both parts; starts afresh in every round.
    server_optimizer: of the shared part; the paper averages: `optax.sgd(1.0)`.
    population: number of clients.
    is_shared: which parameters travel, by their path, see `parameters.split`.
    channel: what compresses them.
    aggregate: of the shared part; None for the weighted mean.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `channel` freezes parameters; from `init`, if nothing is
      shared.
  """
  channel = channel or channels.Channel()
  if channel.trains is not None:
    raise ValueError(
      "fed_sa_lora trains all parameters, got a channel with `trains`. Leave it"
      " out."
    )
  aggregate = aggregate or aggregators.weighted_mean()
  local_update = clients.local_update(loss_fn, client_optimizer)
  of_server = rounds.federated_round(
    local_update,
    server_optimizer,
    channel=channel,
    aggregate=aggregate,
    population=population,
    placement=placement,
  )
  answers = clients.map_clients(
    _answer(local_update, channel, aggregate, is_shared),
    placement=placement,
  )

  def init(trainable):
    shared, own = parameters.split(trainable, is_shared)
    if not jax.tree.leaves(shared):
      names = ", ".join(parameters.paths(trainable))
      raise ValueError(f"fed_sa_lora found nothing to share among {names}.")
    copies = lambda x: jnp.tile(x, (population, *[1] * jnp.ndim(x)))
    own = (jax.tree.map(copies, own), jnp.zeros(population, bool))
    return FedSAState(of_server.init(shared), *rounds.replicate(own, placement))

  def round_fn(state, frozen, examples, cohort, key):
    server = state.inner
    message = _broadcast(channel, server, key)
    memory = (state.own, server.upload)
    total, (kept, present, metrics) = answers(
      (server, message.payload, message.received, frozen, examples, key),
      (cohort, jax.tree.map(lambda x: x[cohort.clients], memory)),
    )
    put = lambda everyone, some: everyone.at[cohort.clients].set(some)
    own, upload = jax.tree.map(put, memory, kept)
    share, loss, count = total
    after = rounds.server_step(server_optimizer, aggregate, server, share, key)
    after = after._replace(download=(message.state,), upload=upload)
    if not aggregate.steps_when_empty:
      after = rounds.unless_nobody(present.any(), after, server)
    has_trained = state.has_trained.at[cohort.clients].max(present)
    to_all = lambda number: jnp.full_like(cohort.clients, number)
    return rounds.replicate(FedSAState(after, own, has_trained), placement), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      "download_bytes": to_all(wire.nbytes(message.payload)),
      "download_entries": to_all(wire.entries(message.payload)),
      **metrics,
    }

  def received(state, key):
    shared = of_server.received(state.inner, key)
    return parameters.combine(shared, _mean(state))

  return rounds.FederatedAlgorithm(init, round_fn, received)


def _mean(state):
  """The mean of the personal parts of those who have taken part."""
  count = state.has_trained.sum()

  def mean(x):
    trained = jnp.expand_dims(state.has_trained, range(1, x.ndim))
    total = jnp.where(trained, x, 0).sum(0)
    # Before anyone did, they are all alike.
    return jnp.where(count > 0, total / jnp.maximum(count, 1), x[0])

  return jax.tree.map(mean, state.own)


def _broadcast(channel, server, key):
  """The message to all clients: the shared part."""
  vector, _ = ravel_pytree(server.trainable)
  key = draws.stream(key, draws.Purpose.DOWNLOAD, server.round)
  return base.transmit(channel.download, vector, server.download[0], key)


def _answer(local_update, channel, aggregate, is_shared):
  """Makes the function that trains one client, for `clients.map_clients`."""
  tiers = channels.tiers_of(channel)

  def fn(common, client):
    server, payload, received, frozen, examples, key = common
    cohort, (own, memory) = client
    _, unravel = ravel_pytree(server.trainable)
    key_of = lambda purpose: draws.stream(
      key, purpose, server.round, cohort.clients
    )
    training = local_update(
      parameters.combine(unravel(received), own),
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      key_of(draws.Purpose.TRAIN),
    )
    shared, trained = parameters.split(training.trainable, is_shared)
    update = received - ravel_pytree(shared)[0]
    message = channels.upload(
      tiers, [payload], 0, update, memory, key_of(draws.Purpose.UPLOAD)
    )
    everything = (training.trainable, message.received)
    finite = jnp.isfinite(ravel_pytree(everything)[0]).all()
    weight = jnp.where(finite, cohort.weights, 0)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    kept = jax.tree.map(keep, (trained, message.memory), (own, memory))
    share = aggregate.share(message.received, weight, server.aggregate)
    return (share, training.loss, training.count), (
      kept,
      weight > 0,
      {
        "upload_bytes": message.nbytes,
        "upload_entries": message.entries,
        "finite": finite,
      },
    )

  return fn
