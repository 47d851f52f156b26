"""TGAP, first half: training that records updates, to fit a codec to them.

Wu et al., 2024 (arXiv 2405.13746). The paper trains on a part D1 of each
client's data (see `data.split_rows.divide`), and fits its autoencoder to the
updates of all clients and rounds ("temporal ensemble"). In the paper's first
version each client trains alone; in its last version clients train by federated
averaging. Both are here.

A round has one more metric, `snapshots` [cohort, n]: the vectors that
`cg_fed_llm` would compress. Clients send them uncompressed. The paper does not
count these bytes; here they are in `upload_bytes`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  answers,
  clients,
  codec_state,
  downloads,
  rounds,
)
from fedjax_llm.federated.algorithms import cg_fed_llm


def federated_pretraining(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  representation: cg_fed_llm.Representation = "delta",
  aggregate: aggregators.Aggregator | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Federated averaging, bit for bit, that also returns snapshots.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update.
    population: the number of clients.
    representation: as in `cg_fed_llm.cg_fed_llm`.
    aggregate: turns the clients' updates into one; if not given, their mean,
      weighted by numbers of examples.
    placement: see `clients.Placement`; all devices if not given.
  """
  upload = codec_state.remembered(base.identity())
  inner = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    server_optimizer,
    channel=cg_fed_llm.channel(upload, representation),
    aggregate=aggregate,
    population=population,
    placement=placement,
  )

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = inner.round(state, frozen, examples, cohort, key)
    sent = answers.take(after.upload[0].vector, cohort.clients)
    return after, metrics | {"snapshots": sent}

  return inner._replace(round=round_fn)


class LocalState(NamedTuple):
  """The state of clients that train alone.

  Attributes:
    round: int32, how many rounds are done.
    start: the parameters that all clients start from.
    own: [population, n], the parameters of each client.
  """

  round: Any
  start: Any
  own: Any

  @property
  def trainable(self) -> Any:
    """The mean of the clients' parameters."""
    return ravel_pytree(self.start)[1](self.own.mean(axis=0))


def local_pretraining(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  population: int,
  representation: cg_fed_llm.Representation = "delta",
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Each client trains its own parameters further; nothing is downloaded.

  With "delta", a snapshot is the change of one round. If every client takes
  part in every round with one local epoch, it is the change of an epoch, as in
  the paper's figures of 20 epochs.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    population: the number of clients.
    representation: as in `cg_fed_llm.cg_fed_llm`.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `representation` is neither "delta" nor "state".
  """
  cg_fed_llm.channel(base.identity(), representation)  # Refuses another.

  def answer(shared, client):
    start, frozen = shared
    own, (_, unravel) = client.memory, ravel_pytree(start)
    training = client.train(unravel(own), frozen)
    trained, _ = ravel_pytree(training.trainable)
    update = own - trained
    message = answers.message(update, trained, base.Dense(update))
    return answers.Answer(training, update, message, update)

  placement = placement or clients.Placement()
  at_clients = answers.at_clients(
    clients.local_update(loss_fn, client_optimizer),
    answer,
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    own = clients.copies(vector, population)
    state = LocalState(jnp.int32(0), trainable, ())
    return rounds.first_state(state, placement, own=own)

  def round_fn(state, frozen, examples, cohort, key):
    arrived = at_clients(
      state.round, (state.start, frozen), state.own, examples, cohort, key
    )
    before, after = (
      answers.take(own, cohort.clients) for own in (state.own, arrived.memory)
    )
    nothing = jnp.zeros((len(cohort.clients), 2), jnp.int32)
    metrics = arrived.metrics | downloads.metrics(nothing)
    metrics["snapshots"] = (
      before - after if representation == "delta" else after
    )
    state = state._replace(round=state.round + 1, own=arrived.memory)
    return clients.replicate(state, placement), metrics

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    received=lambda state, key: state.trainable,
    placement=placement,
    population=population,
  )
