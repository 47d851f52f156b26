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

# Purposes of the random streams: a draw is of (key, purpose, round, client).
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
      its answer was `finite`; one that is not is left out, as is a client of
      weight zero: not in the mean, and its memory stays as it was.
    received: (state, key) -> the trainable parameters as a client would
      receive them now: for FLASC, the masked model. (The authors' masked
      evaluation has the new parameters under the mask of the round before.)
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
    mesh: see `clients.map_clients`. The state is replicated on it; place
      `frozen` and `examples` alike, or every round copies them.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if `population` is missing.
  """
  channel = channel or Channel()
  aggregate = aggregate or aggregators.weighted_mean()
  answers = clients.map_clients(
    _answer(local_update, channel, aggregate),
    clients_per_step=clients_per_step,
    mesh=mesh,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    state = ServerState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      download=channel.download.init(vector),
      upload=(),
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    state = jax.tree.map(jnp.array, state)
    upload = _upload_states(channel, vector, population)
    return _replicate(state._replace(upload=upload), mesh)

  def round_fn(state, frozen, examples, cohort, key):
    message, received = _broadcast(channel.download, state, key)
    shared = (state.round, message.payload, received, frozen, examples, key)
    memory = jax.tree.map(lambda x: x[cohort.clients], state.upload)
    total, (memory, finite, upload_bytes) = answers(shared, (cohort, memory))
    share, loss, count = total
    _, unravel = ravel_pytree(state.trainable)
    updates, optimizer = server_optimizer.update(
      unravel(aggregate.finish(share)), state.optimizer, state.trainable
    )
    put = lambda everyone, some: everyone.at[cohort.clients].set(some)
    state = ServerState(
      round=state.round + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer,
      download=message.state,
      upload=jax.tree.map(put, state.upload, memory),
    )
    return _replicate(state, mesh), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      "download_bytes": jnp.full_like(
        upload_bytes, wire.nbytes(message.payload)
      ),
      "upload_bytes": upload_bytes,
      "finite": finite,
    }

  received = lambda state, key: _broadcast(channel.download, state, key)[1]
  return FederatedAlgorithm(init, round_fn, received)


def _broadcast(download, state, key):
  """The message to all clients, and the parameters that arrive."""
  vector, unravel = ravel_pytree(state.trainable)
  key = _stream(key, _DOWNLOAD, state.round)
  message = base.transmit(download, vector, state.download, key)
  return message, unravel(message.received)


def _answer(local_update, channel, aggregate):
  """Makes the function that trains one client, for `clients.map_clients`."""

  def fn(shared, client):
    round_number, payload, received, frozen, examples, key = shared
    cohort, memory = client
    training = local_update(
      received,
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      _stream(key, _TRAIN, round_number, cohort.clients),
    )
    update = jax.tree.map(jnp.subtract, received, training.trainable)
    update, _ = ravel_pytree(update)
    message = base.transmit(
      channel.uplink(payload),
      update,
      memory,
      _stream(key, _UPLOAD, round_number, cohort.clients),
    )
    # Of both: a compressor may lose what is not finite, or overflow.
    finite = jnp.isfinite(update).all() & jnp.isfinite(message.received).all()
    weight = jnp.where(finite, cohort.weights, 0)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    memory = jax.tree.map(keep, message.state, memory)
    share = aggregate.share(message.received, weight)
    upload_bytes = jnp.int32(wire.nbytes(message.payload))
    summand = (share, training.loss, training.count)
    return summand, (memory, finite, upload_bytes)

  return fn


def _upload_states(channel, vector, population):
  """The state of the upload compressor for each client: [population, ...]."""

  def first(vector):
    state = channel.download.init(vector)
    key = jax.random.key(0)
    payload, _ = channel.download.encode(vector, state, key)
    return channel.uplink(payload).init(vector)

  # Traced first, so that what the round would refuse is refused here.
  shapes = jax.eval_shape(first, vector)
  if not jax.tree.leaves(shapes):
    return shapes
  if population is None:
    raise ValueError(
      "federated_round needs `population`, the number of clients, because"
      " the upload compressor keeps a state for each."
    )
  copies = lambda x: jnp.broadcast_to(x, (population, *x.shape))
  return jax.tree.map(copies, jax.jit(first)(vector))


def _replicate(state, mesh):
  """Fixes where the state lives, so that every round finds it there."""
  if mesh is None:
    return state
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  return jax.lax.with_sharding_constraint(state, everywhere)


def _stream(key, *numbers):
  """The key of the draws that are named by `numbers`."""
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key
