"""FedSA-LoRA: `a` is shared, `b` is personal.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation
in Federated Learning", 2024 (arXiv 2410.01463). Every client trains both
factors; only `a` travels and is averaged. Its `b`, and its head if the model
has one, stay with the client until it takes part again.
"""

import functools
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
  draws,
  parameters,
  rounds,
)


class FedSAState(NamedTuple):
  """What the server and all clients keep between rounds.

  Attributes:
    inner: the server's state, which has the shared part. Its `upload` is
      (`own`, `has_trained`, the upload compressor's states).
  """

  inner: rounds.ServerState

  @property
  def round(self) -> Any:
    """How many rounds are done."""
    return self.inner.round

  @property
  def own(self) -> Any:
    """Every client's personal part, [population, ...]."""
    return self.inner.upload[0]

  @property
  def has_trained(self) -> Any:
    """Which clients have taken part so far, bool [population]."""
    return self.inner.upload[1]

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

  Evaluation and export use `received` and `state.trainable`. Their personal
  part is the mean over the clients that have taken part so far (the initial
  part before the first round). The paper evaluates each client with its own
  part: see `personal`.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: steps on both parts; its state is new in every round.
    server_optimizer: steps on the shared part; the paper averages:
      `optax.sgd(1.0)`.
    population: the number of clients.
    is_shared: path -> whether the parameter travels, see `parameters.split`.
    channel: how the shared part is compressed; None for no compression.
    aggregate: turns the updates of the shared part into one; if not given,
      their mean, weighted by numbers of examples.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if the channel has `trains`; from `init`, if nothing is shared.
  """
  if channel is not None and channel.trains is not None:
    raise ValueError(
      "fed_sa_lora trains all parameters, got a channel with `trains`. Leave it"
      " out."
    )
  inner = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    server_optimizer,
    channel=channel,
    aggregate=aggregate,
    population=population,
    placement=placement,
    answer=functools.partial(_answer, channels.tiers_of(channel), is_shared),
  )

  def init(trainable):
    shared, own = parameters.split(trainable, is_shared)
    if not jax.tree.leaves(shared):
      names = ", ".join(parameters.paths(trainable))
      raise ValueError(f"fed_sa_lora found nothing to share among {names}.")
    own = (clients.copies(own, population), jnp.zeros(population, bool))
    own = clients.replicate(own, inner.placement)
    state = inner.init(shared)
    return FedSAState(state._replace(upload=(*own, state.upload)))

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = inner.round(state.inner, frozen, examples, cohort, key)
    return FedSAState(after), metrics

  def received(state, key):
    return parameters.combine(inner.received(state.inner, key), _mean(state))

  # The mean of the personal parts is not private, whatever `aggregate` is.
  return inner._replace(
    init=init, round=round_fn, received=received, noise_multiplier=None
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


def _answer(tiers, is_shared, shared, client):
  """A client trains both parts, sends the shared one and keeps its own."""
  own, _, memory = client.memory
  (start,) = shared.received
  _, unravel = ravel_pytree(shared.trainable)
  training = client.train(
    parameters.combine(unravel(start), own), shared.frozen
  )
  sent, kept = parameters.split(training.trainable, is_shared)
  update = start - ravel_pytree(sent)[0]
  key = client.key(draws.Purpose.UPLOAD)
  message = channels.upload(tiers, shared.payloads, 0, update, memory, key)
  message = message._replace(memory=(kept, jnp.bool(True), message.memory))
  return answers.Answer(training, update, message, message.received)
