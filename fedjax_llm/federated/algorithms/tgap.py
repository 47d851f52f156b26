"""TGAP, first half: training whose updates are recorded, to fit a codec on.

Wu et al., 2024 (arXiv 2405.13746). The paper trains on a part D1 of each
client's data, `data.split_rows.divide`, and fits its autoencoder on what was
recorded over clients and rounds ("temporal ensemble"). Its first version does
so without federated learning, each client alone, its last by federated
pre-training: here are both.

Metrics of a round have `snapshots` [cohort, n] too: what `cg_fed_llm` would put
through a codec. The recorder gets them entry by entry, which the paper does not
count and which is here in `upload_bytes`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import (
  channels,
  clients,
  codec_rounds,
  gathering,
  rounds,
)


def federated_pretraining(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  representation: codec_rounds.Representation = "delta",
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Federated averaging, bit for bit; snapshots are of a round.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update.
    population: number of clients.
    representation: as in `cg_fed_llm.cg_fed_llm`.
    **parts: `aggregate`, `placement` of `rounds.federated_round`.
  """
  upload = codec_rounds.remembered(base.identity())
  inner = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    server_optimizer,
    channel=codec_rounds.channel(upload, representation),
    population=population,
    **parts,
  )

  def round_fn(state, *arguments):
    after, metrics = inner.round(state, *arguments)
    _, _, cohort, _ = arguments
    sent = after.upload[0].vector[cohort.clients]
    return after, metrics | {"snapshots": sent}

  return inner._replace(round=round_fn)


class LocalState(NamedTuple):
  """The state of clients that train alone.

  Attributes:
    round: int32, how many rounds are done.
    start: what all start from.
    own: parameters of each client [population, n].
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
  representation: codec_rounds.Representation = "delta",
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Each client goes on from its own parameters; nothing comes down.

  Snapshots are increments of a visit: with whole cohorts and one local epoch,
  of an epoch, as in the paper's figures of 20 epochs.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh in every round.
    population: number of clients.
    representation: as in `cg_fed_llm.cg_fed_llm`.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `representation` is neither "delta" nor "state".
  """
  codec_rounds.channel(base.identity(), representation)  # Refuses another.

  def answer(shared, train, client, own, key):
    del client, key  # Nothing is random.
    training = train(own, shared)
    trained, _ = ravel_pytree(training.trainable)
    update = own - trained
    message: Any = base.Dense(update)
    nbytes, entries = wire.nbytes(message), wire.entries(message)
    return (
      own,
      training,
      channels.Message(update, trained, jnp.int32(nbytes), jnp.int32(entries)),
    )

  at_clients = gathering.gather(
    clients.local_update(loss_fn, client_optimizer),
    answer,
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    # Copied, so that donating the state leaves the caller's arrays alone.
    start = jax.tree.map(jnp.array, trainable)
    own = jnp.tile(vector[None], (population, 1))
    return rounds.replicate(LocalState(jnp.int32(0), start, own), placement)

  def round_fn(state, frozen, examples, cohort, key):
    before = state.own[cohort.clients]
    answers = at_clients(
      state.start, state.round, frozen, before, examples, cohort, key
    )
    after = answers.memory
    none = jnp.zeros(len(cohort.clients), jnp.int32)
    metrics = answers.metrics | {
      "download_bytes": none,
      "download_entries": none,
      "snapshots": before - after if representation == "delta" else after,
    }
    own = state.own.at[cohort.clients].set(after)
    state = state._replace(round=state.round + 1, own=own)
    return rounds.replicate(state, placement), metrics

  return rounds.FederatedAlgorithm(
    init, round_fn, received=lambda state, key: state.trainable
  )
