"""The round: broadcast, local training, aggregate, server step.

Everything that is sent passes through a compressor whose payload is the
message. Parameters are trees at the clients and one flat vector on the way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import aggregators, clients

# Purposes of the random streams of a round.
_DOWNLOAD, _TRAIN, _UPLOAD = range(3)


class Channel(NamedTuple):
  """How both directions are compressed.

  Attributes:
    download: of the trainable parameters.
    upload: of a client's update; or a function that makes the compressor from
      the payload that the client received, because what both ends know after
      the download needs no bytes.
  """

  download: base.Compressor = base.identity()
  upload: base.Compressor | Callable[[Any], base.Compressor] = base.identity()

  def uplink(self, payload: Any) -> base.Compressor:
    """The upload compressor of a client that received `payload`."""
    if isinstance(self.upload, base.Compressor):
      return self.upload
    return self.upload(payload)


class ServerState(NamedTuple):
  """What the server keeps between rounds: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: state of the server optimizer.
    download: state of the download compressor.
    upload: states of the upload compressor, [population, ...].
  """

  round: Any
  trainable: Any
  optimizer: Any
  download: Any
  upload: Any


class FederatedAlgorithm(NamedTuple):
  """A federated method, as pure functions.

  Attributes:
    init: trainable -> ServerState.
    round: (state, frozen, examples, cohort, key) -> (state, metrics). Jit it
      with `state` donated; `key` is the experiment's, the same in all rounds.
      Metrics: `train_loss` and `tokens` of all local steps together, and for
      each client of the cohort `download_bytes`, `upload_bytes` and whether
      its answer was `finite`; an answer that is not is left out of the mean.
    received: (state, key) -> the trainable parameters as a client would
      receive them now: for FLASC the masked model that the paper evaluates.
  """

  init: Callable[[Any], ServerState]
  round: Callable[..., tuple[ServerState, dict[str, Any]]]
  received: Callable[..., Any]


def federated_round(
  local_update: Callable[..., clients.Training],
  server_optimizer: optax.GradientTransformation,
  *,
  channel: Channel | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  clients_per_step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> FederatedAlgorithm:
  """Composes a federated algorithm from its parts.

  Args:
    local_update: see `clients.local_update`.
    server_optimizer: steps on the aggregated update, which is received minus
      trained, so that it takes the place of a gradient.
    channel: what compresses the messages; None for nothing.
    aggregate: from updates to one; None for the weighted mean.
    population: number of clients; needed if the upload keeps a state for each.
    clients_per_step: see `clients.map_clients`.
    mesh: see `clients.map_clients`.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if `population` is missing.
  """
  channel = channel or Channel()
  aggregate = aggregate or aggregators.weighted_mean()

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    download = channel.download.init(vector)
    payload, _ = channel.download.encode(vector, download, jax.random.key(0))
    upload = channel.uplink(payload).init(vector)
    if jax.tree.leaves(upload):
      if population is None:
        raise ValueError(
          "federated_round needs `population`, the number of clients, because"
          " the upload compressor keeps a state for each."
        )
      copies = lambda x: jnp.broadcast_to(x, (population, *x.shape))
      upload = jax.tree.map(copies, upload)
    return ServerState(
      round=jnp.int32(0),
      # Copied, so that donating the state leaves the caller's arrays alone.
      trainable=jax.tree.map(jnp.array, trainable),
      optimizer=server_optimizer.init(trainable),
      download=download,
      upload=upload,
    )

  def broadcast(state, key):
    vector, unravel = ravel_pytree(state.trainable)
    key = jax.random.fold_in(key, state.round)
    message = base.transmit(
      channel.download,
      vector,
      state.download,
      jax.random.fold_in(key, _DOWNLOAD),
    )
    return message, unravel(message.received), key

  def answer(shared, client):
    """Trains one client: its share of the mean, what else it leaves."""
    payload, received, frozen, examples, key = shared
    cohort, upload_state = client
    key = jax.random.fold_in(key, cohort.clients)
    training = local_update(
      received,
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      jax.random.fold_in(key, _TRAIN),
    )
    update = jax.tree.map(jnp.subtract, received, training.trainable)
    message = base.transmit(
      channel.uplink(payload),
      ravel_pytree(update)[0],
      upload_state,
      jax.random.fold_in(key, _UPLOAD),
    )
    finite = jnp.isfinite(message.received).all()
    share = aggregate.share(
      jnp.where(finite, message.received, 0),
      jnp.where(finite, cohort.weights, 0),
    )
    sent = jnp.int32(wire.nbytes(message.payload))
    summand = (share, training.loss, training.count)
    return summand, (message.state, finite, sent)

  mapped = clients.map_clients(
    answer, clients_per_step=clients_per_step, mesh=mesh
  )

  def round_fn(state, frozen, examples, cohort, key):
    message, received, key = broadcast(state, key)
    upload = jax.tree.map(lambda x: x[cohort.clients], state.upload)
    shared = (message.payload, received, frozen, examples, key)
    total, outputs = mapped(shared, (cohort, upload))
    share, loss, count = total
    upload, finite, sent = outputs
    _, unravel = ravel_pytree(state.trainable)
    updates, optimizer = server_optimizer.update(
      unravel(aggregate.finish(share)), state.optimizer, state.trainable
    )
    put = lambda all, some: all.at[cohort.clients].set(some)
    state = ServerState(
      round=state.round + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer,
      download=message.state,
      upload=jax.tree.map(put, state.upload, upload),
    )
    received_bytes = jnp.int32(wire.nbytes(message.payload))
    return state, {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      "download_bytes": jnp.broadcast_to(received_bytes, sent.shape),
      "upload_bytes": sent,
      "finite": finite,
    }

  return FederatedAlgorithm(
    init, round_fn, lambda state, key: broadcast(state, key)[1]
  )
