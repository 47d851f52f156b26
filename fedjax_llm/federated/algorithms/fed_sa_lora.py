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

from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
  draws,
  parameters,
  rounds,
)


class FedSAState(NamedTuple):
  """What the server and all clients keep between rounds.

  Attributes:
    inner: the server's state, which has the shared part.
    own: every client's personal part, [population, ...].
    has_trained: bool [population], which clients have taken part so far.
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
    """The shared part and the mean personal part, see `fed_sa_lora`."""
    return parameters.combine(self.inner.trainable, _mean(self))


def personal(state: FedSAState, client: int) -> Any:
  """One client's parameters, to evaluate it on its own data.

  Args:
    state: the state of `fed_sa_lora`.
    client: the client's number; one that never took part has the initial
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
  mean personal part of the clients that have taken part so far (the initial
  part before the first round). The paper evaluates each client with its own
  part: see `personal`.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: steps on both parts; starts afresh in every round.
    server_optimizer: steps on the shared part; the paper averages:
      `optax.sgd(1.0)`.
    population: the number of clients.
    is_shared: which parameters travel, by their path, see `parameters.split`.
    channel: how the shared part is compressed; None for nothing.
    aggregate: from updates of the shared part to one; the mean weighted by
      examples if not given.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if the channel has `trains`; from `init`, if nothing is shared.
  """
  channel = channel or channels.Channel()
  if channel.trains is not None:
    raise ValueError(
      "fed_sa_lora trains all parameters, got a channel with `trains`. Leave it"
      " out."
    )
  placement = placement or clients.Placement()
  aggregate = aggregate or aggregators.weighted_mean()
  tiers = channels.tiers_of(channel)
  local_update = clients.local_update(loss_fn, client_optimizer)
  of_server = rounds.federated_round(
    local_update,
    server_optimizer,
    channel=channel,
    aggregate=aggregate,
    population=population,
    placement=placement,
  )
  at_clients = answers.at_clients(
    local_update,
    _answer(tiers, is_shared),
    lambda update, weight, shared: aggregate.share(
      update, weight, shared.aggregate
    ),
    placement=placement,
  )

  def init(trainable):
    shared, own = parameters.split(trainable, is_shared)
    if not jax.tree.leaves(shared):
      names = ", ".join(parameters.paths(trainable))
      raise ValueError(f"fed_sa_lora found nothing to share among {names}.")
    copies = lambda x: jnp.tile(x, (population, *[1] * jnp.ndim(x)))
    own = (jax.tree.map(copies, own), jnp.zeros(population, bool))
    return FedSAState(
      of_server.init(shared), *clients.replicate(own, placement)
    )

  def round_fn(state, frozen, examples, cohort, key):
    server = state.inner
    shared, download = downloads.broadcast(
      tiers,
      server.trainable,
      frozen,
      server.download,
      server.round,
      key,
      server.aggregate,
    )
    memory = (state.own, server.upload)
    arrived = at_clients(server.round, shared, memory, examples, cohort, key)
    own, upload = arrived.memory
    after = rounds.server_step(
      server_optimizer, aggregate, server, arrived.total, key
    )
    after = after._replace(download=download, upload=upload)
    present = arrived.weights > 0
    if not aggregate.steps_when_empty:
      after = rounds.unless_nobody(present.any(), after, server)
    has_trained = state.has_trained.at[cohort.clients].max(present)
    tier = jnp.zeros_like(cohort.clients)
    sizes = downloads.sizes(shared.payloads, tier)
    after = FedSAState(after, own, has_trained)
    return clients.replicate(after, placement), arrived.metrics | sizes

  def received(state, key):
    shared = of_server.received(state.inner, key)
    return parameters.combine(shared, _mean(state))

  # No noise multiplier: the mean of the personal parts is not private.
  return rounds.FederatedAlgorithm(
    init, round_fn, received, placement=placement
  )


def _mean(state):
  """The mean personal part of the clients that have taken part."""
  count = state.has_trained.sum()

  def mean(x):
    trained = jnp.expand_dims(state.has_trained, range(1, x.ndim))
    total = jnp.where(trained, x, 0).sum(0)
    # Before the first round all personal parts are the same.
    return jnp.where(count > 0, total / jnp.maximum(count, 1), x[0])

  return jax.tree.map(mean, state.own)


def _answer(tiers, is_shared):
  """A client trains both parts, sends the shared one and keeps its own."""

  def answer(shared, client):
    own, memory = client.memory
    (start,) = shared.received
    _, unravel = ravel_pytree(shared.trainable)
    training = client.train(
      parameters.combine(unravel(start), own), shared.frozen
    )
    sent, kept = parameters.split(training.trainable, is_shared)
    update = start - ravel_pytree(sent)[0]
    message = channels.upload(
      tiers,
      shared.payloads,
      0,
      update,
      memory,
      client.key(draws.Purpose.UPLOAD),
    )
    message = message._replace(memory=(kept, message.memory))
    return answers.Answer(training, update, message, message.received)

  return answer
